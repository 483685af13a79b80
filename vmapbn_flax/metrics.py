"""What a run measures (`clu.metrics` collections) and the only code that writes it down."""

import math
from collections.abc import Mapping
from pathlib import Path

import flax
import jax
import numpy as np
from clu import metrics

from vmapbn_flax.files import AppendLog


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Means over training examples."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Means over a data set, every example counted once."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


def compute(collection: metrics.Collection) -> dict[str, float]:
    """The collection's figures as numbers; NaN where nothing was counted."""
    with np.errstate(invalid="ignore"):
        return {name: float(value) for name, value in jax.device_get(collection).compute().items()}


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard event files in one directory.

    The methods are those of `clu.metric_writers.MetricWriter`, which itself needs TensorFlow. Rows after
    `resume_step` are dropped, so that a resumed run has one row per step.
    """

    def __init__(self, workdir: Path, resume_step: int):
        from vmapbn_flax.tensorboard import EventFile

        self._log = AppendLog(workdir / "metrics.jsonl")
        self.rows = self._log.cut_back(lambda row: row["step"] <= resume_step)
        self._events = EventFile(workdir, first_step=resume_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Appends one row; what is not finite is null in `metrics.jsonl`."""
        row = {"step": step, **{key: _finite(value) for key, value in scalars.items()}}
        self.rows.append(row)
        self._log.append(row)
        self._events.add_scalars(scalars, step)

    def write_hparams(self, hparams: Mapping[str, object], results: Mapping[str, float | None]) -> None:
        """Fills TensorBoard's hparams tab; a result of None is NaN there."""
        self._events.add_hparams(hparams, results)

    def flush(self) -> None:
        self._log.flush()
        self._events.flush()

    def close(self) -> None:
        self._log.close()
        self._events.close()


def _finite(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
