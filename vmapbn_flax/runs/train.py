"""Training one run: from its config and data to its summary."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clu import parameter_overview
from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.config import flat, validate, without_distributed
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.errors import RunError
from vmapbn_flax.multihost.processes import Processes, joined
from vmapbn_flax.runs.checkpoints import versions
from vmapbn_flax.runs.console import Progress, say, table
from vmapbn_flax.runs.finished import changes_of, finished
from vmapbn_flax.runs.loop import Loop, import_pictures
from vmapbn_flax.runs.record import Record
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.mesh import device_name, divide_cpu, solo_mesh
from vmapbn_flax.training.programs import Programs


def train(config: ConfigDict, path: Path, started: float | None = None) -> dict[str, Any]:
    """Trains, or resumes, the run in the workdir `path`, and returns its summary.

    Args:
      config: made from `vmapbn_flax.default_config()`.
      path: of the workdir; made if it does not exist. The README lists its files.
      started: `time.monotonic()` when the program started, for the summary; by default now.

    Raises:
      UsageError: the config or the data cannot be used.
      RunError: the workdir is in use, damaged or of another run; or training diverged.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    started = time.monotonic() if started is None else started
    validate(config)
    divide_cpu(config.mesh, sweep=False, processes=config.distributed.num_processes)
    with joined(**config.distributed) as processes:
        config, workdir = without_distributed(config), Workdir(path, writes=processes.first)
        processes.require_same(facts(config))
        if workdir.is_refreshed:
            raise RunError(f"{workdir}: got refreshed statistics, expected a run; train in {path.parent} instead")
        dataset = load_dataset(config.data)
        if processes.count > 1:
            processes.require_same({"data": dataset.fingerprint()})
        # The last check of the config: nothing is written before it.
        programs = Programs([config], dataset, solo_mesh(config.mesh))
        with contextlib.closing(programs), held(workdir, processes):
            return _train(config, workdir, dataset, programs, processes, started)


def facts(config: ConfigDict) -> dict[str, Any]:
    """What must be the same in every process before it loads data: the config and the packages."""
    fields = {f"config.{name}": value for name, value in flat(config).items()}
    return fields | {"packages": versions()}


@contextlib.contextmanager
def held(workdir: Workdir, processes: Processes) -> Iterator[None]:
    """Locks the workdir for `processes`; the first one holds the lock.

    Raises:
      RunError: see `Workdir.lock`; or not every process sees the same directory.
    """
    with contextlib.ExitStack() as stack:
        with processes.together() as agreement:
            if processes.first:
                stack.enter_context(workdir.lock())
                agreement.say(holder=workdir.holder)
        with processes.together():
            if workdir.holder != agreement.heard[0]["holder"]:
                raise RunError(
                    f"{workdir}: got another directory here than process 0 has there; expected one that every "
                    f"process sees. Put --workdir on a file system that they share."
                )
        yield


def _train(
    config: ConfigDict, workdir: Workdir, dataset: Dataset, programs: Programs, processes: Processes, started: float
) -> dict[str, Any]:
    """Trains the run in a locked workdir."""
    changes = changes_of(workdir, config)
    if summary := finished(workdir, changes, shown=processes.first):
        return summary
    record = Record(config, workdir, programs.selection)
    with signals.deferred() as received:
        loop = Loop([record], workdir.checkpoints, programs, config.train, processes, started)
        with contextlib.closing(loop):
            with processes.together():
                if processes.first:
                    _start(workdir, config, changes)
            if processes.first:
                _say_start(loop, dataset, programs, workdir, changes)
            with Progress(loop.step, programs.total_steps, shown=processes.first) as progress:
                loop.run(received, progress, on_divergence=lambda runs: _refuse(*runs[0], loop, programs))
            return _finish(loop, record, programs, processes)


def _start(workdir: Workdir, config: ConfigDict, changes: Sequence[str] | None) -> None:
    """Saves `config` in the workdir, if it has `changes` or is the first."""
    if changes != []:
        workdir.summary.unlink(missing_ok=True)  # before the config: from here on the run is not finished
        workdir.write(workdir.config, config.to_dict())


def _say_start(
    loop: Loop, dataset: Dataset, programs: Programs, workdir: Workdir, changes: Sequence[str] | None
) -> None:
    for change in changes or []:
        say(f"resuming with {change}")
    count = parameter_overview.count_parameters(loop.state.params)
    where = f"resuming at step {loop.step}" if loop.step else "starting"
    say(
        f"{workdir}: {where} of {programs.total_steps} steps, {count:,} parameters, "
        f"{dataset.name} ({len(dataset.train):,} training and {len(dataset.test):,} test examples"
        f"{', streamed' if dataset.streamed else ''}), on {programs.where()}"
    )


def _refuse(record: Record, step: int, loop: Loop, programs: Programs) -> NoReturn:
    """Ends a run that diverged at `step`."""
    (rate,) = programs.learning_rates(step - 1)
    saved = loop.saved_steps()
    good = record.workdir.checkpoints / str(saved[-1]) if saved else None
    raise RunError(
        f"{record.workdir}: got {record.config.train.max_skipped_steps} steps in a row whose loss or gradients "
        f"are not finite, up to step {step} at learning rate {rate:.3g}; expected finite ones. The last "
        f"good checkpoint is {good}. Lower optimizer.learning_rate in another --workdir."
    )


def _finish(loop: Loop, record: Record, programs: Programs, processes: Processes) -> dict[str, Any]:
    """Draws the picture, writes TensorBoard's hparams and the summary, prints the summary and returns it."""
    speed = loop.timing.speed((loop.step - loop.first_step) * record.config.train.batch_size)
    saved = loop.saved_steps()
    workdir = record.workdir
    with processes.together():
        record.flush()
        if processes.first:
            import_pictures().plot_runs([workdir.path], workdir.picture)
        summary = record.finish(loop.step, [loop.step, *saved], loop.timing.seconds(), device_name(programs.devices))
    if processes.first:
        figures = {k: v for k, v in summary.items() if isinstance(v, int | float) and k != "seed"}
        more = {"seconds": summary["seconds"]["total"], "picture": workdir.picture}
        table([*figures.items(), *speed.items(), *more.items()])
    return summary
