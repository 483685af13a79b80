"""Pictures of runs, from their `metrics.jsonl`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import read_lines, write_whole
from vmapbn_flax.results import SELECTION, Setting

_LABELLED = 8  # settings that a legend has room for
_LONGEST_LABEL = 45  # characters

# Distinct in grey print too: each run has a dash pattern and a marker of its own.
_STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1)), "v"), ((0, (1, 1)), "P")]

_ACCURACIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)


def plot_runs(workdirs: Sequence[Path], output: Path) -> None:
    """Draws test accuracy and training loss against steps, one line a run, into `output`.

    Raises:
      RunError: a workdir has no metrics to draw.
      UsageError: `output` does not end in the name of a picture format.
    """
    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        kind = output.suffix[1:].lower()
        if kind not in figure.canvas.get_supported_filetypes():
            raise UsageError(f"{output}: got a name that ends in {output.suffix!r}, expected .png, .pdf or .svg")
        accuracy, loss = figure.subplots(1, 2)
        for i, workdir in enumerate(workdirs):
            rows = [row for _, row in read_lines(workdir / "metrics.jsonl")]
            if not rows:
                raise RunError(f"{workdir}: got no metrics.jsonl with rows; expected the workdir of a run.")
            line, marker = _STYLES[i % len(_STYLES)]
            label = workdir.resolve().name
            for axes, name in ((accuracy, "test_accuracy"), (loss, "train_loss")):
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                steps, values = zip(*points, strict=True) if points else ((), ())
                marks = {"marker": marker, "markersize": 4, "markevery": max(1, len(points) // 20)}
                axes.plot(steps, values, linestyle=line, linewidth=1.4, label=label, **marks)
        accuracy.set(xlabel="step", ylabel="test accuracy")
        _scale_accuracy(accuracy)
        loss.set(xlabel="step", ylabel="training loss", yscale="log")
        for axes in (accuracy, loss):
            axes.legend()
        _write(figure, output)


def plot_sweep(settings: Sequence[Setting], output: Path) -> None:
    """Draws a sweep into `output`: validation accuracy against each swept value, and against steps.

    Settings come best first, and the colours follow: a line is the mean over seeds, a band the deviation.
    """
    fields = [name for name, values in _values(settings).items() if len(values) > 1]
    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(7 + 3.4 * len(fields), 3.6), layout="constrained")
        *panels, curves = figure.subplots(1, len(fields) + 1, width_ratios=[3] * len(fields) + [4], squeeze=False)[0]
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(settings))))
        for axes, name in zip(panels, fields, strict=True):
            _draw_values(axes, name, settings, colours)
        for rank, (setting, colour) in enumerate(zip(settings, colours, strict=True)):
            steps, mean, deviation = _curve(setting)
            name = setting.label if len(setting.label) <= _LONGEST_LABEL else f"setting {rank + 1}"  # of the table
            label = name if rank < _LABELLED else None
            curves.plot(steps, mean, color=colour, linestyle=_STYLES[rank % len(_STYLES)][0], label=label)
            curves.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        curves.set(xlabel="step", ylabel="validation accuracy")
        if curves.lines:
            title = None if len(settings) <= _LABELLED else f"best {_LABELLED} of {len(settings)}"
            figure.legend(title=title, fontsize=8, loc="outside right upper")
        _scale_accuracy(curves)
        _write(figure, output)


def _values(settings: Sequence[Setting]) -> dict[str, list[Any]]:
    """Every value of every swept field."""
    values: dict[str, list[Any]] = {}
    for setting in settings:
        for name, value in setting.values.items():
            found = values.setdefault(name, [])
            if value not in found:
                found.append(value)
    return {name: sorted(found) for name, found in values.items()}


def _draw_values(axes: Any, name: str, settings: Sequence[Setting], colours: Any) -> None:
    """A point for each member that is done, a cross where one has diverged, on a scale that suits the values."""
    values = _values(settings)[name]
    numeric = all(isinstance(value, int | float) for value in values)
    positions = values if numeric else range(len(values))
    for setting, colour in zip(settings, colours, strict=True):
        found = setting.figures(SELECTION)
        x = positions[values.index(setting.values[name])]
        axes.plot([x] * len(found), found, linestyle="", marker="o", markersize=5, color=colour, alpha=0.8)
        if any(member.status == "diverged" for member in setting.members):
            axes.plot([x], [0.02], "x", color="red", transform=axes.get_xaxis_transform(), clip_on=False)
    if not numeric:
        axes.set_xticks(positions, ["x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values])
        axes.margins(x=0.2)
    elif values[0] > 0 and values[-1] / values[0] >= 10:
        axes.set_xscale("log")
    axes.set(xlabel=name.rpartition(".")[2].replace("_", " "), ylabel="validation accuracy")
    axes.yaxis.set_major_formatter("{x:.1%}")


def _curve(setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, and the mean and the deviation of the members that were evaluated at each."""
    at: dict[int, list[float]] = {}
    for member in setting.members:
        for row in member.rows:
            if row.get(SELECTION) is not None:
                at.setdefault(row["step"], []).append(row[SELECTION])
    steps = sorted(at)
    means = np.array([np.mean(at[step]) for step in steps])
    return np.array(steps), means, np.array([np.std(at[step], ddof=len(at[step]) > 1) for step in steps])


def _scale_accuracy(axes: Any) -> None:
    """Logits spread out the last percent, which is where runs differ, without cutting off the start.

    0 and 1, which few examples may come to, have no logit: with one of them the scale is linear.
    """
    if all(0 < accuracy < 1 for line in axes.lines for accuracy in line.get_ydata()):
        axes.set_yscale("logit")
        axes.yaxis.set_major_locator(FixedLocator(_ACCURACIES))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{100 * accuracy:g} %"))


def _write(figure: Any, output: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=output.suffix[1:].lower(), dpi=150)
    write_whole(output, picture.getvalue())
