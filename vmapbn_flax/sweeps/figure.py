"""Figure 1 of Ioffe & Szegedy (2015), from a sweep with and without batch norm."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.pictures import PERCENT, write_picture
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.results import Result, Setting, read_settings
from vmapbn_flax.training.watch import LOGGED

_NORM = "model.norm"
_LOWEST = 0.7  # accuracy that is drawn, as in the paper
# Distinct in grey print: the lines by their dashes, the bands by a hatch.
_WITHOUT = {"linestyle": "--", "color": "tab:red"}, {"facecolor": "none", "edgecolor": "tab:red", "hatch": "////"}
_WITH = {"linestyle": "-", "color": "tab:blue"}, {"facecolor": "tab:blue", "edgecolor": "none"}


def plot_figure(workdir: Workdir) -> None:
    """Draws the sweep in `workdir`, which may still be running, in the three panels of the paper.

    (a) has the test accuracy: the line is the mean over the seeds of the best setting by validation accuracy, the band
    reaches from the worst to the best of all runs. (b) and (c) have the percentiles of what `train.watch` names first,
    without and with batch norm: of the same setting, and of its first seed.

    Raises:
      RunError: `workdir` has no sweep, or one without runs with and without batch norm that watch a layer.
    """
    settings = read_settings(workdir)
    without = [setting for setting in settings if setting.values.get(_NORM) == "none"]
    norms = [setting for setting in settings if setting.values.get(_NORM, "none") != "none"]
    watched = workdir.member(settings[0].members[0].name).read_config()["train"]["watch"] if settings else []
    if not (without and norms and watched):
        raise RunError(
            f"{workdir}: got {'no layer in train.watch' if without and norms else 'no norm beside none'}; expected a "
            f"sweep over model.norm with 'none' and another, which watches a layer, such as configs/paper.py"
        )
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "hatch.linewidth": 0.4}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        accuracy, *panels = figure.subplots(1, 3)
        for found, label, (line, band) in ((without, "without", _WITHOUT), (norms, "with", _WITH)):
            _draw_accuracy(accuracy, found, f"{label} batch norm", line, band)
        accuracy.set(xlabel="training step", ylabel="test accuracy", title="(a)", ylim=(_LOWEST, 1))
        accuracy.yaxis.set_major_formatter(PERCENT)
        accuracy.legend(loc="lower right")
        for axes, found, title in zip(panels, (without, norms), ("(b) without", "(c) with"), strict=True):
            _draw_percentiles(axes, found[0].members[0], watched[0])
            axes.set(xlabel="training step", title=f"{title} batch norm")
        panels[0].set(ylabel=f"{watched[0]}".replace("_", " "))
        panels[1].sharey(panels[0])
        write_picture(figure, workdir.figure)


def _draw_accuracy(axes: Any, settings: Sequence[Setting], label: str, line: dict, band: dict) -> None:
    steps, best = _series(settings[0].members, "test_accuracy")
    axes.plot(steps, best.mean(0), label=label, **line)
    steps, runs = _series([member for setting in settings for member in setting.members], "test_accuracy")
    axes.fill_between(steps, runs.min(0), runs.max(0), alpha=0.25, linewidth=0, **band)


def _draw_percentiles(axes: Any, member: Result, name: str) -> None:
    low, middle, high = (_series([member], f"{name}_p{number}") for number in LOGGED)
    axes.fill_between(low[0], low[1][0], high[1][0], color="0.85", linewidth=0)
    for number, (steps, (values,)), linestyle in zip(LOGGED, (low, middle, high), (":", "-", "--"), strict=True):
        axes.plot(steps, values, linestyle, color="black", linewidth=1, label=f"{number}th percentile")


def _series(members: Sequence[Result], name: str) -> tuple[list[int], np.ndarray]:
    """The steps at which all the members have the figure `name`, and its values, `(members, steps)`."""
    found = [{row["step"]: row[name] for row in member.rows if row.get(name) is not None} for member in members]
    steps = sorted(set.intersection(*map(set, found)))
    return steps, np.array([[values[step] for step in steps] for values in found])
