"""The picture of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from vmapbn_flax.runs.pictures import PERCENT, STYLES, scale_accuracy, write_picture
from vmapbn_flax.sweeps.results import SELECTION, Setting

_LABELLED = 8  # settings that a legend has room for
_LONGEST_LABEL = 45  # characters


def plot_sweep(settings: Sequence[Setting], output: Path) -> None:
    """Draws a sweep into `output`: validation accuracy against each swept value, and against steps.

    Settings come best first, in the order of the colours. A line is the mean over seeds, a band the standard deviation.
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
            curves.plot(steps, mean, color=colour, linestyle=STYLES[rank % len(STYLES)][0], label=label)
            curves.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        curves.set(xlabel="step", ylabel="validation accuracy")
        if curves.lines:
            title = None if len(settings) <= _LABELLED else f"best {_LABELLED} of {len(settings)}"
            figure.legend(title=title, fontsize=8, loc="outside right upper")
        scale_accuracy(curves)
        write_picture(figure, output)


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
    """Draws a point for each member that is done and a cross for a diverged one, on a scale that suits the values."""
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
        axes.xaxis.set_minor_formatter(NullFormatter())
        if len(values) <= _LABELLED:
            axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set(xlabel=name.rpartition(".")[2].replace("_", " "), ylabel="validation accuracy")
    axes.yaxis.set_major_formatter(PERCENT)


def _curve(setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps, and mean and standard deviation of the members that were evaluated at each."""
    at: dict[int, list[float]] = {}
    for member in setting.members:
        for row in member.rows:
            if row.get(SELECTION) is not None:
                at.setdefault(row["step"], []).append(row[SELECTION])
    steps = sorted(at)
    means = np.array([np.mean(at[step]) for step in steps])
    return np.array(steps), means, np.array([np.std(at[step], ddof=len(at[step]) > 1) for step in steps])
