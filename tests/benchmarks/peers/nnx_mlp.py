"""Flax NNX: a model and an optimizer that a jitted step updates in place, as in its MNIST tutorial."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from peers import CLASSES, HIDDEN, LEARNING_RATE, Peer, batches


class MLP(nnx.Module):
    def __init__(self, num_features: int, rngs: nnx.Rngs):
        widths = (num_features, *HIDDEN)
        pairs = itertools.pairwise(widths)
        self.dense = nnx.List([nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs) for inputs, outputs in pairs])
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in HIDDEN])
        self.logits = nnx.Linear(HIDDEN[-1], CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32) / 255
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = nnx.sigmoid(norm(dense(x)))
        return self.logits(x)


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    model = MLP(images.shape[1], rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    rng = np.random.default_rng(0)

    def loss(model: MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    @nnx.jit
    def train_step(model: MLP, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, images, labels))

    @nnx.jit
    def classes(model: MLP, images: jax.Array) -> jax.Array:
        return model(images).argmax(-1)

    def epoch() -> None:
        model.train()
        for batch in batches(images, labels, rng):
            train_step(model, optimizer, *batch)
        jax.block_until_ready(nnx.state(model))

    def predict(images: np.ndarray) -> np.ndarray:
        model.eval()
        return np.asarray(classes(model, images))

    return epoch, predict
