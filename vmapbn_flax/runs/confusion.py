"""The picture of what a network gets wrong. It fits a page of A4, and is drawn for print in black and white."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Int
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vmapbn_flax.data import Examples
from vmapbn_flax.runs.pictures import PERCENT, require_format, write_picture
from vmapbn_flax.training.confusion import class_figures, confusion_matrix, most_confidently_wrong, most_confused
from vmapbn_flax.training.evaluation import Predictions

_WIDTH = 7.5  # inches
_MOST_NAMED = 20  # classes whose rows have room for a name
_PAIRS = (10, 3)  # rows and columns of the list of pairs
_WRONG = (2, 6)  # rows and columns of images
_LONGEST_NAME = 16  # characters


def plot_confusion(
    predictions: Predictions, class_names: Sequence[str], examples: Examples, title: str, output: Path
) -> None:
    """Draws the confusion matrix, the accuracy of each class and the images most confidently got wrong.

    Of more than 20 classes, those of the lowest accuracy are named, and the pairs most often confused are listed.

    Args:
      examples: of the split; those that are drawn are read.
      output: see `require_format`.
    """
    require_format(output)
    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in class_names]
    matrix, wrong = confusion_matrix(predictions, len(names)), most_confidently_wrong(predictions, math.prod(_WRONG))
    named = len(names) <= _MOST_NAMED
    panels = [(1.4 + 0.22 * max(4, len(names)) if named else 4.3, partial(_draw_classes, matrix, names))]
    if not named:
        panels.append((1.8, partial(_draw_pairs, matrix, names)))
    if len(wrong):
        panels.append((1.75 * -(-len(wrong) // _WRONG[1]), partial(_draw_wrong, predictions, names, examples, wrong)))
    heights = [height for height, _ in panels]  # inches
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 9, "text.parse_math": False}):
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=10)
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)
        for part, (_, draw) in zip(parts.flat, panels, strict=True):
            draw(part)
        write_picture(figure, output)


def _draw_classes(matrix: Int[np.ndarray, "classes classes"], names: Sequence[str], part: Any) -> None:
    """Draws the matrix and, beside it, the accuracies: of all classes in the rows of the matrix, or of the lowest."""
    cells, classes = part.subplots(1, 2, width_ratios=[8, 5])
    _draw_matrix(part, cells, matrix, names)
    recall, named = class_figures(matrix).recall, len(names) <= _MOST_NAMED
    order = np.arange(len(names)) if named else np.argsort(recall, kind="stable")[:_MOST_NAMED]
    rows, shares, total = np.arange(len(order)), recall[order], np.trace(matrix) / matrix.sum()
    classes.axvline(total, color="black", linewidth=0.8, linestyle=":")
    classes.hlines(rows, 0, shares, color="0.7", linewidth=0.8)
    classes.plot(shares, rows, "o", color="black", markersize=3.5, clip_on=False)
    lowest = min(np.nanmin(shares), total)
    classes.set(xlim=(max(0, 1 - 1.1 * max(1 - lowest, 0.01)), 1), ylim=(len(order) - 0.5, -0.5))
    classes.set_title("accuracy of each class" if named else f"the {_MOST_NAMED} classes of lowest accuracy")
    classes.set_xlabel(f"dotted: {100 * total:.2f} %, of all examples")
    classes.set_yticks(rows, [""] * len(rows) if named else [names[i] for i in order])
    classes.xaxis.set_major_locator(MaxNLocator(4))
    classes.xaxis.set_major_formatter(PERCENT)
    figures = classes.secondary_yaxis("right")
    figures.set_yticks(rows, [_percent(share) for share in shares])
    for axis in (classes, figures):
        axis.tick_params("y", length=0)
        axis.spines[:].set_visible(False)
    classes.spines["bottom"].set_visible(True)


def _draw_matrix(part: Any, axes: Any, matrix: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> None:
    """Shades mistakes by their share of the true class. Right answers stay white, or nothing else would be seen."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    darkest = max(share.max(), 1e-3)
    norm = PowerNorm(0.5, 0, darkest)  # so that single mistakes are seen, too
    shades = axes.imshow(share, "Greys", norm=norm, aspect="auto", interpolation="nearest")
    bar = part.colorbar(shades, ax=axes, location="bottom", aspect=40)
    ticks = darkest * np.array([0, 1 / 4, 1])  # where the norm is 0, a half and 1
    bar.set_ticks(ticks, labels=map(_percent, ticks))
    bar.set_label("mistakes, as a share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title="examples by true and predicted class")
    classes = np.arange(len(names))
    if len(names) > _MOST_NAMED:
        axes.set(xlabel="predicted, by the number of the class", ylabel="true, by the number of the class")
        axes.plot(classes, classes, color="0.8", linewidth=0.5)
        return
    axes.set_xticks(classes, names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(classes, names)
    size = min(8, 330 / len(names) / len(str(matrix.max())))  # points; what a cell is wide enough for
    for true, predicted in zip(*np.nonzero(matrix), strict=True):
        text = axes.text(predicted, true, str(matrix[true, predicted]), ha="center", va="center", fontsize=size)
        text.set_fontweight("bold" if true == predicted else "normal")
        text.set_color("white" if norm(share[true, predicted]) > 0.5 else "black")


def _draw_pairs(matrix: Int[np.ndarray, "classes classes"], names: Sequence[str], part: Any) -> None:
    rows, columns = _PAIRS
    axes = part.subplots()
    axes.axis("off")
    axes.set_title("the pairs most often confused: examples, true and predicted class")
    for number, (true, predicted, count) in enumerate(most_confused(matrix, rows * columns)):
        column, row = divmod(number, rows)
        text = f"{count}  {names[true]} / {names[predicted]}"
        axes.text(column / columns, 1 - row / rows, text, va="top", fontsize=7)


def _draw_wrong(
    predictions: Predictions, names: Sequence[str], examples: Examples, rows: Int[np.ndarray, " wrong"], part: Any
) -> None:
    columns = _WRONG[1]
    part.suptitle("the surest mistakes", fontsize=9)
    places = part.subplots(-(-len(rows) // columns), columns, squeeze=False).ravel()
    for axes in places:
        axes.axis("off")
    for axes, row, image in zip(places, rows, examples.read(rows).images, strict=False):
        label, predicted, probability, label_probability = (leaf[row] for leaf in predictions)
        if image.ndim == 3 and image.shape[-1] == 2:  # no colours; the first of them as grey
            image = image[..., 0]
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        sure = f"{_percent(probability)} against {_percent(label_probability)}"
        axes.set_title(f"predicted {names[predicted]}\ntrue {names[label]}\n{sure}", fontsize=6.5)


def _percent(share: float | np.floating) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else ""
