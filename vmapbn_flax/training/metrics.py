"""The metrics of training and evaluation: `clu.metrics` collections."""

import flax
import jax
import numpy as np
from clu import metrics


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Means over training examples."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Accuracy


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Means over a data set, every example counted once."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Accuracy


def compute(collection: metrics.Collection) -> dict[str, float]:
    """The figures of `collection` as numbers; NaN where no example was counted."""
    with np.errstate(invalid="ignore"):
        return {name: float(value) for name, value in jax.device_get(collection).compute().items()}
