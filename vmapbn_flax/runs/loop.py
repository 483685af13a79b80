"""The training loop: steps, and between them rows, evaluations, checkpoints and a look for signals.

One run, or several that train together in one program; in one process, or in many that all run this.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.errors import Interrupted, RunError
from vmapbn_flax.files import make_directory
from vmapbn_flax.multihost.processes import Processes
from vmapbn_flax.runs.checkpoints import Checkpoints, Meta, restore, restore_latest
from vmapbn_flax.runs.console import Progress
from vmapbn_flax.runs.record import Record
from vmapbn_flax.runs.timing import Timing
from vmapbn_flax.training.hyperparameters import steps_in
from vmapbn_flax.training.programs import Programs, figures
from vmapbn_flax.training.state import TrainState

_WAKE_UP_SECONDS = 1.0  # the longest that a signal or the progress bar waits for the device


class Loop:
    """The runs of one program, from their newest checkpoint to their end.

    Args:
      records: of the runs, in the order that `programs` has them.
      directory: of the checkpoints of all of them together.
      train: what their configs say of training, which is the same for all.
      started: `time.monotonic()` when the work on them began.

    Attributes:
      step: that the runs are at.
      state: theirs, on the devices.
      timing: where the seconds go.

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
    ):
        self._records, self._directory, self._programs, self._train = records, directory, programs, train
        self._processes = processes
        self.timing = Timing(programs.compiler, started)
        self._eval_steps = max(1, steps_in(train.eval_every, programs.steps_per_epoch))
        self._pending: list[Callable[[], None]] = []  # rows to write and checks to make when the processes next agree
        restored = self._restore()
        self.step = self.first_step = restored[1]["step"] if restored else 0
        programs.compile_ahead(self.step)
        self.state: TrainState = programs.place(restored[0]) if restored else programs.create()
        with processes.together(), contextlib.ExitStack() as opened:
            for record in self.active:
                record.open(self.step)
                opened.callback(record.close)
            if processes.first:  # not by orbax, in which the others would wait for one that fails
                make_directory(directory)
            opened.pop_all()
        self._checkpoints = Checkpoints(directory)

    @property
    def active(self) -> list[Record]:
        """The records of the runs that have not diverged."""
        return [record for record in self._records if not record.diverged]

    def _restore(self) -> tuple[TrainState, Meta] | None:
        """The newest whole checkpoint, read by each process."""
        template, restored = self._programs.template(), None
        with self._processes.together() as agreement:
            if self._processes.first:
                restored = restore_latest(self._directory, template)
                agreement.say(step=restored and restored[1]["step"])
        step = agreement.heard[0]["step"]
        if step is None:
            return None
        with self._processes.together():
            restored = restored or restore(self._directory, step, template)
            self._require_fit(restored[1])
        return restored

    def _require_fit(self, meta: Meta) -> None:
        if [run["name"] for run in meta["runs"]] != [record.name for record in self._records]:
            raise RunError(
                f"{self._directory}: got checkpoints of other members, expected {self._records[0].name} and those "
                f"that the ledger groups it with. Remove {self._directory.parent}, and they start afresh."
            )
        for record, saved in zip(self._records, meta["runs"], strict=True):
            if not record.diverged:
                record.require_fit(saved, meta["step"])
        if meta["step"] > self._programs.total_steps:
            raise RunError(
                f"{self._directory}: got a checkpoint of step {meta['step']}, expected at most the "
                f"{self._programs.total_steps} of this run: its data set has shrunk. Use the data.dir it was made "
                f"with, or another --workdir."
            )

    def close(self) -> None:
        """Waits for the save in flight; every way out leads here."""
        with contextlib.ExitStack() as stack:
            for record in self._records:
                stack.callback(record.close)
            stack.callback(self._checkpoints.close)

    def run(
        self,
        received: Sequence[int],
        progress: Progress,
        on_divergence: Callable[[list[tuple[Record, int]]], None],
        on_save: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Steps, rows, evaluations and checkpoints up to the last step, or until every run has diverged.

        Args:
          received: signals, which may arrive at any time.
          progress: is told of steps and evaluations.
          on_divergence: is told of runs that have diverged, each with the step from which it stands still.
          on_save: is told of steps that are being saved.

        Raises:
          RunError: the first step left a running statistic where it was; or what `on_divergence` raises.
          Interrupted: a signal arrived in one of the processes; the state is saved.
        """
        self.timing.started_up()
        most_steps = 1  # at first, for a look at what a step does to the statistics
        profile = self._train.profile  # of the few steps that come next, when the compiler is done
        while True:
            due = self._evaluation_due()
            results = self._evaluate() if due else []
            signum, most_steps = self._agree(received, most_steps)
            if due:
                progress.evaluated(self.step, results)
            if due or signum:
                self.save()
                on_save(self.step)
            if signum:
                raise Interrupted(signum, self.step)
            if self.step == self._programs.total_steps or not self.active:
                return
            count = min(most_steps, self._next_stop() - self.step)
            traced = profile and self.step > self.first_step
            directory = self._records[0].workdir.profile
            with self.timing.profile(directory) if traced else contextlib.nullcontext():
                seconds = self._advance(count)
            if diverged := self._find_diverged():
                self._agree(received, most_steps)
                on_divergence(diverged)
            if self.step - count == self.first_step and not profile:
                self._programs.compile_measure_ahead()
                if self._processes.first:
                    threading.Thread(target=import_pictures).start()
            profile = profile and not traced
            most_steps = max(1, min(8 * count, int(_WAKE_UP_SECONDS * count / seconds)))
            progress.advance(count)

    def _agree(self, received: Sequence[int], most_steps: int) -> tuple[int, int]:
        """Writes rows that are pending; returns a signal that some process has, or 0, and the first one's steps."""
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
        """Takes `count` steps and prepares the training rows if they are due; returns the seconds it took."""
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
        """Marks the runs that diverged in the last steps; returns them with the step of each."""
        found = [
            (record, int(step))
            for record, (step, _, in_a_row) in zip(self._records, self._counters, strict=True)
            if not record.diverged and in_a_row >= self._train.max_skipped_steps
        ]
        for record, _ in found:
            record.diverged = True
        return found

    def _evaluation_due(self) -> bool:
        due = self.step > 0 and self.step % self._eval_steps == 0
        done = all(record.is_evaluated(self.step) for record in self.active)
        return (due or self.step == self._programs.total_steps) and not done

    def _evaluate(self) -> list[dict[str, float]]:
        """The figures of every run, or of a diverged one nothing; prepares the evaluation rows."""
        with self.timing.clock("evaluate"):
            measured = self._programs.measure(self.state)
            results = [{} if record.diverged else figures(m) for record, m in zip(self._records, measured, strict=True)]
        for record, result in zip(self._records, results, strict=True):
            if result and not record.is_evaluated(self.step):
                self._pending.append(partial(record.evaluated, self.step, result))
        return results

    def save(self) -> None:
        """Saves the state and what the records say of it, in the background; the rows are on the disk before."""
        with self.timing.clock("checkpoint"):
            for record in self.active:
                record.flush()
            meta = {"runs": [record.described() for record in self._records]}
            self._checkpoints.save(self.step, self._programs.snapshot(self.state), meta, self._best_step())

    def _best_step(self) -> int | None:
        if len(self._records) > 1:  # that of each is another
            return None
        best = self._records[0].best_row([self.step, *self._checkpoints.steps()])
        return best["step"] if best else None

    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints, all of them whole on the disk."""
        with self.timing.clock("checkpoint"):
            return self._checkpoints.steps()


def counters(state: TrainState) -> tuple[Any, Any, Any]:
    """Of each run its steps, those skipped, and those skipped in a row."""
    return state.step, state.skipped_steps, state.skipped_in_a_row


def import_pictures() -> ModuleType:
    """Half a second, of which nothing is left to wait for if it begins while the device works."""
    from vmapbn_flax.runs import pictures

    return pictures


def _require_moved(before: Any, after: Any) -> None:
    """Refuses running statistics that a step left where they were: batch norm is not training then."""
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if np.array_equal(old, new):
            raise RunError(
                f"batch_stats/{jax.tree_util.keystr(path, simple=True, separator='/')}: got the same values before "
                f"and after the first step; expected running statistics to move. Is the layer's input constant?"
            )
