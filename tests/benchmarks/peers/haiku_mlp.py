"""haiku with optax: pure functions of parameters and state, one jitted update a batch, as in its MNIST example."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import BATCH, CLASSES, HIDDEN, LEARNING_RATE, Peer, batches


class TrainingState(NamedTuple):
    params: hk.Params
    statistics: hk.State
    opt_state: optax.OptState


def network(images: jax.Array, is_training: bool) -> jax.Array:
    x = images.astype(jnp.float32) / 255
    for width in HIDDEN:
        x = hk.Linear(width, with_bias=False)(x)
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.99)(x, is_training)
        x = jax.nn.sigmoid(x)
    return hk.Linear(CLASSES)(x)


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    model = hk.without_apply_rng(hk.transform_with_state(network))
    optimizer = optax.adam(LEARNING_RATE)
    rng = np.random.default_rng(0)

    def loss(params, statistics, images, labels):
        logits, statistics = model.apply(params, statistics, images, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), statistics

    @jax.jit
    def update(state: TrainingState, images: jax.Array, labels: jax.Array) -> TrainingState:
        grads, statistics = jax.grad(loss, has_aux=True)(state.params, state.statistics, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state)
        return TrainingState(optax.apply_updates(state.params, updates), statistics, opt_state)

    @jax.jit
    def classes(params: hk.Params, statistics: hk.State, images: jax.Array) -> jax.Array:
        logits, _ = model.apply(params, statistics, images, False)
        return logits.argmax(-1)

    params, statistics = model.init(jax.random.PRNGKey(0), images[:BATCH], True)
    state = TrainingState(params, statistics, optimizer.init(params))

    def epoch() -> None:
        nonlocal state
        for batch in batches(images, labels, rng):
            state = update(state, *batch)
        jax.block_until_ready(state)

    def predict(images: np.ndarray) -> np.ndarray:
        return np.asarray(classes(state.params, state.statistics, images))

    return epoch, predict
