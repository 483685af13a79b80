"""What one run leaves in its workdir while it trains: its rows, its best evaluation, its summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from vmapbn_flax.runs.metric_writer import MetricWriter

from vmapbn_flax.config import flat, resume_changes
from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_lines, write_json
from vmapbn_flax.runs.checkpoints import versions
from vmapbn_flax.training.metrics import TrainMetrics, compute


class Record:
    """The rows and the summary of one run, which may be one of many that train together.

    Attributes:
      name: of a sweep's member; "" for a run of its own.
      config, workdir: of the run.
      stopped: whether it has diverged, and nothing more is to be written.
    """

    def __init__(self, config: ConfigDict, workdir: Path, selection: str, name: str = ""):
        self.config, self.workdir, self.name = config, workdir, name
        self.stopped = False
        self._selection = selection
        self._writer: MetricWriter | None = None

    def open(self, step: int) -> None:
        """Opens the files of a run that is at `step`, without what is later in them."""
        self._writer = MetricWriter(self.workdir, step)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._writer.rows if self._writer else []

    def require_fit(self, config: Mapping[str, Any], step: int, rows: int) -> None:
        """Refuses to continue from a checkpoint of another run, or one without its rows.

        Args:
          config: that the checkpoint was saved with.
          step: of the checkpoint.
          rows: how many there were when it was saved.
        """
        resume_changes(config, self.config)
        path = self.workdir / "metrics.jsonl"
        count = sum(row["step"] <= step for _, row in read_lines(path))
        if count < rows:
            raise RunError(
                f"{path}: got {count} rows up to step {step}, expected the {rows} that were there when "
                f"its checkpoint was saved. Put the file back, or start afresh in another --workdir."
            )

    def trained(self, step: int, metrics: TrainMetrics, skipped_steps: int, learning_rate: float) -> None:
        """Writes a training row."""
        figures = {f"train_{name}": value for name, value in compute(metrics).items()}
        if skipped_steps:
            figures["skipped_steps"] = skipped_steps
        self._writer.write_scalars(step, {**figures, "learning_rate": learning_rate})

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes an evaluation row."""
        self._writer.write_scalars(step, figures)

    def is_evaluated(self, step: int) -> bool:
        return bool(self.rows) and self.rows[-1]["step"] == step and self._selection in self.rows[-1]

    def flush(self) -> None:
        """Returns once the rows are on the disk."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def best_row(self, saved: Sequence[int]) -> dict[str, Any] | None:
        """The evaluation that selection prefers of those at one of the steps `saved`.

        The latest of equals; one that is not finite comes last.
        """
        name = self._selection
        rows = [row for row in self.rows if name in row and row["step"] in saved]
        return max(rows, key=lambda row: (row[name] is not None, row[name] or 0, row["step"]), default=None)

    def finish(self, step: int, saved: Sequence[int], seconds: Mapping[str, float], device: str) -> dict[str, Any]:
        """Writes the last evaluation's figures to TensorBoard's hparams and the summary, which it returns."""
        best = self.best_row(saved)
        evaluation = {name: value for name, value in self.rows[-1].items() if name != "step"}
        results = {f"hparam/{name}": value for name, value in evaluation.items() if not name.endswith("_count")}
        self._writer.write_hparams(flat(self.config), results)
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
        write_json(self.workdir / "summary.json", summary)
        return summary
