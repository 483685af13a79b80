"""What `train` and `mask` may be, in the layer and in the lift."""

from typing import Any

import jax
import numpy as np


def require_bool(train: Any, label: str) -> None:
    """Refuses a `train` that Python would take for true or false, such as "False", or could not, such as a traced one.

    Raises:
      TypeError: `train` is not a bool of Python or numpy.
    """
    if isinstance(train, jax.core.Tracer):
        raise TypeError(
            f"{label}: got a traced train; expected True or False, which decides what is traced. Close over it, or "
            f"name it in static_argnames of jax.jit."
        )
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"{label}: got train={train!r}; expected True or False.")


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
