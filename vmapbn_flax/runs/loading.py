"""Loading the config and the state of a run from its workdir."""

from ml_collections import ConfigDict

from vmapbn_flax.config import validate
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs.checkpoints import restore, saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState


def load_config(workdir: Workdir) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      RunError: the config is missing or damaged.
    """
    saved = workdir.read_config()
    try:
        config = ConfigDict(saved)
        validate(config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise RunError(
            f"{workdir.config}: got a config that does not fit ({error}), expected one that a run wrote"
        ) from None
    return config


def load_state(workdir: Workdir, step: int | None, programs: Programs) -> TrainState:
    """The state saved in `workdir` under `step`, by default the newest, as numpy arrays.

    Raises:
      RunError: the checkpoint is missing, damaged, or of another model.
    """
    directory = workdir.checkpoints
    steps = saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise RunError(f"{directory}: got steps {steps}, expected {wanted}; train the run, or choose one of those")
    return restore(directory, steps[-1] if step is None else step, programs.template())[0]
