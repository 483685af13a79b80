"""Loading the config and the state of a run from its workdir."""

from ml_collections import ConfigDict

from vmapbn_flax import networks
from vmapbn_flax.config import validate
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs.checkpoints import restore, saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState


def load_config(workdir: Workdir, network: str | None = None) -> ConfigDict:
    """The config of the run in `workdir`.

    Args:
      network: the name of the run's network; needed for a module of one's own, since a workdir names no code to run.

    Raises:
      RunError: the config is missing, damaged or a sweep's.
      UsageError: `network` is missing, or another one.
    """
    workdir.refuse_sweep()
    saved = workdir.read_config()
    model = saved["model"] if isinstance(saved.get("model"), dict) else {}
    found = str(model.get("name", ""))
    if network is None:
        networks.refuse_untrusted(networks.untrusted(found))
    elif network != found:
        raise UsageError(f"--network={network}: got a run of the network {found}; expected that name or none")
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
