"""Equinox: a one-example model under vmap, one filter_jit step a batch, as in its examples of MNIST and of state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import CLASSES, HIDDEN, LEARNING_RATE, Peer, batches


class MLP(eqx.Module):
    dense: list[eqx.nn.Linear]
    norms: list[eqx.nn.BatchNorm]
    logits: eqx.nn.Linear

    def __init__(self, num_features: int, key: jax.Array):
        widths, keys = (num_features, *HIDDEN), jax.random.split(key, len(HIDDEN) + 1)
        self.dense = [eqx.nn.Linear(widths[i], width, use_bias=False, key=keys[i]) for i, width in enumerate(HIDDEN)]
        self.norms = [eqx.nn.BatchNorm(width, axis_name="batch", mode="batch") for width in HIDDEN]
        self.logits = eqx.nn.Linear(HIDDEN[-1], CLASSES, key=keys[-1])

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x = x.astype(jnp.float32) / 255
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x, state = norm(dense(x), state)
            x = jax.nn.sigmoid(x)
        return self.logits(x), state


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    model, state = eqx.nn.make_with_state(MLP)(images.shape[1], jax.random.key(0))
    optimizer = optax.adam(LEARNING_RATE)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)

    def loss(model: MLP, state: eqx.nn.State, images: jax.Array, labels: jax.Array):
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = batched(images, state)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    @eqx.filter_jit
    def make_step(model: MLP, state: eqx.nn.State, opt_state: optax.OptState, images: jax.Array, labels: jax.Array):
        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state

    @eqx.filter_jit
    def classes(model: MLP, state: eqx.nn.State, images: jax.Array) -> jax.Array:
        logits, _ = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(images, state)
        return logits.argmax(-1)

    def epoch() -> None:
        nonlocal model, state, opt_state
        for batch in batches(images, labels, rng):
            model, state, opt_state = make_step(model, state, opt_state, *batch)
        jax.block_until_ready(eqx.filter((model, state, opt_state), eqx.is_array))

    def predict(images: np.ndarray) -> np.ndarray:
        return np.asarray(classes(eqx.nn.inference_mode(model), state, images))

    return epoch, predict
