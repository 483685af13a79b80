"""The training loop: the one module that sees everything, from config and data to files and signals."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from vmapbn_flax import console, signals
from vmapbn_flax.checkpoint import Checkpoints, restore_latest, versions
from vmapbn_flax.config import flat, resume_changes, validate
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.errors import Interrupted, RunError
from vmapbn_flax.files import REFRESHED, read_json, read_lines, workdir_lock, write_json
from vmapbn_flax.metrics import MetricWriter, TrainMetrics, compute
from vmapbn_flax.programs import Programs
from vmapbn_flax.state import steps_in

_WAKE_UP_SECONDS = 1.0  # the longest that a signal or the progress bar waits for the device


def train(config: ConfigDict, workdir: Path, started: float | None = None) -> dict[str, Any]:
    """Trains, or resumes, the run in `workdir`, and returns its summary.

    Args:
      config: what `configs/default.py` makes.
      workdir: made if need be; the README says what it then holds.
      started: `time.monotonic()` when the program started, for the summary; by default now.

    Raises:
      UsageError: the config or the data cannot be used.
      RunError: the workdir is in use, damaged or of another run; or training diverged.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    started = time.monotonic() if started is None else started
    validate(config)
    if (workdir / REFRESHED).exists():
        raise RunError(f"{workdir}: got refreshed statistics, expected a run; train in {workdir.parent} instead")
    dataset = load_dataset(config.data.name, config.data.dir, config.data.validation_size)
    programs = Programs(config, dataset)  # the last to find fault with the config: nothing is written before
    with workdir_lock(workdir):
        saved = workdir / "config.json"
        changes = resume_changes(read_json(saved), config) if saved.exists() else None
        if summary := _finished(workdir, changes):
            console.say(f"{workdir}: finished at step {summary['step']}; a larger train.num_epochs continues it")
            return summary
        with signals.deferred() as received, contextlib.closing(Run(config, workdir, programs, started)) as run:
            run.say_start(dataset, changes)
            run.to_end(received)
            return run.finish()


def _finished(workdir: Path, changes: Sequence[str] | None) -> dict[str, Any] | None:
    """The summary of the run in `workdir`, if there is one that `changes` of its config leave valid."""
    path = workdir / "summary.json"
    if changes is None or not path.exists() or any("train.num_epochs" in change for change in changes):
        return None
    summary = read_json(path)
    if not isinstance(summary.get("step"), int):
        raise RunError(f"{path}: got no step in it, expected what a finished run wrote there. Remove it and run again.")
    return summary


class Run:
    """One run, from its newest checkpoint to its end.

    Raises:
      RunError: the checkpoints in `workdir` are damaged or of another run.
    """

    def __init__(self, config: ConfigDict, workdir: Path, programs: Programs, started: float):
        self._config, self._workdir, self._programs, self._started = config, workdir, programs, started
        self._seconds: dict[str, float] = defaultdict(float)
        self._eval_steps = max(1, steps_in(config.train.eval_every, programs.steps_per_epoch))

        restored = restore_latest(workdir / "checkpoints", programs.template())
        if restored is not None:
            _require_fit(workdir, restored[1], config, programs.total_steps)
        self._state = programs.create() if restored is None else jax.device_put(restored[0])
        self._step = int(self._state.step)
        self._checkpoints = Checkpoints(workdir / "checkpoints")
        self._writer = MetricWriter(workdir, self._step)

    def say_start(self, dataset: Dataset, changes: Sequence[str] | None) -> None:
        """Says what starts, and makes the config that of the workdir: `changes` to the one there, if any."""
        for change in changes or []:
            console.say(f"resuming with {change}")
        if changes != []:
            (self._workdir / "summary.json").unlink(missing_ok=True)  # first: from here on the run is not finished
            write_json(self._workdir / "config.json", self._config.to_dict())
        count = parameter_overview.count_parameters(self._state.params)
        where = f"resuming at step {self._step}" if self._step else "starting"
        console.say(
            f"{self._workdir}: {where} of {self._programs.total_steps} steps, {count:,} parameters, "
            f"{dataset.name} ({len(dataset.train):,} training and {len(dataset.test):,} test examples), "
            f"on {console.device_name()}"
        )

    def close(self) -> None:
        """Waits for the save in flight; every way out leads here."""
        try:
            self._checkpoints.close()
        finally:
            self._writer.close()

    def to_end(self, received: Sequence[int]) -> None:
        """Steps, rows, evaluations and checkpoints up to the last step, or until a signal is `received`.

        Raises:
          RunError: training diverged, or the first step left a running statistic where it was.
          Interrupted: a signal arrived.
        """
        programs, total = self._programs, self._programs.total_steps
        self._seconds["startup"] = time.monotonic() - self._started - programs.compile_seconds
        most_steps = 1  # at first, for a look at what a step does to the statistics
        with console.Progress(self._step, total) as progress:
            while True:
                if self._evaluation_due():
                    progress.evaluated(self._step, self._evaluate_and_save())
                if received:
                    self._save()
                    raise Interrupted(received[0], self._step)
                if self._step == total:
                    return
                count = min(most_steps, self._next_stop() - self._step)
                seconds = self._advance(count)
                most_steps = max(1, min(8 * count, int(_WAKE_UP_SECONDS * count / seconds)))
                progress.advance(count)

    def _next_stop(self) -> int:
        """The next step at which a row, an evaluation or the end of an epoch is due."""
        every = (self._config.train.log_every, self._programs.steps_per_epoch, self._eval_steps)
        return min(self._programs.total_steps, *((self._step // n + 1) * n for n in every))

    def _advance(self, count: int) -> float:
        """Takes `count` steps and writes the training row if one is due; returns the seconds it took."""
        before = jax.tree.map(np.array, self._state.batch_stats) if self._step == 0 else None
        with self._clock("train") as clock:
            self._state = self._programs.advance(self._state, self._step, count)
            self._step = int(self._state.step)
        if self._state.skipped_in_a_row >= self._config.train.max_skipped_steps:
            raise self._diverged()
        if before is not None and not self._state.skipped_steps:
            _require_moved(before, self._state.batch_stats)
        if self._step == self._programs.total_steps or 0 in (
            self._step % self._config.train.log_every,
            self._step % self._programs.steps_per_epoch,
        ):
            self._write_row()
        return clock.seconds

    def _write_row(self) -> None:
        figures = {f"train_{name}": value for name, value in compute(self._state.metrics).items()}
        if self._state.skipped_steps:
            figures["skipped_steps"] = int(self._state.skipped_steps)
        rate = self._programs.learning_rate(self._step - 1)
        self._writer.write_scalars(self._step, {**figures, "learning_rate": rate})
        self._state = self._state.replace(metrics=TrainMetrics.empty())

    def _diverged(self) -> RunError:
        rate = self._programs.learning_rate(self._step - 1)
        return RunError(
            f"{self._workdir}: got {self._config.train.max_skipped_steps} steps in a row whose loss or gradients "
            f"are not finite, up to step {self._step} at learning rate {rate:.3g}; expected finite ones. The last "
            f"good checkpoint is {self._checkpoints.latest()}. Lower optimizer.learning_rate in another --workdir."
        )

    def _evaluation_due(self) -> bool:
        due = self._step > 0 and self._step % self._eval_steps == 0
        done = bool(self._writer.rows) and self._writer.rows[-1]["step"] == self._step
        done = done and self._programs.selection in self._writer.rows[-1]
        return (due or self._step == self._programs.total_steps) and not done

    def _evaluate_and_save(self) -> dict[str, float]:
        with self._clock("evaluate"):
            figures = self._programs.evaluate(self._state)
        self._writer.write_scalars(self._step, figures)
        self._save()
        return figures

    def _save(self) -> None:
        with self._clock("checkpoint"):
            self._writer.flush()  # the rows of a checkpoint are on the disk before it is
            best, rows = self._best_row(), len(self._writer.rows)
            self._checkpoints.save(self._step, self._state, self._config.to_dict(), best and best["step"], rows)

    def finish(self) -> dict[str, Any]:
        """Writes the picture, TensorBoard's hparams and the summary; prints the summary and returns it."""
        from vmapbn_flax.plot import plot_runs

        with self._clock("checkpoint"):
            best = self._best_row()
        evaluation = {name: value for name, value in self._writer.rows[-1].items() if name != "step"}
        results = {"step": self._step, **evaluation}
        results |= {"best_step": best["step"], "best_metric": best[self._programs.selection]}
        self._writer.write_hparams(flat(self._config), {f"hparam/{k}": v for k, v in evaluation.items()})
        picture = self._workdir / "accuracy.png"
        plot_runs([self._workdir], picture)
        seconds = {"compile": self._programs.compile_seconds, **self._seconds}
        seconds["total"] = time.monotonic() - self._started
        summary = {
            **results,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "seed": self._config.seed,
            "device": console.device_name(),
            "versions": versions(),
        }
        write_json(self._workdir / "summary.json", summary)
        console.table([*results.items(), ("seconds", seconds["total"]), ("picture", picture)])
        return summary

    def _best_row(self) -> dict[str, Any] | None:
        """The evaluation that selection prefers of those with a checkpoint, this step's own included.

        The latest of equals; one that is not finite comes last.
        """
        name, saved = self._programs.selection, {self._step, *self._checkpoints.steps()}
        rows = [row for row in self._writer.rows if name in row and row["step"] in saved]
        return max(rows, key=lambda row: (row[name] is not None, row[name] or 0, row["step"]), default=None)

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator["_Clock"]:
        """Adds the seconds of its block to `name`, without those spent compiling."""
        clock, started, compiled = _Clock(), time.monotonic(), self._programs.compile_seconds
        yield clock
        clock.seconds = time.monotonic() - started - (self._programs.compile_seconds - compiled)
        self._seconds[name] += clock.seconds


class _Clock:
    seconds = 0.0


def _require_fit(workdir: Path, meta: Mapping[str, Any], config: ConfigDict, total_steps: int) -> None:
    """Refuses to continue from a checkpoint, saved with `meta`, of another run, or without its rows."""
    resume_changes(meta["config"], config)
    if meta["step"] > total_steps:
        raise RunError(
            f"{workdir}: got a checkpoint of step {meta['step']}, expected at most the {total_steps} of this run: its "
            f"data set has shrunk. Use the data.dir it was made with, or another --workdir."
        )
    path = workdir / "metrics.jsonl"
    count = sum(row["step"] <= meta["step"] for _, row in read_lines(path))
    if count < meta["rows"]:
        raise RunError(
            f"{path}: got {count} rows up to step {meta['step']}, expected the {meta['rows']} that were there when "
            f"its checkpoint was saved. Put the file back, or start afresh in another --workdir."
        )


def _require_moved(before: Any, after: Any) -> None:
    """Refuses running statistics that a step left where they were: batch norm is not training then."""
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if np.array_equal(old, new):
            raise RunError(
                f"batch_stats/{jax.tree_util.keystr(path, simple=True, separator='/')}: got the same values before "
                f"and after the first step; expected running statistics to move. Is the layer's input constant?"
            )
