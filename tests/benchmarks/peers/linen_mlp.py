"""Flax Linen: a TrainState with statistics, one jitted step a batch, as in its batch norm guide."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from peers import BATCH, CLASSES, HIDDEN, LEARNING_RATE, Peer, batches


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.astype(jnp.float32) / 255
        for width in HIDDEN:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.sigmoid(x)
        return nn.Dense(CLASSES)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    model = MLP()
    rng = np.random.default_rng(0)

    @jax.jit
    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads).replace(batch_stats=updates["batch_stats"])

    @jax.jit
    def classes(state: TrainState, images: jax.Array) -> jax.Array:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state.apply_fn(variables, images, train=False).argmax(-1)

    variables = model.init(jax.random.key(0), images[:BATCH], train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(LEARNING_RATE),
    )

    def epoch() -> None:
        nonlocal state
        for batch in batches(images, labels, rng):
            state = train_step(state, *batch)
        jax.block_until_ready(state)

    def predict(images: np.ndarray) -> np.ndarray:
        return np.asarray(classes(state, images))

    return epoch, predict
