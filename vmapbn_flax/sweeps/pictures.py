"""The picture of a sweep."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vmapbn_flax.runs.pictures import PERCENT, STYLES, scale_accuracy, write_picture
from vmapbn_flax.sweeps.results import SELECTION, Result, Setting

_LABELLED = 8  # settings that a legend has room for
_LONGEST_LABEL = 45  # characters
_COLUMNS = 3  # of panels, where more than two fields are swept


def plot_sweep(settings: Sequence[Setting], output: Path) -> None:
    """Draws a sweep into `output`: validation accuracy against each swept value, and against steps.

    Settings come best first, in the order of the colours. Each member that is done is a point, one that a rung stopped
    a ring, a diverged one a cross. A line is the mean over the seeds that trained equally long, a band the standard
    deviation; a line of members that a rung stopped ends in a ring.
    """
    values = _values(settings)
    fields = [name for name, found in values.items() if len(found) > 1]
    rows, widths, size = _layout(fields)
    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplot_mosaic(rows, width_ratios=widths)
        for name in fields[1:]:  # all have the same heights; what is not at the left needs no numbers
            panels[name].sharey(panels[fields[0]])
            panels[name].tick_params(labelleft=any(name == row[0] for row in rows))
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(settings))))
        for row in rows:
            panels[row[0]].set(ylabel="validation accuracy")
        for name in fields:
            _draw_values(panels[name], name, values[name], settings, colours)
        curves = panels[_CURVES]
        _draw_curves(curves, settings, colours)
        if curves.lines:
            title = None if len(settings) <= _LABELLED else f"best {_LABELLED} of {len(settings)}"
            figure.legend(title=title, fontsize=8, loc="outside right upper")
        write_picture(figure, output)


_CURVES = ""  # the panel of the curves, between those that have the names of fields


def _layout(fields: Sequence[str]) -> tuple[list[Any], list[int], tuple[float, float]]:
    """The names of the panels in each row, the widths of the columns, and the size of the picture in inches."""
    if len(fields) < _COLUMNS:
        return [[*fields, _CURVES]], [3] * len(fields) + [4], (7 + 3.4 * len(fields), 3.6)
    names = [*fields, *[_CURVES] * (-len(fields) % _COLUMNS or _COLUMNS)]
    rows = [names[i : i + _COLUMNS] for i in range(0, len(names), _COLUMNS)]
    return rows, [1] * _COLUMNS, (12.0, 3.2 * len(rows))


def _values(settings: Sequence[Setting]) -> dict[str, list[Any]]:
    """Every value of every swept field but the seed, in order."""
    found: dict[str, set] = {}
    for setting in settings:
        for name, value in setting.values.items():
            found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in found.items()}


def _draw_values(axes: Any, name: str, values: Sequence[Any], settings: Sequence[Setting], colours: Any) -> None:
    """Draws every member that is over at its value of the field `name`, on a scale that suits the values."""
    numeric = all(isinstance(value, int | float) for value in values)
    place = dict(zip(values, values if numeric else range(len(values)), strict=True))
    members = [(m, place[s.values[name]], c) for s, c in zip(settings, colours, strict=True) for m in s.members]
    few = len(members) <= 100
    for status, face in (("stopped", "none"), ("done", None)):
        drawn = [(x, y, c) for m, x, c in members if m.status == status and (y := m.figure(SELECTION)) is not None]
        if drawn:
            x, y, c = zip(*reversed(drawn), strict=True)  # the best on top
            colour = {"c": c} if face is None else {"edgecolors": c, "facecolors": face}
            axes.scatter(x, y, s=25 if few else 8, alpha=0.8, **colour)
    if diverged := [x for m, x, _ in members if m.status == "diverged"]:
        heights = np.full(len(diverged), 0.02)
        axes.plot(diverged, heights, "x", color="red", transform=axes.get_xaxis_transform(), clip_on=False)
    if not numeric:
        axes.set_xticks(range(len(values)), ["x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values])
        axes.margins(x=0.2)
    elif _are_even_in_logarithms(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if values[-1] < 1e3 * values[0] else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if len(values) <= _LABELLED:
            axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set(xlabel=name.rpartition(".")[2].replace("_", " "))
    axes.yaxis.set_major_formatter(PERCENT)


def _are_even_in_logarithms(values: Sequence[float]) -> bool:
    """Whether the median of sorted values, which differ by much, is nearer to their geometric middle."""
    low, high, middle = values[0], values[-1], statistics.median(values)
    if low <= 0 or high < 5 * low:
        return False
    return abs(math.log(middle / low) / math.log(high / low) - 0.5) < abs((middle - low) / (high - low) - 0.5)


def _draw_curves(axes: Any, settings: Sequence[Setting], colours: Any) -> None:
    """Draws a line for the members of each setting that trained equally long; those of the best have styles."""
    lines, bands, ends = [], [], []
    for rank, (setting, colour) in enumerate(zip(settings, colours, strict=True)):
        label = setting.label if len(setting.label) <= _LONGEST_LABEL else f"setting {rank + 1}"  # of the table
        for reached, members in itertools.groupby(sorted(setting.members, key=_reached), key=_reached):
            steps, mean, deviation = _curve(list(members))
            if not len(steps):
                continue
            if rank < _LABELLED:
                axes.plot(steps, mean, color=colour, linestyle=STYLES[rank % len(STYLES)][0], label=label, zorder=3)
                bands.append((steps, mean - deviation, mean + deviation, colour))
                label = None
            else:
                lines.append((np.column_stack([steps, mean]), colour))
            if -np.inf < reached <= 0:
                ends.append((steps[-1], mean[-1], colour))
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if lines:
        paths, found = zip(*reversed(lines), strict=True)  # the best on top
        axes.add_collection(
            LineCollection(paths, colors=found, linewidths=0.6, alpha=max(0.15, 30 / (30 + len(lines))))
        )
    if ends:
        x, y, found = zip(*reversed(ends), strict=True)
        axes.scatter(x, y, s=12, edgecolors=found, facecolors="none", linewidths=0.8, zorder=3)
    axes.autoscale_view()
    scale_accuracy(axes)
    for steps, low, high, colour in bands:
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def _reached(member: Result) -> float:
    return -member.reached  # the longest first


def _curve(members: Sequence[Result]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps, and mean and standard deviation of the members that were evaluated at each."""
    at: dict[int, list[float]] = {}
    for member in members:
        for row in member.rows:
            if row.get(SELECTION) is not None:
                at.setdefault(row["step"], []).append(row[SELECTION])
    steps = sorted(at)
    means = np.array([np.mean(at[step]) for step in steps])
    return np.array(steps), means, np.array([np.std(at[step], ddof=len(at[step]) > 1) for step in steps])
