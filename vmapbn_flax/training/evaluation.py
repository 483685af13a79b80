"""An evaluation of a split: its metrics, and what the network says of each example."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float32, Int, Int32, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.training.hyperparameters import Hyperparameters
from vmapbn_flax.training.layout import ONE_DEVICE, Layout
from vmapbn_flax.training.metrics import EvalMetrics
from vmapbn_flax.training.network import in_compute_dtype, make_network, to_inputs


class Predictions(NamedTuple):
    """What a network says of the examples of a split, in their order.

    Attributes:
      label: the true class.
      predicted: the class with the largest logit.
      probability: of the predicted class.
      label_probability: of the true class.
    """

    label: Int32[Any, "*examples"]
    predicted: Int32[Any, "*examples"]
    probability: Float32[Any, "*examples"]
    label_probability: Float32[Any, "*examples"]


def make_evaluate(
    model: ConfigDict, batch_size: int, num_classes: int, layout: Layout = ONE_DEVICE
) -> Callable[..., tuple[EvalMetrics, Predictions]]:
    """`evaluate(params, batch_stats, hyper, images, labels) -> (EvalMetrics, Predictions)`, each example counted once.

    The predictions are those of the batches, `(batches, batch)`; the last batch ends in padding. Given a `count`, there
    is one batch, and only its first `count` examples are counted.
    """
    size = layout.padded(batch_size)

    def evaluate(
        params: Any,
        batch_stats: Any,
        hyper: Hyperparameters,
        images: UInt8[Array, "*stored"],
        labels: Int[Array, "*labels"],
        count: Int[Array, ""] | None = None,
    ) -> tuple[EvalMetrics, Predictions]:
        network = make_network(model, num_classes, hyper)
        variables = {"params": in_compute_dtype(model, params), "batch_stats": batch_stats}
        num_batches = -(-labels.size // size)
        count = labels.size if count is None else count

        def body(metrics: EvalMetrics, i: Array) -> tuple[EvalMetrics, Predictions]:
            rows = i * size + jnp.arange(size)
            mask = rows < count
            rows = jnp.minimum(rows, count - 1)  # the last batch is padded with its last example
            batch, label = layout.take(images, labels, rows, i)
            logits = jnp.asarray(network.apply(variables, to_inputs(model, batch), train=False), jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            metrics = metrics.merge(
                EvalMetrics.single_from_model_output(loss=losses, logits=logits, labels=label, mask=mask)
            )
            probabilities = jax.nn.softmax(logits)
            label_probability = jnp.take_along_axis(probabilities, label[:, jnp.newaxis], axis=-1)[:, 0]
            predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return metrics, Predictions(label, predicted, jnp.max(probabilities, axis=-1), label_probability)

        return lax.scan(body, EvalMetrics.empty(), jnp.arange(num_batches))

    return evaluate


def join(parts: Sequence[tuple[EvalMetrics, Predictions]]) -> tuple[EvalMetrics, Predictions]:
    """The results of a split, its predictions without padding as `(examples,)`, from those of its parts on the host."""
    trimmed = [
        jax.tree.map(lambda leaf: leaf.reshape(-1)[: int(metrics.loss.count)], predictions)  # noqa: B023
        for metrics, predictions in parts
    ]
    metrics = functools.reduce(EvalMetrics.merge, [metrics for metrics, _ in parts])
    return metrics, jax.tree.map(lambda *leaves: np.concatenate(leaves), *trimmed)
