"""The numbers of a run that its compiled programs take as arguments."""

from typing import Any

from ml_collections import ConfigDict

from vmapbn_flax.config import flat
from vmapbn_flax.fields import FIELDS

# The traced fields of a config by dotted name, such as `hyper["optimizer.learning_rate"]`. The values are scalars, or
# around a vmap arrays with one entry a member. JAX may rebuild the dict with other leaves.
Hyperparameters = dict[str, Any]

_FOREVER = 2**31 - 1  # steps, the most that an int32 holds


def steps_in(epochs: float, steps_per_epoch: int) -> int:
    """A number of epochs, which may be a fraction, as a whole number of steps."""
    return round(epochs * steps_per_epoch)


def make_hyperparameters(config: ConfigDict, steps_per_epoch: int) -> Hyperparameters:
    """The traced fields of `config`. Epochs become steps, as in `optimizer.warmup_steps`."""
    values, hyper = flat(config), {}
    for name, field in FIELDS.items():
        if field.traced is None:
            continue
        value = values[name]
        if name.endswith("_epochs"):
            name, value = name.replace("_epochs", "_steps"), min(steps_in(value, steps_per_epoch), _FOREVER)
        hyper[name] = field.traced(value)
    return hyper
