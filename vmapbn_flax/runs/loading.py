"""Loading the config and the state of a run from its workdir."""

from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from vmapbn_flax import networks
from vmapbn_flax.config import validate
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs.checkpoints import restore, saved_steps
from vmapbn_flax.runs.workdir import Workdir

State = TypeVar("State")


def load_config(workdir: Workdir, network: str | type | None = None) -> ConfigDict:
    """The config of the run in `workdir`.

    Args:
      network: the name of the run's network, or its class; needed for a module of one's own, since a workdir names no
        code to run. Of a class, the name in the config stays untrusted.

    Raises:
      RunError: the config is missing, damaged or a sweep's.
      UsageError: `network` is missing, or another one.
    """
    workdir.refuse_sweep()
    saved = workdir.read_config()
    model: dict[str, Any] = saved["model"] if isinstance(saved.get("model"), dict) else {}
    found = str(model.get("name", ""))
    if isinstance(network, type):
        networks.require_network(network, found)
        if found in networks.BUILT_IN:
            raise UsageError(f"network={network.__name__}: got a run of the network {found}; expected none")
        model["name"] = networks.untrusted(found)
    elif network is None:
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


def load_state(workdir: Workdir, step: int | None, template: State) -> State:
    """The state saved in `workdir` under `step`, by default the newest, as numpy arrays in the form of `template`.

    Raises:
      RunError: the checkpoint is missing, damaged, or of another model.
    """
    return restore(workdir.checkpoints, find_step(workdir.checkpoints, step), template)[0]


def find_step(directory: Path, step: int | None) -> int:
    """`step`, by default the newest of the checkpoints in `directory`.

    Raises:
      RunError: there is no such checkpoint.
    """
    steps = saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise RunError(f"{directory}: got steps {steps}, expected {wanted}; train the run, or choose one of those")
    return steps[-1] if step is None else step
