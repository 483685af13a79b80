"""Flax Linen with convolutions: as `linen_mlp`, with images shifted at random inside the jitted step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import lax
from peers import BATCH, CLASSES, FEATURES, LEARNING_RATE, SHIFT, WEIGHT_DECAY, Peer, batches


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x[..., jnp.newaxis].astype(jnp.float32) / 255
        for width in FEATURES:
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    batch_stats: Any
    key: jax.Array


@jax.vmap
def shift(image: jax.Array, corner: jax.Array) -> jax.Array:
    return lax.dynamic_slice(jnp.pad(image, SHIFT), corner, image.shape)


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    model = ConvNet()
    rng = np.random.default_rng(0)

    @jax.jit
    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)
        images = shift(images, jax.random.randint(key, (len(images), 2), 0, 2 * SHIFT + 1))

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
    kernels = jax.tree.map(lambda leaf: leaf.ndim > 1, variables["params"])
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=kernels),
        key=jax.random.key(1),
    )

    def epoch() -> None:
        nonlocal state
        for batch in batches(images, labels, rng):
            state = train_step(state, *batch)
        jax.block_until_ready(state)

    def predict(images: np.ndarray) -> np.ndarray:
        return np.asarray(classes(state, images))

    return epoch, predict
