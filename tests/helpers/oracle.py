"""What the layers are measured against: batch norm in float64, forward and backward in closed form."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import quick
from vmapbn_flax.nn.axes import as_axes
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.nn.batch_renorm import BatchedBatchRenorm, BatchRenorm

TWINS = [(BatchNorm, BatchedBatchNorm), (BatchRenorm, BatchedBatchRenorm)]


class Result(NamedTuple):
    y: Any
    mean: Any  # of the batch
    var: Any
    dx: Any  # gradients of sum(cotangent * y)
    dscale: Any
    dbias: Any


def batch_norm(
    x, cotangent=0.0, *, scale=1.0, bias=0.0, weights=None, epsilon=1e-5, correct=lambda *_: (1, 0)
) -> Result:
    """Over all axes of `x` but the last; `weights` has the leading axes of `x`, any number of them.

    Of complex `x` the gradients are those of the real part of sum(cotangent * y), conjugated as by `jax.grad`.
    `correct(mean, sigma)` returns the r and d of batch renormalisation.
    """
    x = _exact(x)
    w = np.ones(x.shape[:-1]) if weights is None else np.asarray(weights, np.float64)
    w = np.broadcast_to(w.reshape(w.shape + (1,) * (x.ndim - w.ndim)), (*x.shape[:-1], 1))
    present, positions, n = w > 0, tuple(range(x.ndim - 1)), w.sum()
    x, g = np.where(present, x, 0), np.conj(_exact(np.where(present, cotangent, 0)))

    mean = (w * x).sum(positions) / n
    var = (w * np.abs(x - mean) ** 2).sum(positions) / n
    inverse = 1 / np.sqrt(var + epsilon)
    r, d = correct(mean, 1 / inverse)
    normalised = np.where(present, (x - mean) * inverse, 0)
    dnormalised, dbias = (g * np.conj(normalised)).real.sum(positions), g.sum(positions)
    dscale = r * dnormalised + (dbias * np.conj(d)).real
    dx = scale * r * inverse * (g - w / n * (dbias + normalised * dnormalised))
    return Result(scale * (normalised * r + d) + bias, mean, var, np.conj(dx), dscale, dbias.real)


def _exact(x):
    return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def correction(running, *, r_max=np.inf, d_max=np.inf, epsilon=1e-5):
    """`correct` for `batch_norm`: r and d by the statistics `running`, within the limits (Ioffe, 2017, algorithm 1)."""
    center, sigma = _exact(running["mean"]), np.sqrt(np.float64(running["var"]) + epsilon)

    def correct(mean, batch_sigma):
        r, d = batch_sigma / sigma, (mean - center) / sigma
        return np.clip(r, 1 / r_max, r_max), d * np.minimum(1, d_max / np.maximum(np.abs(d), 1e-300))

    return correct


def step(layer: BatchNorm, variables, x, mask=None):
    """Output and new statistics of either layer on a batch: `BatchNorm` under `jax.vmap`."""

    def forward(x, mask):
        y, updates = layer.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    if not isinstance(layer, BatchedBatchNorm):
        for name in as_axes(layer.axis_name) + as_axes(layer.replica_axis_name):  # the last is outermost
            forward = jax.vmap(forward, out_axes=(0, None), axis_name=name)
    return forward(jnp.asarray(x), mask)


def figures(layer: BatchNorm, params, x, cotangent, mask=None, running=None) -> Result:
    """The same figures from a layer, its batch statistics as a step of momentum 0 leaves them.

    `running` are the statistics before that step.
    """
    layer = layer.clone(momentum=0.0)
    features = jnp.zeros(x.shape[-1], jnp.promote_types(layer.param_dtype, jnp.float32))
    stats = {"mean": features, "var": features} if running is None else running

    def loss(x, params):
        y, updates = step(layer, {"params": params, "batch_stats": stats}, x, mask)
        return jnp.sum(cotangent * y).real, (y, updates)

    (dx, dparams), (y, updates) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return Result(y, updates["mean"], updates["var"], dx, dparams["scale"], dparams["bias"])


def twins(layer: BatchNorm) -> tuple[BatchNorm, ...]:
    """The layer on one example and the layer on a batch, of the same attributes; one of other axes is alone."""
    if (layer.axis_name, layer.replica_axis_name) != (type(layer).axis_name, ()):
        return (layer,)
    names = {field.name for field in dataclasses.fields(layer)} - {"axis_name", "parent", "name"}
    kinds = next(pair for pair in TWINS if type(layer) in pair)
    return tuple(kind(**{name: getattr(layer, name) for name in names}) for kind in kinds)


def compiled(function, jit):
    """`function` of a layer, in one program with that of its twin: what they have in common is compiled once.

    The results are numpy's, so that nothing is compiled for what a test does with them.
    """

    def of_each(layers, *args, **kwargs):
        return [function(layer, *args, **kwargs) for layer in layers]

    program = jit(of_each, static_argnums=0)

    @functools.wraps(function)
    def of_one(layer, *args, **kwargs):
        layers = twins(layer)
        return jax.device_get(program(layers, *args, **kwargs)[layers.index(layer)])

    return of_one


train, measure = compiled(step, jax.jit), compiled(figures, jax.jit)
# In a fifth of the time, for what is not about the last digits that users get.
quick_train, quick_measure = compiled(step, quick.jit), compiled(figures, quick.jit)


def error(got, expected, *, relative: bool = False, where=True) -> float:
    """Largest difference, absolute or in units of the largest expected entry."""
    expected = _exact(expected)
    difference = np.abs(_exact(got) - expected)
    largest = np.max(np.abs(expected)) if relative else 1.0
    return float(np.max(difference, where=where, initial=0.0) / largest)
