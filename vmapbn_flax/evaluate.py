"""`python -m vmapbn_flax evaluate`: loss and accuracy of a checkpoint, in either variant of the network."""

from pathlib import Path

from ml_collections import ConfigDict

from vmapbn_flax.checkpoint import restore, saved_steps
from vmapbn_flax.config import validate
from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import read_json
from vmapbn_flax.programs import Programs
from vmapbn_flax.state import TrainState


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
    data = config.data
    programs = Programs(config, load_dataset(data.name, data.dir, data.validation_size, data.memory_limit))
    state = load_state(workdir, step, programs)
    return {"step": int(state.step), **programs.evaluate(state)}


def load_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      RunError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    saved = read_json(path)
    try:
        config = ConfigDict(saved)
        validate(config)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise RunError(f"{path}: got a config that does not fit ({error}), expected one that a run wrote") from None
    return config


def load_state(workdir: Path, step: int | None, programs: Programs) -> TrainState:
    """The state of `step`, by default the newest, from the checkpoints in `workdir`."""
    directory = workdir / "checkpoints"
    steps = saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise RunError(f"{directory}: got steps {steps}, expected {wanted}; train the run, or choose one of those")
    return restore(directory, steps[-1] if step is None else step, programs.template())
