"""Pictures of runs, from their `metrics.jsonl`."""

from collections.abc import Sequence
from pathlib import Path

from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_lines

# Distinct in grey print too: each run has a dash pattern and a marker of its own.
_STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1)), "v"), ((0, (1, 1)), "P")]


def plot_runs(workdirs: Sequence[Path], output: Path) -> None:
    """Draws test accuracy and training loss against steps, one line a run, into `output`.

    Raises:
      RunError: a workdir has no metrics to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        accuracy, loss = figure.subplots(1, 2)
        for i, workdir in enumerate(workdirs):
            rows = [row for _, row in read_lines(workdir / "metrics.jsonl")]
            if not rows:
                raise RunError(f"{workdir}: got no metrics.jsonl with rows; expected the workdir of a run.")
            line, marker = _STYLES[i % len(_STYLES)]
            label = workdir.resolve().name
            for axes, name in ((accuracy, "test_accuracy"), (loss, "train_loss")):
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                marks = {"marker": marker, "markersize": 4, "markevery": max(1, len(points) // 20)}
                axes.plot(*zip(*points, strict=True), linestyle=line, linewidth=1.4, label=label, **marks)
        accuracy.set(xlabel="step", ylabel="test accuracy")
        accuracy.yaxis.set_major_formatter("{x:.1%}")
        loss.set(xlabel="step", ylabel="training loss", yscale="log")
        for axes in (accuracy, loss):
            axes.legend()
        temporary = output.with_name(f".{output.name}")
        figure.savefig(temporary, dpi=150)
        temporary.replace(output)
