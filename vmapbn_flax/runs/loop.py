"""The training loop: steps, and between them rows, evaluations, checkpoints and signals.

The loop serves one run, or several that train together in one program. Of many processes, every one runs the loop.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.errors import Interrupted, RunError
from vmapbn_flax.files import in_threads, make_directory
from vmapbn_flax.multihost.processes import Processes
from vmapbn_flax.runs.checkpoints import Checkpoints
from vmapbn_flax.runs.console import Progress
from vmapbn_flax.runs.record import Record
from vmapbn_flax.runs.restoring import restore_runs
from vmapbn_flax.runs.timing import Timing
from vmapbn_flax.training.hyperparameters import steps_in
from vmapbn_flax.training.metrics import figures
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState
from vmapbn_flax.training.trees import named_leaves
from vmapbn_flax.training.watch import percentile_figures

_WAKE_UP_SECONDS = 1.0  # the longest that a signal or the progress bar waits for the device


class Loop:
    """Trains the runs of one program, from their newest checkpoint to their end.

    Args:
      records: of the runs, in the order of `programs`.
      directory: of the checkpoints, each of which holds all the runs.
      train: the section `train` of the config, which is the same for all the runs.
      started: `time.monotonic()` when the work on the runs began.
      own: whether the runs start from checkpoints of their own, where `directory` has none.
      end: the step to train to; None for the last one.

    Attributes:
      step: of the runs.
      state: of the runs, on the devices.
      timing: the seconds by activity.

    Raises:
      RunError: the checkpoints in `directory` are damaged or of other runs.
    """

    def __init__(
        self,
        records: Sequence[Record],
        directory: Path,
        programs: Programs,
        train: ConfigDict,
        processes: Processes,
        started: float,
        *,
        own: bool = False,
        end: int | None = None,
    ):
        self._records, self._programs, self._train = records, programs, train
        self._processes = processes
        self.timing = Timing(programs.compiler, started)
        self._eval_steps = max(1, steps_in(train.eval_every, programs.steps_per_epoch))
        self._end = programs.total_steps if end is None else end
        self._pending: list[Callable[[], None]] = []  # rows and checks for the next agreement
        restored = restore_runs(directory, programs, records, processes, own=own)
        self.step = self.first_step = restored[1]["step"] if restored else 0
        programs.compile_ahead(self.step)
        self.state: TrainState = programs.place(restored[0]) if restored else programs.create()
        with processes.together():
            if processes.first:  # not left to orbax: if it failed there, the others would wait
                make_directory(directory)  # and before `open` cuts off rows
            in_threads(lambda record: record.open(self.step), self._records)
        self._checkpoints = Checkpoints(directory)

    @property
    def active(self) -> list[Record]:
        """The records of the runs that have not diverged."""
        return [record for record in self._records if not record.diverged]

    def close(self) -> None:
        """Waits for the save in flight; every way out must call it."""
        self._checkpoints.close()

    def run(
        self,
        received: Sequence[int],
        progress: Progress,
        on_divergence: Callable[[list[tuple[Record, int]]], None],
        on_save: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Steps, rows, evaluations and checkpoints up to `end`, or until every run has diverged.

        Args:
          received: the signals of this process; more may arrive at any time.
          progress: shows steps and evaluations.
          on_divergence: called with the runs that have diverged, each with the step at which it is frozen.
          on_save: called with each step that is being saved.

        Raises:
          RunError: the first step did not change a running statistic; or what `on_divergence` raises.
          Interrupted: a signal arrived in one of the processes; the state is saved.
        """
        self.timing.started_up()
        profile = self._train.profile  # of the second chunk: compiling is over then
        signum, most_steps = self._agree(received, 1)  # a single step, after which the running statistics are checked
        while True:
            if due := self._evaluation_due():
                results = self._evaluate()
                signum, most_steps = self._agree(received, most_steps)
                progress.evaluated(self.step, results)
            if due or signum:
                self.save()
                on_save(self.step)
            if signum:
                raise Interrupted(signum, self.step)
            if self.step >= self._end or not self.active:
                return
            count = min(most_steps, self._next_stop() - self.step)
            traced = profile and self.step > self.first_step
            directory = self._records[0].workdir.profile
            with self.timing.profile(directory) if traced else contextlib.nullcontext():
                seconds = self._advance(count)
            most_steps = max(1, min(8 * count, int(_WAKE_UP_SECONDS * count / seconds)))
            diverged = self._find_diverged()
            signum, most_steps = self._agree(received, most_steps)
            if diverged:
                on_divergence(diverged)
            if self.step - count == self.first_step and not profile:
                self._programs.compile_measure_ahead()
                if self._processes.first:
                    threading.Thread(target=import_pictures).start()
            profile = profile and not traced
            progress.advance(count)

    def _agree(self, received: Sequence[int], most_steps: int) -> tuple[int, int]:
        """Writes the pending rows; returns a signal of any process, or 0, and the `most_steps` of process 0."""
        with self._processes.together() as agreement:
            while self._pending:
                self._pending.pop(0)()
            agreement.say(signum=received[0] if received else 0, most_steps=most_steps)
        return max(heard["signum"] for heard in agreement.heard), agreement.heard[0]["most_steps"]

    def _next_stop(self) -> int:
        """The next step at which a row, an evaluation or the end of an epoch is due."""
        every = (self._train.log_every, self._programs.steps_per_epoch, self._eval_steps)
        return min(self._programs.total_steps, *((self.step // n + 1) * n for n in every))

    def _advance(self, count: int) -> float:
        """Takes `count` steps and prepares the training rows if they are due; returns the seconds of the steps."""
        before = self._programs.split(self.state.batch_stats) if self.step == 0 else []
        with self.timing.clock("train") as clock:
            self.state = self._programs.advance(self.state, self.step, count)
            self._counters = self._programs.split(counters(self.state))
        self.step += count
        if before:
            after = self._programs.split(self.state.batch_stats)
            for old, new, (_, skipped, _) in zip(before, after, self._counters, strict=True):
                if not skipped:
                    self._pending.append(partial(_require_moved, old, new))
        if self.step == self._programs.total_steps or 0 in (
            self.step % self._train.log_every,
            self.step % self._programs.steps_per_epoch,
        ):
            self._prepare_rows()
        return clock.seconds

    def _prepare_rows(self) -> None:
        rates = self._programs.learning_rates(self.step - 1)
        measured = self._programs.split(self.state.metrics)
        in_a_row = self._train.max_skipped_steps
        for record, metrics, rate, (_, skipped, skipped_in_a_row) in zip(
            self._records, measured, rates, self._counters, strict=True
        ):
            if not record.diverged and skipped_in_a_row < in_a_row:
                self._pending.append(partial(record.trained, self.step, metrics, int(skipped), rate))
        self.state = self._programs.fresh_metrics(self.state)

    def _find_diverged(self) -> list[tuple[Record, int]]:
        """Marks the runs that diverged in the last chunk; returns each with its step."""
        found = [
            (record, int(step))
            for record, (step, _, in_a_row) in zip(self._records, self._counters, strict=True)
            if not record.diverged and in_a_row >= self._train.max_skipped_steps
        ]
        for record, _ in found:
            record.diverged = True
            self._pending.append(partial(record.write_hparams, failed=True))
        return found

    def _evaluation_due(self) -> bool:
        due = self.step > 0 and self.step % self._eval_steps == 0
        done = all(record.is_evaluated(self.step) for record in self.active)
        return (due or self.step >= self._end) and not done

    def _evaluate(self) -> list[dict[str, float]]:
        """The figures of every run, none for a diverged one; prepares the evaluation rows."""
        with self.timing.clock("evaluate"):
            measured, watched = self._programs.measure(self.state), self._programs.watch(self.state)
        results = [
            {} if record.diverged else figures(m) | percentile_figures(w)
            for record, m, w in zip(self._records, measured, watched, strict=True)
        ]
        for record, result, percentiles in zip(self._records, results, watched, strict=True):
            if result and not record.is_evaluated(self.step):
                self._pending.append(partial(record.evaluated, self.step, result))
                self._pending.append(partial(record.watched, self.step, percentiles))
        return results

    def save(self) -> None:
        """Saves the state in the background, with the records' descriptions; first, all rows go to the disk."""
        with self.timing.clock("checkpoint"):
            in_threads(Record.flush, self.active)
            meta = {"data": self._programs.described, "runs": [record.described() for record in self._records]}
            self._checkpoints.save(self.step, self._programs.snapshot(self.state), meta, self._best_steps())

    def _best_steps(self) -> set[int]:
        """The step of the best evaluation of each run, of those that a checkpoint is saved of."""
        saved = [self.step, *self._checkpoints.steps()]
        best = [record.best_row(saved) for record in self._records]
        return {row["step"] for row in best if row}

    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints, when all are whole on the disk."""
        with self.timing.clock("checkpoint"):
            return self._checkpoints.steps()


def counters(state: TrainState) -> tuple[Any, Any, Any]:
    """The steps, the skipped steps, and the skipped steps in a row, of each run."""
    return state.step, state.skipped_steps, state.skipped_in_a_row


def import_pictures() -> ModuleType:
    """Imports orbax and matplotlib, which take over half a second: nobody waits if it begins while the device works."""
    from vmapbn_flax.runs import checkpointer, pictures  # noqa: F401  # in the order of their first use

    return pictures


def _require_moved(before: Any, after: Any) -> None:
    """Refuses running statistics that a step did not change: batch norm is not training then."""
    moved = named_leaves(after)
    for name, old in named_leaves(before).items():
        if np.array_equal(old, moved[name]):
            raise RunError(
                f"batch_stats/{name}: got the same values before and after the first step; expected running "
                f"statistics to move. Is the layer frozen, or its input constant?"
            )
