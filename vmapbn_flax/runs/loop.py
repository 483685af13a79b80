"""The training loop: steps, and between them rows, evaluations, checkpoints and a look for signals."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from vmapbn_flax.data import Dataset
from vmapbn_flax.errors import Interrupted, RunError
from vmapbn_flax.files import write_json
from vmapbn_flax.runs import console
from vmapbn_flax.runs.checkpoints import Checkpoints, restore_latest
from vmapbn_flax.runs.record import Record
from vmapbn_flax.runs.timing import Timing
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs, figures
from vmapbn_flax.training.state import steps_in

_WAKE_UP_SECONDS = 1.0  # the longest that a signal or the progress bar waits for the device


class Run:
    """One run, from its newest checkpoint to its end; `sweep.GroupRun` is many in one program.

    Raises:
      RunError: the checkpoints in `directory` are damaged or of another run.
    """

    def __init__(self, records: Sequence[Record], directory: Path, programs: Programs, started: float):
        self._records, self._directory, self._programs = records, directory, programs
        self._config = records[0].config  # what is read from it is the same for all
        self._timing = Timing(programs.compiler, started)
        self._eval_steps = max(1, steps_in(self._config.train.eval_every, programs.steps_per_epoch))

        restored = restore_latest(directory / "checkpoints", programs.template())
        self.step = 0 if restored is None else restored[1]["step"]
        if restored is not None:
            self._require_fit(restored[1])
            if self.step > programs.total_steps:
                raise RunError(
                    f"{directory}: got a checkpoint of step {self.step}, expected at most the {programs.total_steps} "
                    f"of this run: its data set has shrunk. Use the data.dir it was made with, or another --workdir."
                )
        programs.compile_ahead(self.step)
        self._state = programs.create() if restored is None else programs.place(restored[0])
        self._first_step = self.step
        self._checkpoints = Checkpoints(directory / "checkpoints")
        for record in self._active():
            record.open(self.step)

    def _active(self) -> list[Record]:
        return [record for record in self._records if not record.stopped]

    def say_start(self, dataset: Dataset, changes: Sequence[str] | None) -> None:
        """Says what starts, and makes the config that of the workdir: `changes` to the one there, if any."""
        for change in changes or []:
            console.say(f"resuming with {change}")
        if changes != []:
            (self._directory / "summary.json").unlink(missing_ok=True)  # first: from here on the run is not finished
            write_json(self._directory / "config.json", self._config.to_dict())
        count = parameter_overview.count_parameters(self._state.params)
        where = f"resuming at step {self.step}" if self.step else "starting"
        console.say(
            f"{self._directory}: {where} of {self._programs.total_steps} steps, {count:,} parameters, "
            f"{dataset.name} ({len(dataset.train):,} training and {len(dataset.test):,} test examples"
            f"{', streamed' if dataset.streamed else ''}), on {self._programs.where()}"
        )

    def close(self) -> None:
        """Waits for the save in flight; every way out leads here."""
        with contextlib.ExitStack() as stack:
            for record in self._records:
                stack.callback(record.close)
            stack.callback(self._checkpoints.close)

    def to_end(self, received: Sequence[int], progress: console.Progress) -> None:
        """Steps, rows, evaluations and checkpoints up to the last step, or until a signal is `received`.

        Raises:
          RunError: training diverged, or the first step left a running statistic where it was.
          Interrupted: a signal arrived; the state is saved.
        """
        total = self._programs.total_steps
        self._timing.started_up()
        most_steps = 1  # at first, for a look at what a step does to the statistics
        profile = self._config.train.profile  # of the few steps that come next, when the compiler is done
        while self._active():
            if self._evaluation_due():
                progress.evaluated(self.step, self._evaluate_and_save())
            if received:
                self._save()
                raise Interrupted(received[0], self.step)
            if self.step == total:
                return
            count = min(most_steps, self._next_stop() - self.step)
            traced = profile and self.step > self._first_step
            with self._timing.profile(self._records[0].workdir / "profile") if traced else contextlib.nullcontext():
                seconds = self._advance(count)
            if self.step - count == self._first_step and not profile:
                self._programs.compile_measure_ahead()
                threading.Thread(target=_import_plot).start()
            profile = profile and not traced
            most_steps = max(1, min(8 * count, int(_WAKE_UP_SECONDS * count / seconds)))
            progress.advance(count)

    def _next_stop(self) -> int:
        """The next step at which a row, an evaluation or the end of an epoch is due."""
        every = (self._config.train.log_every, self._programs.steps_per_epoch, self._eval_steps)
        return min(self._programs.total_steps, *((self.step // n + 1) * n for n in every))

    def _advance(self, count: int) -> float:
        """Takes `count` steps and writes the training rows if they are due; returns the seconds it took."""
        # A copy: on the CPU what comes back is a view of a buffer that the step writes to.
        before = jax.tree.map(np.array, self._each("batch_stats")) if self.step == 0 else None
        with self._timing.clock("train") as clock:
            self._state = self._programs.advance(self._state, self.step, count)
            counters = self._each("counters")
        self.step += count
        if before is not None:
            for old, new, (_, skipped, _) in zip(before, self._each("batch_stats"), counters, strict=True):
                if not skipped:
                    _require_moved(old, new)
        for record, (step, _, in_a_row) in zip(self._records, counters, strict=True):
            if not record.stopped and in_a_row >= self._config.train.max_skipped_steps:
                self._diverged(record, int(step))
        if self.step == self._programs.total_steps or 0 in (
            self.step % self._config.train.log_every,
            self.step % self._programs.steps_per_epoch,
        ):
            self._write_rows([int(skipped) for _, skipped, _ in counters])
        return clock.seconds

    def _each(self, part: str) -> list[Any]:
        """A part of the state, of each record, on the host."""
        return self._programs.split(self._programs.fetch(self._state, part))

    def _write_rows(self, skipped_steps: Sequence[int]) -> None:
        rates = self._programs.split(jax.device_get(self._programs.learning_rate(self.step - 1)))
        for record, measured, skipped, rate in zip(
            self._records, self._each("metrics"), skipped_steps, rates, strict=True
        ):
            if not record.stopped:
                record.trained(self.step, measured, skipped, float(rate))
        self._state = self._programs.fresh_metrics(self._state)

    def _diverged(self, record: Record, step: int) -> None:
        """What becomes of a run whose last steps, up to `step`, were not finite: here, its end."""
        rate = float(self._programs.learning_rate(step - 1))
        raise RunError(
            f"{record.workdir}: got {self._config.train.max_skipped_steps} steps in a row whose loss or gradients "
            f"are not finite, up to step {step} at learning rate {rate:.3g}; expected finite ones. The last "
            f"good checkpoint is {self._checkpoints.latest()}. Lower optimizer.learning_rate in another --workdir."
        )

    def _evaluation_due(self) -> bool:
        due = self.step > 0 and self.step % self._eval_steps == 0
        done = all(record.is_evaluated(self.step) for record in self._active())
        return (due or self.step == self._programs.total_steps) and not done

    def _evaluate_and_save(self) -> list[dict[str, float]]:
        """The figures of every record, or of a stopped one nothing."""
        with self._timing.clock("evaluate"):
            measured = self._programs.split(self._programs.measure(self._state))
            results = [{} if record.stopped else figures(m) for record, m in zip(self._records, measured, strict=True)]
        for record in self._active():
            if not record.is_evaluated(self.step):
                record.evaluated(self.step, results[self._records.index(record)])
        self._save()
        return results

    def _save(self) -> None:
        with self._timing.clock("checkpoint"):
            for record in self._active():
                record.flush()  # the rows of a checkpoint are on the disk before it is
            self._checkpoints.save(self.step, self._programs.fetch(self._state), **self._described())

    def _described(self) -> dict[str, Any]:
        """What a checkpoint is saved with."""
        (record,) = self._records
        best = record.best_row([self.step, *self._checkpoints.steps()])
        return {"config": self._config.to_dict(), "best_step": best and best["step"], "rows": len(record.rows)}

    def _require_fit(self, meta: Mapping[str, Any]) -> None:
        self._records[0].require_fit(meta["config"], meta["step"], meta["rows"])

    def finish(self) -> dict[str, Any]:
        """Writes the picture, TensorBoard's hparams and the summary; prints the summary and returns it."""
        speed = self._timing.speed((self.step - self._first_step) * self._config.train.batch_size)
        plot_runs = _import_plot().plot_runs
        (record,) = self._records
        with self._timing.clock("checkpoint"):
            saved = [self.step, *self._checkpoints.steps()]
        picture = self._directory / "accuracy.png"
        record.flush()
        plot_runs([self._directory], picture)
        device = mesh.device_name(self._programs.devices)
        summary = record.finish(self.step, saved, self._timing.seconds(), device)
        results = {name: value for name, value in summary.items() if isinstance(value, int | float) and name != "seed"}
        console.table(
            [*results.items(), *speed.items(), ("seconds", summary["seconds"]["total"]), ("picture", picture)]
        )
        return summary


def _import_plot() -> ModuleType:
    """Half a second, of which nothing is left to wait for if it begins while the device works."""
    from vmapbn_flax.runs import pictures as plot

    return plot


def _require_moved(before: Any, after: Any) -> None:
    """Refuses running statistics that a step left where they were: batch norm is not training then."""
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if np.array_equal(old, new):
            raise RunError(
                f"batch_stats/{jax.tree_util.keystr(path, simple=True, separator='/')}: got the same values before "
                f"and after the first step; expected running statistics to move. Is the layer's input constant?"
            )
