"""`vmapbn-flax evaluate`: loss and accuracy of a checkpoint, in either variant of the network."""

import argparse
from pathlib import Path

from vmapbn_flax.cli import environment
from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs.loading import load_config, load_state
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints the figures of `evaluate`."""
    environment.import_from_here()
    for name, value in evaluate(arguments.workdir, arguments.step, arguments.norm, arguments.network).items():
        print(name, value)
    return 0


def evaluate(
    workdir: Path, step: int | None = None, norm: str | None = None, network: str | None = None
) -> dict[str, float | int]:
    """Evaluates the checkpoint of `step`, by default the newest, on the validation and test splits.

    Args:
      workdir: of a run.
      step: of one of the run's checkpoints.
      norm: "vmap" or "batched", for the other variant of a network with batch norm.
      network: as in `load_config`.

    Raises:
      RunError: the checkpoint is missing or damaged.
      UsageError: the run has no batch norm and `norm` is given.
    """
    run_workdir = Workdir(workdir)
    config = load_config(run_workdir, network)
    if norm is not None:
        if config.model.norm == "none":
            raise UsageError(f"--norm={norm}: got a run without batch norm, {workdir}, expected one with it")
        config.model.norm = norm
    programs = Programs([config], load_dataset(config.data))
    state = load_state(run_workdir, step, programs.template())
    return {"step": int(state.step), **programs.evaluate(state)}
