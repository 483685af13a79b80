"""Pictures of runs, from their `metrics.jsonl`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import write_whole
from vmapbn_flax.runs.workdir import Workdir

# Distinct in grey print too: each run has a dash pattern and a marker of its own.
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1)), "v"), ((0, (1, 1)), "P")]

PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")  # of a tick, with the digits it needs

_ACCURACIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)


def plot_runs(workdirs: Sequence[Path], output: Path) -> None:
    """Draws test accuracy and training loss against steps, one line a run, into `output`.

    Raises:
      RunError: a workdir has no metrics to draw.
      UsageError: `output` does not end in the name of a picture format.
    """
    require_format(output)
    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        accuracy, loss = figure.subplots(1, 2)
        for i, workdir in enumerate(map(Workdir, workdirs)):
            workdir.refuse_sweep()
            rows = workdir.read_rows()
            if not rows:
                raise RunError(f"{workdir}: got no {workdir.metrics.name} with rows; expected the workdir of a run.")
            line, marker = STYLES[i % len(STYLES)]
            label = workdir.path.resolve().name
            for axes, name in ((accuracy, "test_accuracy"), (loss, "train_loss")):
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                steps, values = zip(*points, strict=True) if points else ((), ())
                marks = {"marker": marker, "markersize": 4, "markevery": max(1, len(points) // 20)}
                axes.plot(steps, values, linestyle=line, linewidth=1.4, label=label, **marks)
        accuracy.set(xlabel="step", ylabel="test accuracy")
        scale_accuracy(accuracy)
        loss.set(xlabel="step", ylabel="training loss", yscale="log")
        for axes in (accuracy, loss):
            axes.legend()
        write_picture(figure, output)


def scale_accuracy(axes: Any) -> None:
    """Sets a logit scale, which spreads the last percent, where runs differ, and still shows the start.

    The accuracies 0 and 1, which few examples can give, have no logit: then the scale stays linear.
    """
    low, high = axes.dataLim.intervaly
    if low > 0 and high < 1:
        axes.set_yscale("logit")
        axes.yaxis.set_major_locator(FixedLocator(_ACCURACIES))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PERCENT)


def require_format(output: Path) -> None:
    """Raises a UsageError if `output` does not end in the name of a picture format."""
    if output.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"{output}: got a name that ends in {output.suffix!r}, expected .png, .pdf or .svg")


def write_picture(figure: Any, output: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=output.suffix[1:].lower(), dpi=150)
    write_whole(output, picture.getvalue())
