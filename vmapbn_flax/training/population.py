"""The statistics of batch norm over a whole training set, in the memory of one batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.nn.batch_norm import BatchNorm
from vmapbn_flax.nn.moments import batch_moments
from vmapbn_flax.training.hyperparameters import Hyperparameters
from vmapbn_flax.training.layout import ONE_DEVICE, Layout
from vmapbn_flax.training.network import in_compute_dtype, make_network, to_inputs

Path = tuple[str, ...]  # of a layer in the tree of variables
Moments = tuple[Array, Array, Array]  # weight, mean and variance

_INPUTS = "batch_norm_inputs"  # a collection of variables


def make_population_statistics(
    model: ConfigDict, batch_size: int, num_classes: int, layout: Layout = ONE_DEVICE
) -> Callable[..., PyTree]:
    """`statistics(params, batch_stats, hyper, images, labels) -> batch_stats` of all the images as one batch.

    Each layer's mean and variance are those of its inputs over all images, where the layers before it are normalised
    by theirs. A pass over the images in evaluation settles one layer: the first whose statistics the passes before
    have not settled.
    """
    size = layout.padded(batch_size)

    def statistics(params: Any, batch_stats: Any, hyper: Hyperparameters, images: Array, labels: Array) -> PyTree:
        network = make_network(model, num_classes, hyper)
        params = in_compute_dtype(model, params)

        paths: list[Path] = []

        def moments(
            batch_stats: Any, images: UInt8[Array, "batch height width *channels"], weights: Array
        ) -> list[Moments]:
            inputs = _layer_inputs(network, params, batch_stats, to_inputs(model, images))
            paths[:] = inputs
            return [_moments(x, weights) for x in inputs.values()]

        def one_pass(number: Array, batch_stats: PyTree) -> PyTree:
            def body(i: Array, total: list[Moments]) -> list[Moments]:
                rows = i * size + jnp.arange(size)
                batch, _ = layout.take(images, labels, jnp.minimum(rows, len(labels) - 1), i)
                found = moments(batch_stats, batch, (rows < len(labels)).astype(jnp.float32))
                return [_merge(*pair) for pair in zip(total, found, strict=True)]

            pooled = lax.fori_loop(0, -(-len(labels) // size), body, jax.tree.map(jnp.zeros_like, shapes))
            flat = flatten_dict(batch_stats)
            for layer, (path, (_, mean, var)) in enumerate(zip(paths, pooled, strict=True)):
                for name, value in (("mean", mean), ("var", var)):
                    old = flat[*path, name]
                    flat[*path, name] = jnp.where(number == layer, value, old).astype(old.dtype)
            return unflatten_dict(flat)

        some = layout.take(images, labels, jnp.zeros(size, jnp.int32), jnp.zeros((), jnp.int32))[0]
        shapes = jax.eval_shape(moments, batch_stats, some, jnp.ones(size))
        return lax.fori_loop(0, len(shapes), one_pass, batch_stats)

    return statistics


def _layer_inputs(network: nn.Module, params: PyTree, batch_stats: PyTree, x: Array) -> dict[Path, Array]:
    """The inputs of each `BatchNorm` in evaluation, `(batch, *spatial, features)` by path, in the order of calls."""
    order: list[Path] = []

    def keep(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, BatchNorm) and context.method_name == "__call__" and layer.scope is not None:
            layer.sow(_INPUTS, "x", args[0])
            order.append(layer.scope.path)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(keep):
        variables = {"params": params, "batch_stats": batch_stats}
        _, kept = network.apply(variables, x, train=False, mutable=[_INPUTS])
    inputs = flatten_dict(kept.get(_INPUTS, {}))
    return {path: jnp.concatenate(inputs[*path, "x"]) for path in dict.fromkeys(order)}


def _moments(x: Array, weights: Array) -> Moments:
    x = x.astype(jnp.float32)
    weights = jnp.tile(weights, len(x) // len(weights))  # a layer may be called several times
    weights = jnp.broadcast_to(weights.reshape(-1, *(1 for _ in x.shape[1:])), (*x.shape[:-1], 1))
    moments = batch_moments(x, weights, (), use_fast_variance=False)
    return jnp.asarray(moments.weight), moments.mean, moments.var


def _merge(first: Moments, second: Moments) -> Moments:
    """Weight, mean and variance of two sets together (Chan, Golub & LeVeque, 1983, eq. 2.1)."""
    (a, mean_a, var_a), (b, mean_b, var_b) = first, second
    share, apart = b / (a + b), mean_b - mean_a
    return a + b, mean_a + share * apart, var_a + share * (var_b - var_a) + share * (1 - share) * apart * apart
