"""What the layers are measured against: batch norm in float64, forward and backward in closed form."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vmapbn_flax.nn.axes import as_axes
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm


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


@partial(jax.jit, static_argnums=0)
def train(layer: BatchNorm, variables, x, mask=None):
    """Output and new statistics of either layer on a batch: `BatchNorm` under `jax.vmap`."""

    def forward(x, mask):
        y, updates = layer.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    if not isinstance(layer, BatchedBatchNorm):
        for name in as_axes(layer.axis_name) + as_axes(layer.replica_axis_name):  # the last is outermost
            forward = jax.vmap(forward, out_axes=(0, None), axis_name=name)
    return forward(x, mask)


@partial(jax.jit, static_argnums=0)
def measure(layer: BatchNorm, params, x, cotangent, mask=None, running=None) -> Result:
    """The same figures from a layer, its batch statistics as a step of momentum 0 leaves them.

    `running` are the statistics before that step.
    """
    layer = layer.clone(momentum=0.0)
    features = jnp.zeros(x.shape[-1], jnp.promote_types(layer.param_dtype, jnp.float32))
    stats = {"mean": features, "var": features} if running is None else running

    def loss(x, params):
        y, updates = train(layer, {"params": params, "batch_stats": stats}, x, mask)
        return jnp.sum(cotangent * y).real, (y, updates)

    (dx, dparams), (y, updates) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return Result(y, updates["mean"], updates["var"], dx, dparams["scale"], dparams["bias"])


def error(got, expected, *, relative: bool = False, where=True) -> float:
    """Largest difference, absolute or in units of the largest expected entry."""
    expected = _exact(expected)
    difference = np.abs(_exact(got) - expected)
    largest = np.max(np.abs(expected)) if relative else 1.0
    return float(np.max(difference, where=where, initial=0.0) / largest)
