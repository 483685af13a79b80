"""A training step, many of them, and an evaluation: pure functions of arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.training.hyperparameters import Hyperparameters
from vmapbn_flax.training.layout import ONE_DEVICE, Layout
from vmapbn_flax.training.metrics import EvalMetrics, TrainMetrics
from vmapbn_flax.training.network import make_network
from vmapbn_flax.training.optimizer import learning_rate, make_optimizer
from vmapbn_flax.training.state import TrainState


class Batch(NamedTuple):
    """Examples as they lie in memory; `mask` is for padded batches."""

    images: UInt8[Array, "batch features"]
    labels: Int[Array, " batch"]
    mask: Bool[Array, " batch"] | None = None


_LARGEST_GRADIENT = np.sqrt(np.finfo(np.float32).max)

TrainStep = Callable[[TrainState, Hyperparameters, Batch], tuple[TrainState, TrainMetrics]]


def to_inputs(images: UInt8[Array, "batch features"]) -> Float[Array, "batch features"]:
    """Pixels from 0 to 255 as floats from 0 to 1."""
    return images.astype(jnp.float32) / 255


def epoch_permutation(seed: int, epoch: int, size: int) -> Int32[np.ndarray, " size"]:
    """The order of the training examples in `epoch`.

    Drawn on the host: `jax.random.permutation` sorts, and a CPU spends a tenth of its time on that.
    """
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)


def make_take_batch(size: int, group: int = 1, layout: Layout = ONE_DEVICE) -> Callable[..., Batch]:
    """`take_batch(images, labels, permutation, number) -> Batch`.

    The `number`-th batch of `size` examples of an epoch in the order of `permutation`, padded in groups of `group` if
    the devices do not divide it.
    """

    def take_batch(
        images: UInt8[Array, "*stored features"],
        labels: Int[Array, "*stored"],
        permutation: Int[Array, " examples"],
        number: Int[Array, ""],
    ) -> Batch:
        rows = layout.pad(lax.dynamic_slice_in_dim(permutation, number * size, size), group)
        return Batch(*layout.take(images, labels, rows, number), layout.mask(size, group))

    return take_batch


def make_loss(model: ConfigDict, num_classes: int) -> Callable:
    """`loss(params, batch_stats, hyper, batch) -> (loss, (logits, losses, batch_stats))` in training."""
    ghost_size = model.ghost_batch_size

    def loss(params: Any, batch_stats: Any, hyper: Hyperparameters, batch: Batch) -> tuple[Array, tuple]:
        network = make_network(model, num_classes, hyper, ghost=bool(ghost_size))

        def grouped(x: Array | None) -> Array | None:
            return x.reshape(-1, ghost_size, *x.shape[1:]) if ghost_size and x is not None else x

        logits, updates = network.apply(
            {"params": params, "batch_stats": batch_stats},
            grouped(to_inputs(batch.images)),
            train=True,
            mask=grouped(batch.mask),
            mutable=["batch_stats"],
        )
        logits = logits.reshape(-1, num_classes)  # (group, ghost, classes) -> (batch, classes)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, num_classes), hyper["train.label_smoothing"])
        losses = optax.softmax_cross_entropy(logits, targets)
        if batch.mask is None:
            total = jnp.mean(losses)
        else:
            total = jnp.sum(jnp.where(batch.mask, losses, 0)) / jnp.sum(batch.mask)
        return total, (logits, losses, updates.get("batch_stats", {}))

    return loss


def make_train_step(model: ConfigDict, optimizer: ConfigDict, max_skipped_steps: int, num_classes: int) -> TrainStep:
    """The step that is mapped over members, sharded over devices and looped over batches.

    Where the loss is not finite, or a gradient is not or has no finite square, parameters, optimizer and statistics
    stay as they were, and the step is counted as skipped. After `max_skipped_steps` of those in a row nothing moves
    any more, the step itself included.
    """
    loss = make_loss(model, num_classes)

    def train_step(state: TrainState, hyper: Hyperparameters, batch: Batch) -> tuple[TrainState, TrainMetrics]:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (logits, losses, batch_stats)), grads = gradient(state.params, state.batch_stats, hyper, batch)
        rate = learning_rate(optimizer, hyper, state.step)
        updates, opt_state = make_optimizer(optimizer, hyper, rate).update(grads, state.opt_state, state.params)
        metrics = TrainMetrics.single_from_model_output(
            loss=losses, logits=logits, labels=batch.labels, mask=batch.mask
        )

        frozen = state.skipped_in_a_row >= max_skipped_steps
        # Squares that overflow would stay in Adam's second moment for ever.
        finite = jnp.isfinite(value) & _all_below(_LARGEST_GRADIENT, grads)
        moved = state.replace(
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            metrics=state.metrics.merge(metrics),
        )
        state = jax.tree.map(lambda new, old: jnp.where(finite & ~frozen, new, old), moved, state)
        state = state.replace(
            step=state.step + ~frozen,
            skipped_steps=state.skipped_steps + (~finite & ~frozen),
            skipped_in_a_row=jnp.where(frozen, state.skipped_in_a_row, (state.skipped_in_a_row + 1) * ~finite),
        )
        return state, metrics

    return train_step


def _all_below(bound: np.float32, tree: PyTree) -> Bool[Array, ""]:
    """Whether the magnitudes of all numbers in `tree` are; that of NaN is not.

    The bits of a float32 but the sign are an integer that grows with its magnitude and is largest for NaN. Eighths of
    an array are compared with one another first: XLA for CPUs works on many numbers at once elementwise, and on one at
    a time where it reduces to a scalar.
    """

    def largest(leaf: Array) -> list[Int32[Array, " part"]]:
        bits = lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32).reshape(-1) & 0x7FFFFFFF
        divisible = bits.size // 8 * 8
        return [functools.reduce(jnp.maximum, jnp.split(bits[:divisible], 8)), bits[divisible:]]

    parts = [part for leaf in jax.tree.leaves(tree) for part in largest(leaf)]
    return jnp.all(jnp.concatenate(parts) < bound.view(np.int32))


def make_train_steps(train_step: TrainStep, take_batch: Callable[..., Batch]) -> Callable[..., TrainState]:
    """`train_steps(state, hyper, images, labels, permutation, first, num_steps) -> state`.

    `num_steps` steps of one epoch from its batch `first` on, over the training set on the device. Both
    are traced, so that one program serves every length, and the result does not depend on how an epoch
    is cut.
    """

    def train_steps(
        state: TrainState,
        hyper: Hyperparameters,
        images: UInt8[Array, "*stored features"],
        labels: Int[Array, "*stored"],
        permutation: Int[Array, " examples"],
        first: Int[Array, ""],
        num_steps: Int[Array, ""],
    ) -> TrainState:
        def body(i: Array, state: TrainState) -> TrainState:
            return train_step(state, hyper, take_batch(images, labels, permutation, first + i))[0]

        return lax.fori_loop(0, num_steps, body, state)

    return train_steps


def make_gradients(
    loss: Callable, take_batch: Callable[..., Batch], batch_size: int
) -> Callable[..., tuple[Array, Any]]:
    """`gradients(state, hyper, images, labels, permutation, number) -> (logits, gradients)` of one batch."""

    def gradients(
        state: TrainState, hyper: Hyperparameters, images: Array, labels: Array, permutation: Array, number: Array
    ) -> tuple[Array, Any]:
        batch = take_batch(images, labels, permutation, number)
        grads, (logits, _, _) = jax.grad(loss, has_aux=True)(state.params, state.batch_stats, hyper, batch)
        return logits[:batch_size], grads

    return gradients


def make_evaluate(
    model: ConfigDict, batch_size: int, num_classes: int, layout: Layout = ONE_DEVICE
) -> Callable[..., EvalMetrics]:
    """`evaluate(params, batch_stats, hyper, images, labels) -> EvalMetrics`, each example counted once.

    Given a `count`, only as many of the first ones are.
    """
    size = layout.padded(batch_size)

    def evaluate(
        params: Any,
        batch_stats: Any,
        hyper: Hyperparameters,
        images: UInt8[Array, "*stored features"],
        labels: Int[Array, "*stored"],
        count: Int[Array, ""] | None = None,
    ) -> EvalMetrics:
        network = make_network(model, num_classes, hyper)
        variables = {"params": params, "batch_stats": batch_stats}
        count = len(labels) if count is None else count

        def body(i: Array, metrics: EvalMetrics) -> EvalMetrics:
            rows = i * size + jnp.arange(size)
            mask = rows < count
            rows = jnp.minimum(rows, count - 1)  # the last batch is padded with its last example
            batch = Batch(*layout.take(images, labels, rows, i), mask)
            logits = network.apply(variables, to_inputs(batch.images), train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return metrics.merge(
                EvalMetrics.single_from_model_output(loss=losses, logits=logits, labels=batch.labels, mask=batch.mask)
            )

        return lax.fori_loop(0, -(-count // size), body, EvalMetrics.empty())

    return evaluate


def make_population_statistics(model: ConfigDict, num_classes: int, layout: Layout = ONE_DEVICE) -> Callable[..., Any]:
    """`statistics(params, batch_stats, hyper, images) -> batch_stats` of all the images as one batch.

    A training-mode pass with momentum 0 leaves exactly that: each layer's pooled mean and variance, given
    that the layers before it are normalised by theirs.
    """

    def statistics(
        params: Any, batch_stats: Any, hyper: Hyperparameters, images: UInt8[Array, "examples features"]
    ) -> Any:
        network = make_network(model, num_classes, hyper | {"model.batch_norm_momentum": 0.0})
        variables = {"params": params, "batch_stats": batch_stats}
        inputs = to_inputs(layout.whole_images(images))
        _, updates = network.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return updates["batch_stats"]

    return statistics
