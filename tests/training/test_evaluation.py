"""What a network says of each example, from the evaluation that counts them; and what it confuses."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax.training import mesh
from vmapbn_flax.training.confusion import class_figures, confusion_matrix, most_confidently_wrong, most_confused
from vmapbn_flax.training.evaluation import Predictions
from vmapbn_flax.training.metrics import figures
from vmapbn_flax.training.programs import Programs

SPLITS = {"validation": 20, "test": 37}


@functools.cache
def trained():
    """The programs and the state, on the host, of a run that has learned a little."""
    programs = Programs([small.config()], small.dataset(validation_size=20))
    state = programs.advance(programs.create(), 0, 5)
    return programs, jax.device_get(state)


def make(devices=1, *, streamed=False, **changes):
    config = small.config(mesh__data=devices, **changes)
    dataset = dataclasses.replace(small.dataset(validation_size=20), streamed=streamed)
    return Programs([config], dataset, mesh.solo_mesh(config.mesh))


def predicted(programs):
    state = programs.place(trained()[1])
    (found,) = programs.predictions(state)
    assert figures({name: metrics for name, (metrics, _) in found.items()}) == programs.evaluate(state)
    programs.close()
    return {name: predictions for name, (_, predictions) in found.items()}


@functools.cache
def expected():
    """In numpy, from the logits of the network itself."""
    _, state = trained()
    params, stats = state.params, state.batch_stats["norm_0"]
    found = {}
    for name, split in (("validation", small.dataset(20).validation), ("test", small.dataset(20).test)):
        x = split.images.reshape(len(split), -1) / 255 @ np.asarray(params["dense_0"]["kernel"], np.float64)
        x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["norm_0"]["scale"] + params["norm_0"]["bias"]
        logits = 1 / (1 + np.exp(-x)) @ params["logits"]["kernel"] + params["logits"]["bias"]
        odds = np.exp(logits)
        odds /= odds.sum(1, keepdims=True)
        rows = np.arange(len(split))
        found[name] = Predictions(split.labels, logits.argmax(1), odds.max(1), odds[rows, split.labels])
    return found


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {}),
        (1, {"train__eval_batch_size": 16}),
        (1, {"train__eval_batch_size": 16, "streamed": True}),
        (3, {"train__eval_batch_size": 16}),
        (3, {"train__eval_batch_size": 16, "streamed": True}),
        pytest.param(3, {"train__eval_batch_size": 16, "mesh__replicate_limit": 0}, marks=pytest.mark.slow),
    ],
)
def test_predictions(devices, changes):
    """Of every example once, in order, wherever the batches end: in memory, streamed, on a mesh."""
    for name, got in predicted(make(devices, **changes)).items():
        assert [leaf.shape for leaf in got] == 4 * [(SPLITS[name],)]
        np.testing.assert_array_equal(got.label, expected()[name].label)
        np.testing.assert_array_equal(got.predicted, expected()[name].predicted)
        np.testing.assert_allclose(got.probability, expected()[name].probability, rtol=1e-5)
        np.testing.assert_allclose(got.label_probability, expected()[name].label_probability, rtol=1e-5)


def test_predictions_of_members():
    configs = [small.config(seed=seed) for seed in range(3)]
    programs = Programs(configs, small.dataset(), mesh.member_mesh(configs[0].mesh, 2))
    state = programs.advance(programs.create(), 0, 5)
    measured = programs.measure(state)
    assert len(set(map(str, measured))) == 3
    for found, metrics in zip(programs.predictions(state), measured, strict=True):
        assert figures({"test": found["test"][0]}) == figures(metrics)
        assert (found["test"][1].predicted == found["test"][1].label).sum() == metrics["test"].accuracy.total


def test_confusion_by_hand():
    """scikit-learn's conventions: a row a true class, a column a predicted one. Nothing is predicted to be 3."""
    label, said = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]), np.array([0, 1, 1, 1, 0, 2, 2, 2, 0])
    sure = np.linspace(0.5, 0.9, 9, dtype=np.float32)
    predictions = Predictions(label.astype(np.int32), said.astype(np.int32), sure, sure)
    matrix = confusion_matrix(predictions, 4)
    np.testing.assert_array_equal(matrix, [[1, 2, 0, 0], [1, 1, 0, 0], [1, 0, 3, 0], [0, 0, 0, 0]])
    found = class_figures(matrix)
    np.testing.assert_array_equal(found.examples, [3, 2, 4, 0])
    np.testing.assert_allclose(found.precision, [1 / 3, 1 / 3, 1, np.nan])
    np.testing.assert_allclose(found.recall, [1 / 3, 1 / 2, 3 / 4, np.nan])
    np.testing.assert_allclose(found.f1, [1 / 3, 2 / 5, 6 / 7, np.nan])
    assert most_confused(matrix, 3) == [(0, 1, 2), (1, 0, 1), (2, 0, 1)]
    assert most_confused(np.diag([3, 1]), 3) == []
    np.testing.assert_array_equal(most_confidently_wrong(predictions, 3), [8, 4, 2])


def test_the_confusion_of_a_run():
    """Against numpy on the predictions; the figures are those of the evaluation."""
    programs, state = trained()
    (found,) = programs.predictions(programs.place(state))
    metrics, predictions = found["test"]
    matrix = confusion_matrix(predictions, small.CLASSES)
    pairs = np.stack([predictions.label, predictions.predicted])
    for cell in np.ndindex(*matrix.shape):
        assert matrix[cell] == (cell == pairs.T).all(1).sum()
    assert np.trace(matrix) == metrics.accuracy.total
    assert matrix.sum() == 37
