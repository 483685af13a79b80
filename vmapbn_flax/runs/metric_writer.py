"""The one place that writes the figures of a run."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vmapbn_flax.files import AppendLog
from vmapbn_flax.runs.workdir import Workdir


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard event files in one workdir.

    The methods are those of `clu.metric_writers.MetricWriter`, which itself needs TensorFlow. Rows after
    `resume_step` are dropped, so that a resumed run has one row per step.
    """

    def __init__(self, workdir: Workdir, resume_step: int):
        from vmapbn_flax.runs.tensorboard import EventFile  # slow: imported while the device compiles

        self._log = AppendLog(workdir.metrics)
        self._log.cut_back(lambda row: row["step"] <= resume_step)
        self._events = EventFile(workdir.path, first_step=resume_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Appends one row; values that are not finite are null in `metrics.jsonl`."""
        self._log.append({"step": step, **finite(scalars)})
        self._events.add_scalars(scalars, step)

    def write_histograms(self, step: int, percentiles: Mapping[str, np.ndarray]) -> None:
        """Fills TensorBoard's tabs of distributions and histograms; each has the percentiles 0 to 100."""
        self._events.add_histograms(percentiles, step)

    def write_hparams(
        self, hparams: Mapping[str, object], *, swept: Sequence[str], metrics: Sequence[str], failed: bool
    ) -> None:
        """Fills the run's row in TensorBoard's hparams tab; the run may have `failed`.

        Of a sweep's member, the columns that come first are the hparams `swept` and the scalars `metrics`.
        """
        self._events.add_hparams(hparams, swept=swept, metrics=metrics, failed=failed)

    def flush(self) -> None:
        self._log.flush()
        self._events.flush()


def finite(scalars: Mapping[str, float | int]) -> dict[str, float | int | None]:
    """`scalars` with None in place of values that are not finite."""
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}
