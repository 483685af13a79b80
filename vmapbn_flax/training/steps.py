"""A training step, and many of them: pure functions of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.training.augment import Augment, unchanged
from vmapbn_flax.training.hyperparameters import Hyperparameters
from vmapbn_flax.training.layout import ONE_DEVICE, Layout
from vmapbn_flax.training.metrics import TrainMetrics
from vmapbn_flax.training.network import in_compute_dtype, make_network, to_inputs
from vmapbn_flax.training.optimizer import apply_gradients, learning_rate
from vmapbn_flax.training.state import TrainState


class Batch(NamedTuple):
    """Examples as they lie in memory; `mask` is False for padding, and None without any."""

    images: UInt8[Array, "batch height width *channels"]
    labels: Int[Array, " batch"]
    mask: Bool[Array, " batch"] | None = None


_LARGEST_GRADIENT = np.sqrt(np.finfo(np.float32).max)

TrainStep = Callable[[TrainState, Hyperparameters, Batch], tuple[TrainState, TrainMetrics]]


def epoch_permutation(seed: int, epoch: int, size: int) -> Int32[np.ndarray, " size"]:
    """The order of the training examples in `epoch`.

    It is drawn on the host: `jax.random.permutation` sorts, which takes a tenth of the training time on a CPU.
    """
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)


def make_take_batch(size: int, group: int = 1, layout: Layout = ONE_DEVICE) -> Callable[..., Batch]:
    """`take_batch(images, labels, permutation, number) -> Batch`.

    It takes batch `number` of an epoch in the order of `permutation`: `size` examples, padded in groups of `group` if
    the batch does not divide over the devices.
    """

    def take_batch(
        images: UInt8[Array, "*stored"],
        labels: Int[Array, "*labels"],
        permutation: Int[Array, " examples"],
        number: Int[Array, ""],
    ) -> Batch:
        rows = layout.pad(lax.dynamic_slice_in_dim(permutation, number * size, size), group)
        return Batch(*layout.take(images, labels, rows, number), layout.mask(size, group))

    return take_batch


def make_loss(
    model: ConfigDict, num_classes: int, augment: Augment = unchanged, *, freeze_norm: bool = False
) -> Callable:
    """`loss(params, batch_stats, hyper, batch, step) -> (loss, (logits, losses, batch_stats))` in training.

    The changes of `augment` and the network's dropout are functions of the seed and of `step`. `freeze_norm` is as in
    `make_network`.
    """
    ghost_size = model.ghost_batch_size

    def loss(
        params: Any, batch_stats: Any, hyper: Hyperparameters, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Array, tuple]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(hyper["seed"]), step))
        network = make_network(model, num_classes, hyper, ghost=bool(ghost_size), freeze_norm=freeze_norm)

        def grouped(x: Array | None) -> Array | None:
            return x.reshape(-1, ghost_size, *x.shape[1:]) if ghost_size and x is not None else x

        logits, updates = network.apply(
            {"params": in_compute_dtype(model, params), "batch_stats": batch_stats},
            grouped(to_inputs(model, augment(augment_key, batch.images))),
            train=True,
            mask=grouped(batch.mask),
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        logits = logits.reshape(-1, num_classes).astype(jnp.float32)  # (group, ghost, classes) -> (batch, classes)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, num_classes), hyper["train.label_smoothing"])
        losses = optax.softmax_cross_entropy(logits, targets)
        if batch.mask is None:
            total = jnp.mean(losses)
        else:
            total = jnp.sum(jnp.where(batch.mask, losses, 0)) / jnp.sum(batch.mask)
        return total, (logits, losses, updates.get("batch_stats", {}))

    return loss


def make_train_step(
    model: ConfigDict,
    optimizer: ConfigDict,
    max_skipped_steps: int,
    num_classes: int,
    augment: Augment = unchanged,
    *,
    freeze_norm: bool = False,
) -> TrainStep:
    """The step that is mapped over members, sharded over devices and looped over batches.

    If the loss, a gradient or the square of a gradient is not finite, parameters, optimizer state and statistics stay
    as they were, and the step counts as skipped. After `max_skipped_steps` skipped steps in a row nothing changes any
    more, the step count included. `freeze_norm` is as in `make_network`.
    """
    loss = make_loss(model, num_classes, augment, freeze_norm=freeze_norm)

    def train_step(state: TrainState, hyper: Hyperparameters, batch: Batch) -> tuple[TrainState, TrainMetrics]:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (logits, losses, batch_stats)), grads = gradient(
            state.params, state.batch_stats, hyper, batch, state.step
        )
        rate = learning_rate(optimizer, hyper, state.step)
        metrics = TrainMetrics.single_from_model_output(
            loss=losses, logits=logits, labels=batch.labels, mask=batch.mask
        )

        frozen = state.skipped_in_a_row >= max_skipped_steps
        # An infinite square would stay in Adam's second moment for ever.
        finite = jnp.isfinite(value) & _all_below(_LARGEST_GRADIENT, grads)
        allowed = finite & ~frozen
        params, opt_state = apply_gradients(optimizer, hyper, rate, state.params, state.opt_state, grads, allowed)
        moved = state.replace(batch_stats=batch_stats, metrics=state.metrics.merge(metrics))
        state = jax.tree.map(lambda new, old: jnp.where(allowed, new, old), moved, state)
        state = state.replace(
            params=params,
            opt_state=opt_state,
            step=state.step + ~frozen,
            skipped_steps=state.skipped_steps + (~finite & ~frozen),
            skipped_in_a_row=jnp.where(frozen, state.skipped_in_a_row, (state.skipped_in_a_row + 1) * ~finite),
        )
        return state, metrics

    return train_step


def _all_below(bound: np.float32, tree: PyTree) -> Bool[Array, ""]:
    """Whether the magnitude of every number in `tree` is below `bound`; NaN counts as above.

    The bits of a float32 without the sign are an integer that grows with the magnitude and is largest for NaN. An array
    is reduced over 32 rows first: XLA's CPU code is vectorised for such a reduction, but not for one to a scalar.
    """

    def largest(leaf: Array) -> list[Int32[Array, " part"]]:
        bits = lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32).reshape(-1) & 0x7FFFFFFF
        if bits.size < 4096:
            return [bits]
        divisible = bits.size // 32 * 32
        return [jnp.max(bits[:divisible].reshape(32, -1), axis=0), bits[divisible:]]

    parts = [part for leaf in jax.tree.leaves(tree) for part in largest(leaf)]
    return jnp.all(jnp.concatenate(parts) < bound.view(np.int32))


def make_train_steps(train_step: TrainStep, take_batch: Callable[..., Batch]) -> Callable[..., TrainState]:
    """`train_steps(state, hyper, images, labels, permutation, first, num_steps) -> state`.

    It takes `num_steps` steps of one epoch, from batch `first` on, over the training set on the devices. Both numbers
    are traced: one program serves every length, and the result does not depend on how an epoch is divided into chunks.
    """

    def train_steps(
        state: TrainState,
        hyper: Hyperparameters,
        images: UInt8[Array, "*stored"],
        labels: Int[Array, "*labels"],
        permutation: Int[Array, " examples"],
        first: Int[Array, ""],
        num_steps: Int[Array, ""],
    ) -> TrainState:
        def body(i: Array, state: TrainState) -> TrainState:
            return train_step(state, hyper, take_batch(images, labels, permutation, first + i))[0]

        return lax.fori_loop(0, num_steps, body, state)

    return train_steps


def make_one_step(train_step: TrainStep, take_batch: Callable[..., Batch]) -> Callable[..., TrainState]:
    """`one_step(state, hyper, images, labels, permutation, number) -> state`, which trains on batch `number`."""

    def one_step(
        state: TrainState, hyper: Hyperparameters, images: Array, labels: Array, permutation: Array, number: Array
    ) -> TrainState:
        return train_step(state, hyper, take_batch(images, labels, permutation, number))[0]

    return one_step


def make_gradients(
    loss: Callable, take_batch: Callable[..., Batch], batch_size: int
) -> Callable[..., tuple[Array, Any]]:
    """`gradients(state, hyper, images, labels, permutation, number) -> (logits, gradients)` of one batch."""

    def gradients(
        state: TrainState, hyper: Hyperparameters, images: Array, labels: Array, permutation: Array, number: Array
    ) -> tuple[Array, Any]:
        batch = take_batch(images, labels, permutation, number)
        grads, (logits, _, _) = jax.grad(loss, has_aux=True)(state.params, state.batch_stats, hyper, batch, state.step)
        return logits[:batch_size], grads

    return gradients
