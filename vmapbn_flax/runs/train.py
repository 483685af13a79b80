"""Training one run: the one module that sees everything, from config and data to files and signals."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.config import resume_changes, validate
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.errors import RunError
from vmapbn_flax.files import REFRESHED, read_json, workdir_lock
from vmapbn_flax.multihost import processes
from vmapbn_flax.runs import console
from vmapbn_flax.runs.loop import Run
from vmapbn_flax.runs.record import Record
from vmapbn_flax.sweeps.ledger import refuse_unfinished_member
from vmapbn_flax.training.mesh import divide_cpu, solo_mesh
from vmapbn_flax.training.programs import Programs


def train(config: ConfigDict, workdir: Path, started: float | None = None) -> dict[str, Any]:
    """Trains, or resumes, the run in `workdir`, and returns its summary.

    Args:
      config: what `configs/default.py` makes.
      workdir: made if need be; the README says what it then holds.
      started: `time.monotonic()` when the program started, for the summary; by default now.

    Returns:
      the summary; nothing in a process that is not the first of its run.

    Raises:
      UsageError: the config or the data cannot be used.
      RunError: the workdir is in use, damaged or of another run; or training diverged.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    started = time.monotonic() if started is None else started
    validate(config)
    divide_cpu(config, sweep=False)
    with processes.joined(config) as group:
        config = group.config
        with group.together():
            refuse_unfinished_member(workdir)
            if (workdir / REFRESHED).exists():
                raise RunError(
                    f"{workdir}: got refreshed statistics, expected a run; train in {workdir.parent} instead"
                )
            data = config.data
            dataset = load_dataset(data.name, data.dir, data.validation_size, data.memory_limit)
            # The last to find fault with the config: nothing is written before.
            programs = Programs(config, dataset, solo_mesh(config))
        with contextlib.closing(programs):
            if group.follows:
                group.follow(programs)
                return {}
            received: list[int] = []
            with group.led(received) as leader, workdir_lock(workdir):
                return _train(config, workdir, dataset, leader.of_all(programs), received, started)


def _train(
    config: ConfigDict, workdir: Path, dataset: Dataset, programs: Programs, received: list[int], started: float
) -> dict[str, Any]:
    """Trains the run in a workdir that is locked; a signal in `received` stops it."""
    saved = workdir / "config.json"
    changes = resume_changes(read_json(saved), config) if saved.exists() else None
    if summary := _finished(workdir, changes):
        console.say(f"{workdir}: finished at step {summary['step']}; a larger train.num_epochs continues it")
        return summary
    record = Record(config, workdir, programs.selection)
    with signals.deferred(received), contextlib.closing(Run([record], workdir, programs, started)) as run:
        run.say_start(dataset, changes)
        with console.Progress(run.step, programs.total_steps) as progress:
            run.to_end(received, progress)
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
