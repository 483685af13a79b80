"""Which classes a network takes for which: numbers from its predictions, with scikit-learn's conventions."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vmapbn_flax.training.evaluation import Predictions


def confusion_matrix(predictions: Predictions, num_classes: int) -> Int[np.ndarray, "classes classes"]:
    """The number of examples of each true class, a row, by predicted class, a column."""
    cells = predictions.label.astype(np.int64) * num_classes + predictions.predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


class ClassFigures(NamedTuple):
    """Figures of each class; NaN where there is nothing to divide by.

    Attributes:
      examples: of the true class.
      precision: of the examples predicted to be of the class, the share that is.
      recall: of the examples of the class, the share predicted so: the accuracy of the class.
      f1: the harmonic mean of precision and recall.
    """

    examples: Int[np.ndarray, " classes"]
    precision: Float[np.ndarray, " classes"]
    recall: Float[np.ndarray, " classes"]
    f1: Float[np.ndarray, " classes"]


def class_figures(matrix: Int[np.ndarray, "classes classes"]) -> ClassFigures:
    """The figures of each class, from the confusion matrix."""
    right, examples, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        return ClassFigures(examples, right / predicted, right / examples, 2 * right / (examples + predicted))


def most_confused(matrix: Int[np.ndarray, "classes classes"], most: int) -> list[tuple[int, int, int]]:
    """The pairs of classes with the most mistakes, at most so many: true class, predicted class, examples."""
    mistakes = matrix - np.diag(np.diag(matrix))
    pairs = zip(*np.nonzero(mistakes), strict=True)
    found = [(int(true), int(predicted), int(mistakes[true, predicted])) for true, predicted in pairs]
    return sorted(found, key=lambda pair: -pair[2])[:most]


def most_confidently_wrong(predictions: Predictions, most: int) -> Int[np.ndarray, " examples"]:
    """The numbers of the examples with a wrong prediction, the most probable predictions first; at most so many."""
    (wrong,) = np.nonzero(predictions.predicted != predictions.label)
    return wrong[np.argsort(-predictions.probability[wrong], kind="stable")[:most]]
