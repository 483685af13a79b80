"""Mean and variance over a batch that is spread over positions and named axes.

The statistics are those of Chan, Golub & LeVeque (1983), eq. 1.7: two passes and a correction term,

    d = x - mean(x);  c = mean(d);  var = mean(d * d) - c * c;  y = (d - c) / sqrt(var + epsilon)

`c` is the rounding error of the first mean. With this correction the result stays exact however far the
data lies from zero; the one-pass formula E[x^2] - E[x]^2 loses every digit there. The square of a complex number is
here that of its modulus, so that a variance is real. Numbers that are too large for these sums in float32 give NaN,
never a wrong number.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from vmapbn_flax.nn.positions import spread, totals


class Moments(NamedTuple):
    """Batch statistics, and the input minus its mean."""

    centred: Inexact[Array, "*positions features"]
    mean: Inexact[Array, " features"]
    var: Float[Array, " features"]  # biased: divided by `count`
    weight: Float[Array, ""] | int  # behind each mean: examples x positions, or the sum of the weights
    lost: Inexact[Array, " features"]  # in rounding `mean`: mean + lost has twice the digits


def batch_moments(
    x: Inexact[Array, "*positions features"],
    weights: Float[Array, "*positions 1"] | None,
    axis_name: tuple[str, ...],
    use_fast_variance: bool,
) -> Moments:
    """Mean and variance of each feature over all positions of `x` and over the axes `axis_name`.

    Takes two reductions across `axis_name`, or one with `use_fast_variance`. `weights=None` gives every
    position the weight one. Values of weight zero are ignored, NaN included.
    """

    def total(*terms: Array) -> list[Array]:
        return totals(terms, axis_name)

    if weights is None:
        present = None
        count = divisor = math.prod(x.shape[:-1]) * math.prod(map(lax.axis_size, axis_name))
        first = total(x, _square(x)) if use_fast_variance else total(x)
    else:
        present = weights > 0
        x = jnp.where(present, x, 0)
        weighted = weights * x
        *first, count = total(weighted, *([weights * _square(x)] if use_fast_variance else []), weights)
        count = jnp.squeeze(count, 0)
        divisor = jnp.where(count < jnp.inf, jnp.where(count > 0, count, 1), jnp.nan)

    mean = first[0] / divisor
    if use_fast_variance:
        var, lost = first[1] / divisor - _square(mean), jnp.zeros_like(mean)
    else:
        # Neither y nor var changes when every x is shifted by the same amount. So differentiation, of any order,
        # may treat the first mean as a constant, which saves a reduction in the backward pass.
        # A compiler may fuse mean = sum * (1 / n) with x - mean in one use of d and not in another, which would
        # centre the two uses by different roundings of the mean. It cannot fuse through a rounding to one bit less.
        mean = _round(lax.stop_gradient(mean))
    d = x - mean if present is None else jnp.where(present, x - mean, 0)
    if not use_fast_variance:
        if weights is None:
            c, var = (sum_ / divisor for sum_ in total(d, _square(d)))
        else:
            share = weights / divisor * d  # in this order no large weight overflows, and no small one is lost
            c, var = total(share, _product(share, d))
        shift, mean, d, var = mean, mean + c, d - spread(c, x, axis_name), var - _square(c)
        lost = c - (mean - shift)
    var = jnp.where(var < 0, 0, var)
    var = var + 0 * lax.stop_gradient(var)  # NaN if it overflowed: by an infinite one every result would be zero
    return Moments(d, mean, var, count, lost)


@jax.custom_jvp
def inverse_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / sqrt(x)`, whose derivative never has a factor x**-1.5: that of x = 1e26 is zero in float32."""
    return lax.rsqrt(x)


@inverse_sqrt.defjvp
def _inverse_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    y = inverse_sqrt(x)
    return y, y * t / x * -0.5


def broadcasting(call: Callable) -> Callable:
    """`call` as it is under jax_numpy_rank_promotion="allow": statistics meet positions by broadcasting, on purpose."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return call(*args, **kwargs)

    return wrapped


def _square(x: Array) -> Array:
    return _product(x, x)


def _product(x: Array, y: Array) -> Array:
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


def _round(x: Array) -> Array:
    """`x` to one bit less than its type has."""
    if jnp.iscomplexobj(x):
        return lax.complex(_round(x.real), _round(x.imag))
    precision = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, precision.nexp, precision.nmant - 1)
