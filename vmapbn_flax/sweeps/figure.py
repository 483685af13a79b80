"""Figure 1 of Ioffe & Szegedy (2015), from a sweep with and without batch norm."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.pictures import scale_accuracy, write_picture
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import read_members
from vmapbn_flax.sweeps.results import Result, Setting, read_settings
from vmapbn_flax.training.watch import LOGGED

_NORM = "model.norm"
_LOWEST = 0.7  # accuracy that is drawn, as in the paper
_STYLES = {"without": ("tab:red", "--"), "with": ("tab:blue", "-")}  # distinct in grey print by their dashes
_MARKERS = ("", "o", "s", "^", "D", "v")  # of the other swept values


def plot_figure(workdir: Workdir) -> None:
    """Draws the sweep in `workdir`, which may still be running, in the three panels of the paper.

    (a) has the test accuracy of each setting: a line for the mean over the seeds, a band from the worst to the best.
    (b) and (c) have percentiles of what `train.watch` names first, without and with batch norm: those of the first
    seed, at the first of the other swept values.

    Raises:
      RunError: `workdir` has no sweep, or one without runs with and without batch norm that watch a layer.
    """
    settings = _in_order(workdir, read_settings(workdir))
    without = [setting for setting in settings if setting.values.get(_NORM) == "none"]
    norms = [setting for setting in settings if setting.values.get(_NORM, "none") != "none"]
    watched = [] if not settings else workdir.member(settings[0].members[0].name).read_config()["train"]["watch"]
    if not (without and norms and watched):
        raise RunError(
            f"{workdir}: got {'no layer in train.watch' if without and norms else 'no norm beside none'}; expected a "
            f"sweep over model.norm with 'none' and another, which watches a layer, such as configs/paper.py"
        )
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        accuracy, *panels = figure.subplots(1, 3, width_ratios=[4, 3, 3])
        for name, found in (("without", without), ("with", norms)):
            _draw_accuracy(accuracy, found, name)
        accuracy.set(xlabel="training step", ylabel="test accuracy", title="(a) test accuracy")
        scale_accuracy(accuracy)
        if accuracy.get_ylim()[1] > _LOWEST:
            accuracy.set_ylim(bottom=_LOWEST)
        accuracy.legend(loc="lower right", fontsize=8)
        for axes, found, title in zip(panels, (without, norms), ("(b) without", "(c) with"), strict=True):
            _draw_percentiles(axes, found[0].members[0], watched[0])
            axes.set(xlabel="training step", title=f"{title} batch norm")
        panels[0].set(ylabel=watched[0])
        panels[0].legend(fontsize=8)
        panels[1].sharey(panels[0])
        panels[1].sharex(panels[0])
        for axes in figure.axes:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        write_picture(figure, workdir.figure)


def _in_order(workdir: Workdir, settings: Sequence[Setting]) -> list[Setting]:
    """The settings, in the order of the config instead of their rank."""
    places = {member.name: place for place, member in enumerate(read_members(workdir))}
    return sorted(settings, key=lambda setting: places[setting.members[0].name])


def _draw_accuracy(axes: Any, settings: Sequence[Setting], name: str) -> None:
    colour, dashes = _STYLES[name]
    for i, setting in enumerate(settings):
        others = {field.rpartition(".")[2]: value for field, value in setting.values.items() if field != _NORM}
        label = ", ".join([f"{name} batch norm", *(f"{f.replace('_', ' ')} {v}" for f, v in others.items())])
        steps, runs = _series(setting.members, "test_accuracy")
        marks = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 2.5, "markevery": max(1, len(steps) // 12)}
        axes.plot(steps, runs.mean(0), dashes, color=colour, linewidth=1.2, label=label, **marks)
        axes.fill_between(steps, runs.min(0), runs.max(0), color=colour, alpha=0.2, linewidth=0)


def _draw_percentiles(axes: Any, member: Result, name: str) -> None:
    curves = [_series([member], f"{name}_p{number}") for number in LOGGED]
    (steps, (low,)), *_, (_, (high,)) = curves
    axes.fill_between(steps, low, high, color="0.88", linewidth=0)
    for number, (steps, (values,)), dashes in reversed(list(zip(LOGGED, curves, ("--", "-", ":"), strict=True))):
        axes.plot(steps, values, dashes, color="black", linewidth=1, label=f"{number}th percentile")


def _series(members: Sequence[Result], name: str) -> tuple[list[int], np.ndarray]:
    """The steps at which all the members have the figure `name`, and its values, `(members, steps)`."""
    found = [{row["step"]: row[name] for row in member.rows if row.get(name) is not None} for member in members]
    steps = sorted(set.intersection(*map(set, found)))
    return steps, np.array([[values[step] for step in steps] for values in found])
