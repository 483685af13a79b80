"""What `train` and `mask` may be, in the layer and in the lift."""

from typing import Any

import jax
import numpy as np


def require_bool(train: Any, label: str, name: str = "train") -> None:
    """Refuses a `train` that Python would take for true or false, such as "False", or could not, such as a traced one.

    Raises:
      TypeError: `train`, which the caller calls `name`, is not a bool of Python or numpy.
    """
    if isinstance(train, jax.core.Tracer):
        raise TypeError(
            f"{label}: got a traced {name}; expected True or False, which decides what is traced. Close over it, name "
            f"it in static_argnames of jax.jit, or make it an attribute of the layer."
        )
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"{label}: got {name}={train!r}; expected True or False.")


def merge_train(attribute: bool | None, argument: bool | None, label: str) -> bool:
    """The `train` of a layer, which is said once: in the call, or as its attribute.

    Raises:
      TypeError: it is said nowhere or is not a bool.
      ValueError: it is said twice.
    """
    if attribute is not None and argument is not None:
        raise ValueError(
            f"{label}: got train={argument!r} in the call and train={attribute!r} as its attribute; expected one."
        )
    train = attribute if argument is None else argument
    require_bool(train, label)
    return bool(train)


def require_weights(mask: Any, label: str) -> None:
    """Refuses a `mask` with impossible weights, unless it is traced or other processes hold a part of it.

    Raises:
      ValueError: a weight is negative, infinite or NaN, or they are too large for a sum in float32.
    """
    if isinstance(mask, jax.core.Tracer) or not getattr(mask, "is_fully_addressable", True):
        return
    weights = np.asarray(mask, np.float64)
    wrong = weights[~((weights >= 0) & (weights < np.inf))]
    if wrong.size:
        raise ValueError(f"{label}: got a mask with the weight {wrong[0]}; expected finite weights of zero or more.")
    if weights.sum() > np.finfo(np.float32).max:
        raise ValueError(
            f"{label}: got a mask whose weights sum to {weights.sum():.2g}; expected a sum below 3.4e38, the largest "
            f"float32. Divide them by a number: only their ratios matter."
        )
