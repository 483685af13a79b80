"""The metrics of training and evaluation: `clu.metrics` collections."""

from collections.abc import Mapping

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


def figures(measured: Mapping[str, EvalMetrics]) -> dict[str, float]:
    """Loss, accuracy and number of examples of each split."""
    results: dict[str, float] = {}
    for name, found in measured.items():
        results |= {f"{name}_{key}": value for key, value in compute(found).items()}
        results[f"{name}_count"] = int(found.loss.count)
    return results
