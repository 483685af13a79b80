"""`vmapbn-flax evaluate`: loss and accuracy of a checkpoint, in either variant of the network, and its mistakes."""

import argparse
import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmapbn_flax.cli import environment
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import require_writable, write_whole
from vmapbn_flax.networks import in_form
from vmapbn_flax.runs.console import table
from vmapbn_flax.runs.loading import load_config, load_state
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.confusion import class_figures, confusion_matrix, most_confused
from vmapbn_flax.training.evaluation import Predictions
from vmapbn_flax.training.metrics import figures
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState

_MOST_PAIRS = 10
_COLUMNS = (
    "split",
    "index",
    "label",
    "label_name",
    "predicted",
    "predicted_name",
    "probability",
    "label_probability",
    "correct",
)


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints the figures of a checkpoint, and shows the mistakes in the ways that the arguments ask for."""
    environment.import_from_here()
    _require_outputs(arguments)
    programs, dataset, state = load(arguments.workdir, arguments.step, arguments.norm, arguments.network)
    if not (arguments.classes or arguments.csv or arguments.picture):
        _print(state, programs.evaluate(state))
        return 0
    (found,) = programs.predictions(state)
    results = figures({split: metrics for split, (metrics, _) in found.items()})
    predictions = {split: predicted for split, (_, predicted) in found.items()}
    _print(state, results)
    if arguments.classes:
        _print_classes(predictions["test"], dataset.class_names)
    if arguments.csv:
        write_whole(arguments.csv, _as_csv(predictions, dataset.class_names))
    if arguments.picture:
        from vmapbn_flax.runs.confusion import plot_confusion

        name, percent = arguments.workdir.resolve().name, 100 * results["test_accuracy"]
        title = f"{name}, step {state.step}: {percent:.2f} % of {len(dataset.test):,} test images are right"
        plot_confusion(predictions["test"], dataset.class_names, dataset.test, title, arguments.picture)
    return 0


def load(
    workdir: Path, step: int | None, norm: str | None, network: str | None
) -> tuple[Programs, Dataset, TrainState]:
    """The programs, the data set and the state of the checkpoint of `step`, by default the newest.

    Args:
      workdir: of a run.
      step: of one of the run's checkpoints.
      norm: "vmap" or "batched", for the other variant of a network with batch norm.
      network: as in `load_config`.

    Raises:
      RunError: the checkpoint is missing or damaged.
      UsageError: the run has no batch norm and `norm` is given.
    """
    run_workdir = Workdir(workdir)
    config = load_config(run_workdir, network)
    if norm is not None:
        if config.model.norm == "none":
            raise UsageError(f"--norm={norm}: got a run without batch norm, {workdir}, expected one with it")
        config.model.norm = in_form(config.model.norm, batched=norm == "batched")
    dataset = load_dataset(config.data)
    programs = Programs([config], dataset)
    return programs, dataset, load_state(run_workdir, step, programs.template())


def _require_outputs(arguments: argparse.Namespace) -> None:
    """Refuses paths of results that cannot be written, before the data loads."""
    if arguments.picture:
        from vmapbn_flax.runs.pictures import require_format

        require_format(arguments.picture)
    for path in (arguments.csv, arguments.picture):
        if path:
            require_writable(path)


def _print(state: TrainState, results: Mapping[str, float | int]) -> None:
    for name, value in {"step": int(state.step), **results}.items():
        print(name, value)


def _print_classes(predictions: Predictions, names: Sequence[str]) -> None:
    """Tables of the figures of each class, and of the pairs most often confused."""
    matrix = confusion_matrix(predictions, len(names))
    found = class_figures(matrix)
    shown = [("-" if math.isnan(value) else value for value in row) for row in zip(*map(list, found), strict=True)]
    rows = [(name, *values) for name, values in zip(names, shown, strict=True)]
    table(rows, ("test images", "examples", "precision", "recall", "F1"), file=sys.stdout)
    pairs = [
        (names[true], names[predicted], count, f"{100 * count / found.examples[true]:.2f} %")
        for true, predicted, count in most_confused(matrix, _MOST_PAIRS)
    ]
    if pairs:
        table(pairs, ("most confused: true", "predicted", "examples", "of the true class"), file=sys.stdout)


def _as_csv(predictions: Mapping[str, Predictions], names: Sequence[str]) -> str:
    """A row an example, in the order of its split, from 0."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for split, found in predictions.items():
        for index, (label, predicted, probability, label_probability) in enumerate(zip(*found, strict=True)):
            row = (split, index, label, names[label], predicted, names[predicted], probability, label_probability)
            writer.writerow((*row, int(predicted == label)))
    return text.getvalue()
