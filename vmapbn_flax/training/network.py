"""The network that a config names, on batches of images as they lie in memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.networks import attributes, import_network
from vmapbn_flax.nn import MLP, VmapBatch
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.training.hyperparameters import Hyperparameters


def make_network(model: ConfigDict, num_classes: int, hyper: Hyperparameters, *, ghost: bool = False) -> nn.Module:
    """The network of `config.model`, for a batch of `to_inputs`, or with `ghost` for `(group, batch, ...)` of it.

    Raises:
      UsageError: see `vmapbn_flax.networks.import_network`.
    """
    make = partial(
        import_network(model.name, batched=model.norm == "batched"), num_classes=num_classes, **attributes(model)
    )
    numbers = {
        "momentum": hyper["model.batch_norm_momentum"],
        "epsilon": hyper["model.batch_norm_epsilon"],
        "replica_axis_name": "group" if ghost else (),
    }
    if model.norm == "none":
        return VmapBatch(make(norm=None))
    if model.norm == "vmap":
        return VmapBatch(make(norm=partial(BatchNorm, **numbers)), axis_name=("group", "batch") if ghost else "batch")
    network = make(norm=partial(BatchedBatchNorm, **numbers))
    return VmapBatch(network, axis_name="group") if ghost else network


def to_inputs(model: ConfigDict, images: UInt8[Array, "batch height width *channels"]) -> Float[Array, "batch *input"]:
    """Pixels from 0 to 255 as floats from 0 to 1, in `model.dtype` and in the shape that the network takes.

    Each input is an image `(height, width, channels)`, grey with one channel; for an `MLP` it is `(features,)`.
    """
    return as_inputs(import_network(model.name), (images.astype(jnp.float32) / 255).astype(model.dtype))


def as_inputs(
    network: type[nn.Module], images: Float[Array, "batch height width *channels"]
) -> Float[Array, "batch *input"]:
    """Images in the shape that a network of this class takes."""
    if issubclass(network, MLP):
        return images.reshape(images.shape[0], -1)
    return images if images.ndim == 4 else images[..., jnp.newaxis]


def has_positions(model: ConfigDict) -> bool:
    """Whether the network takes an image as it is, and not as features without positions."""
    return not issubclass(import_network(model.name), MLP)


def in_compute_dtype(model: ConfigDict, params: PyTree) -> PyTree:
    """Parameters as the network computes with them; their gradients arrive in the parameters' own type."""

    def cast(leaf: Any) -> Array:
        return leaf.astype(model.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return params if model.dtype == "float32" else jax.tree.map(cast, params)


def has_convolutions(params: PyTree) -> bool:
    """Whether a parameter has more axes than a matrix.

    XLA's compiler for CPUs runs the gradients of convolutions ten times slower inside a loop than outside: it turns
    them into a fast form only outside (jax-ml/jax#12868). Such networks are trained by one call a step.
    """
    return any(leaf.ndim > 2 for leaf in jax.tree.leaves(params))
