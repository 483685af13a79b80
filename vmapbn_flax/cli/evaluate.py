"""`python -m vmapbn_flax evaluate`: loss and accuracy of a checkpoint, in either variant of the network."""

from pathlib import Path

from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs.loading import load_config, load_state
from vmapbn_flax.training.programs import Programs


def evaluate(workdir: Path, step: int | None = None, norm: str | None = None) -> dict[str, float | int]:
    """Evaluates the checkpoint of `step`, by default the newest, on the validation and test splits.

    Args:
      workdir: of a run.
      step: one of the run's checkpoints.
      norm: "vmap" or "batched", for the other variant of a network with batch norm.

    Raises:
      RunError: `workdir` has no such checkpoint, or it is damaged.
      UsageError: the run has no batch norm and `norm` is given.
    """
    config = load_config(workdir)
    if norm is not None:
        if config.model.norm == "none":
            raise UsageError(f"--norm={norm}: got a run without batch norm, {workdir}, expected one with it")
        config.model.norm = norm
    programs = Programs([config], load_dataset(config.data))
    state = load_state(workdir, step, programs)
    return {"step": int(state.step), **programs.evaluate(state)}
