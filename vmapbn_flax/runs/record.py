"""What one run leaves in its workdir while it trains: its rows, its best evaluation, its summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vmapbn_flax.config import flat, resume_changes
from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.checkpoints import versions
from vmapbn_flax.runs.metric_writer import MetricWriter, finite
from vmapbn_flax.runs.selection import best_row
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.metrics import TrainMetrics, compute
from vmapbn_flax.training.watch import Percentiles


class Record:
    """The rows and the summary of one run, which may be one of several that train together.

    Every process has the records of its runs. Only where the workdir `writes` are the files written.

    Args:
      selection: the metric that the best evaluation has the most of.
      swept: the names of the fields in which a sweep's member differs from others.

    Attributes:
      name: of a sweep's member; "" for a solo run.
      config, workdir: of the run.
      rows: the training and evaluation rows so far.
      diverged: whether the run has diverged; nothing more is written then.
    """

    def __init__(self, config: ConfigDict, workdir: Workdir, selection: str, name: str = "", swept: Sequence[str] = ()):
        self.config, self.workdir, self.name = config, workdir, name
        self.rows: list[dict[str, Any]] = []
        self.diverged = False
        self._selection, self._swept = selection, swept
        self._writer: MetricWriter | None = None

    def open(self, step: int) -> None:
        """Reads the rows of a run that is at `step`, and starts to write, with later rows cut off.

        Of a diverged run, nothing more is written.
        """
        if self.workdir.writes and not self.diverged:
            self._writer = MetricWriter(self.workdir, step)
        self.rows = [row for row in self.workdir.read_rows() if row["step"] <= step]

    def described(self) -> dict[str, Any]:
        """What a checkpoint saves about the run."""
        return {"name": self.name, "config": self.config.to_dict(), "rows": len(self.rows)}

    def require_fit(self, saved: Mapping[str, Any], step: int) -> None:
        """Refuses to continue from a checkpoint of another run, or one without its rows.

        Args:
          saved: what `described` returned when the checkpoint was saved.
          step: of the checkpoint.

        Raises:
          RunError: the config or the rows do not fit the checkpoint.
        """
        resume_changes(saved["config"], self.config)
        count = sum(row["step"] <= step for row in self.workdir.read_rows())
        if count < saved["rows"]:
            raise RunError(
                f"{self.workdir.metrics}: got {count} rows up to step {step}, expected the {saved['rows']} that were "
                f"there when the checkpoint was saved. Put the file back, or start afresh in another --workdir."
            )

    def trained(self, step: int, metrics: TrainMetrics, skipped_steps: int, learning_rate: float) -> None:
        """Writes a training row."""
        figures = {f"train_{name}": value for name, value in compute(metrics).items()}
        if skipped_steps:
            figures["skipped_steps"] = skipped_steps
        self._write(step, {**figures, "learning_rate": learning_rate})

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes an evaluation row."""
        self._write(step, figures)

    def watched(self, step: int, percentiles: Percentiles) -> None:
        """Writes TensorBoard's histograms of what `config.train.watch` names."""
        if self._writer and percentiles:
            self._writer.write_histograms(step, percentiles)

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **finite(figures)})
        if self._writer:
            self._writer.write_scalars(step, figures)

    def is_evaluated(self, step: int) -> bool:
        return bool(self.rows) and self.rows[-1]["step"] == step and self._selection in self.rows[-1]

    def flush(self) -> None:
        """Returns when the rows are on the disk."""
        if self._writer:
            self._writer.flush()

    def best_row(self, saved: Sequence[int]) -> dict[str, Any] | None:
        """The best evaluation at one of the steps `saved`, by the selection metric; None without any."""
        return best_row(self.rows, self._selection, saved)

    def write_hparams(self, *, failed: bool = False) -> None:
        """Writes TensorBoard's hparams; the run may have `failed`."""
        if self._writer:
            metrics = [f"{split}_{name}" for split in ("validation", "test") for name in ("accuracy", "loss")]
            self._writer.write_hparams(flat(self.config), swept=self._swept, metrics=metrics, failed=failed)

    def finish(self, step: int, saved: Sequence[int], seconds: Mapping[str, float], device: str) -> dict[str, Any]:
        """Writes TensorBoard's hparams and the summary; returns the summary."""
        best = self.best_row(saved)
        assert best is not None, "the last step is evaluated"
        evaluation = {name: value for name, value in self.rows[-1].items() if name != "step"}
        self.write_hparams()
        self.flush()
        summary = {
            "step": step,
            **evaluation,
            "best_step": best["step"],
            "best_metric": best[self._selection],
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "seed": self.config.seed,
            "device": device,
            "versions": versions(),
        }
        self.workdir.write(self.workdir.summary, summary)
        return summary
