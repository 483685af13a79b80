"""The network that a config names, on batches of images as they lie in memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.networks import attributes, import_network, is_batched
from vmapbn_flax.nn import MLP, BatchedBatchNorm, BatchedBatchRenorm, BatchNorm, BatchRenorm, VmapBatch
from vmapbn_flax.training.hyperparameters import Hyperparameters

LAYERS = {  # of the values of config.model.norm
    "vmap": BatchNorm,
    "batched": BatchedBatchNorm,
    "renorm": BatchRenorm,
    "batched_renorm": BatchedBatchRenorm,
}


def make_network(
    model: ConfigDict, num_classes: int, hyper: Hyperparameters, *, ghost: bool = False, freeze_norm: bool = False
) -> nn.Module:
    """The network of `config.model`, for a batch of `to_inputs`, or with `ghost` for `(group, batch, ...)` of it.

    With `freeze_norm` its norms train by their running statistics, and leave them.

    Raises:
      UsageError: see `vmapbn_flax.networks.import_network`.
    """
    make = partial(
        import_network(model.name, batched=is_batched(model.norm)), num_classes=num_classes, **attributes(model)
    )
    numbers: dict[str, Any] = {
        "momentum": hyper["model.batch_norm_momentum"],
        "epsilon": hyper["model.batch_norm_epsilon"],
        "replica_axis_name": "group" if ghost else (),
        "frozen": freeze_norm,
    }
    if model.norm == "none":
        return VmapBatch(make(norm=None))
    layer = LAYERS[model.norm]
    if issubclass(layer, BatchRenorm):
        full = hyper["model.renorm_full_steps"]
        numbers |= {"r_max": hyper["model.renorm_r_max"], "r_max_steps": full}
        numbers |= {"d_max": hyper["model.renorm_d_max"], "d_max_steps": full}
        numbers |= {"warmup_steps": hyper["model.renorm_warmup_steps"]}
    network = make(norm=partial(layer, **numbers))
    if is_batched(model.norm):
        return VmapBatch(network, axis_name="group") if ghost else network
    return VmapBatch(network, axis_name=("group", "batch") if ghost else "batch")


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
