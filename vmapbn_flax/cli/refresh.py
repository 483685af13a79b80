"""`vmapbn-flax refresh`: running statistics recomputed exactly, over the whole training set."""

import argparse
import contextlib
import sys
from pathlib import Path

from vmapbn_flax.cli import environment
from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import remove_directory
from vmapbn_flax.runs.checkpoints import Checkpoints
from vmapbn_flax.runs.console import table
from vmapbn_flax.runs.loading import load_config, load_state
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints the figures before and after."""
    environment.import_from_here()
    figures = refresh(arguments.workdir, arguments.step, arguments.network)
    rows = [(name, figures["before"][name], figures["after"][name]) for name in figures["before"]]
    table(rows, ("", "running statistics", "refreshed"), file=sys.stdout)
    return 0


def refresh(path: Path, step: int | None = None, network: str | None = None) -> dict[str, dict[str, float | int]]:
    """Recomputes the statistics of a checkpoint at its weights, and evaluates before and after.

    Each layer's mean and variance become those of its inputs over the whole training set, as if that were one batch.
    The images have to fit in memory; the activations are those of a batch of `train.eval_batch_size`.

    The result is a workdir of its own, `<path>/refreshed/`, which `evaluate` takes and `train` refuses. `network` is as
    in `load_config`.

    Raises:
      RunError: the checkpoint is missing or damaged.
      UsageError: the run has no batch norm, or its data set is larger than its memory limit.
    """
    workdir = Workdir(path)
    config = load_config(workdir, network)
    if config.model.norm == "none":
        raise UsageError(f"{workdir}: got a run without batch norm, expected one that has statistics to refresh")
    dataset = load_dataset(config.data)
    if dataset.streamed:
        raise UsageError(
            f"config.data.memory_limit: got {config.data.memory_limit}, expected at least "
            f"{dataset.gigabytes}, for {dataset.name}, which has to lie in memory. "
            f"Where there is memory, raise it in {workdir.config}."
        )
    programs = Programs([config], dataset)
    state = load_state(workdir, step, programs.template())
    refreshed = state.replace(batch_stats=programs.population_statistics(state))
    figures = {"before": programs.evaluate(state), "after": programs.evaluate(refreshed)}

    output = workdir.refreshed
    remove_directory(output.path)
    # First: if this ends early, training must not take the rest for a run.
    output.write(output.refresh, {"step": int(state.step), **figures})
    output.write(output.config, config.to_dict())
    with contextlib.closing(Checkpoints(output.checkpoints)) as checkpoints:
        meta = {"data": programs.described, "runs": [{"name": "", "config": config.to_dict(), "rows": 0}]}
        checkpoints.save(int(state.step), programs.snapshot(refreshed), meta)
    return figures
