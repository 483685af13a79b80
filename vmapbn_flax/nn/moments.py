"""Mean and variance over a batch that is spread over positions and named axes.

The statistics are those of Chan, Golub & LeVeque (1983), eq. 1.7: two passes and a correction term,

    d = x - mean(x);  c = mean(d);  var = mean(d * d) - c * c;  y = (d - c) / sqrt(var + epsilon)

`c` is the rounding error of the first mean. With this correction the result stays exact however far the
data lies from zero; the one-pass formula E[x^2] - E[x]^2 loses every digit there. The square of a complex number is
here that of its modulus, so that a variance is real. Numbers that are too large for these sums in float32 give NaN,
never a wrong number.

A derivative has factors such as var**-1.5, which float32 does not have of x = 1e18. So d is multiplied by `unit`, a
power of two that makes its variance about one, before what is differentiated. This takes no digit from any number.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from vmapbn_flax.nn.positions import spread, totals

_ROUNDING = 1e-6  # of a sample size, in float32
_SMALL, _RAISE = 2.0**-40, 2.0**80  # weights below the one are raised by the other, to more than 1e-14
_LARGE = 2.0**24


class Moments(NamedTuple):
    """Batch statistics, and the input minus its mean."""

    centred: Inexact[Array, "*positions features"]  # times `unit`
    unit: Float[Array, " features"]  # a power of two, about 1 / sqrt(var) but at most 1
    relative: Float[Array, " features"]  # var * unit**2
    mean: Inexact[Array, " features"]
    var: Float[Array, " features"]  # biased: divided by `weight`
    weight: Float[Array, ""] | int  # behind each mean: examples x positions, or the sum of the weights
    lost: Inexact[Array, " features"]  # in rounding `mean`: mean + lost has twice the digits

    def multiplier(self, epsilon: float | Float[Array, ""]) -> Float[Array, " features"]:
        """What `centred` is multiplied by, so that x - mean is divided by sqrt(var + epsilon)."""
        return inverse_sqrt(self.relative + self.unit * self.unit * epsilon)


def batch_moments(
    x: Inexact[Array, "*positions features"],
    weights: Bool[Array, "*positions 1"] | Float[Array, "*positions 1"] | None,
    axis_name: tuple[str, ...],
    use_fast_variance: bool,
) -> Moments:
    """Mean and variance of each feature over all positions of `x` and over the axes `axis_name`.

    Takes two reductions across `axis_name`, or one with `use_fast_variance`. `weights=None` gives every
    position the weight one. Values of weight zero are ignored, NaN included.
    """

    counted = None if weights is None else weights > 0

    def present(x: Array) -> Array:
        """Zeros in place of what is ignored, which has no part in a gradient either."""
        return x if counted is None else jnp.where(counted, x, 0)

    x = present(x)
    mean = jnp.zeros(x.shape[-1:], x.dtype)
    if weights is None:
        count = math.prod(x.shape[:-1]) * math.prod(map(lax.axis_size, axis_name))
        divisor = jnp.asarray(count, x.real.dtype)
        if not use_fast_variance:
            mean = totals([x], axis_name)[0] / divisor
    elif use_fast_variance:
        weights = weights.astype(x.real.dtype)
        count = jnp.squeeze(totals([weights], axis_name)[0], 0)
        divisor = jnp.where(count < 2.0**126, jnp.where(count > 0, count, 1), jnp.nan)
    else:
        mean, count, weights, divisor = _weighted_mean(x, weights, axis_name)
    # Neither y nor var changes when every x is shifted by the same amount. So differentiation, of any order,
    # may treat the first mean as a constant, which saves a reduction in the backward pass.
    # A compiler may fuse mean = sum * (1 / n) with x - mean in one use of d and not in another, which would
    # centre the two uses by different roundings of the mean. It cannot fuse through a rounding to one bit less.
    shift = _round(lax.stop_gradient(mean), bits=1)
    d = present(x - shift)
    c, square = lax.stop_gradient(_means(d, weights, divisor, axis_name))
    unit = _power_of_two(lax.rsqrt(jnp.maximum(square - _square(c), 1)))
    d = d * unit
    c, square = _derived(axis_name, [c * unit, square * unit * unit], d, weights, divisor)
    centred, var = present(d - spread(c, x, axis_name)), square - _square(c)
    var = jnp.where(var < 0, 0, var)
    var = var + 0 * lax.stop_gradient(var)  # NaN if it overflowed: by an infinite one every result would be zero
    c = c / unit
    mean = shift + c
    return Moments(centred, unit, var, mean, var / unit / unit, count, c - (mean - shift))


def _weighted_mean(x: Array, weights: Array, axis_name: tuple[str, ...]) -> tuple[Array, Array, Array, Array]:
    """The mean, the sum of the weights, and both in a range where no product with `x` is lost."""
    real = x.real.dtype
    # A product of weight and input below 1.2e-38 is zero on a CPU. So small weights have a sum of their own.
    small = [] if weights.dtype == jnp.bool else [jnp.where(weights < _SMALL, weights * _RAISE, 0).astype(real)]
    weights = weights.astype(real)
    sums = totals([*(w * x for w in (weights, *small)), weights], axis_name)
    count = jnp.squeeze(sums[-1], 0)
    # Only ratios of weights matter, so that a large or small sum of them is made about one.
    root = _inverse_root(count)
    divisor = jnp.where(count < jnp.inf, jnp.where(count > 0, count * root * root, 1), jnp.nan)
    mean = sums[0] * root * root / divisor
    if small:
        mean = jnp.where(count < _SMALL, sums[1] * root * (root / _RAISE) / divisor, mean)
    return mean, count, weights * root * root, divisor


def _means(d: Array, weights: Array | None, divisor: Array, axis_name: tuple[str, ...]) -> list[Array]:
    """Of `d` and of its square, in one reduction."""
    weighted = d if weights is None else weights * d
    return [sum_ / divisor for sum_ in totals([weighted, _product(weighted, d)], axis_name)]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _derived(
    axis_name: tuple[str, ...], values: list[Array], d: Array, weights: Array | None, divisor: Array
) -> list[Array]:
    """`values`, which are the `_means`, as they follow from `d`: nothing is summed again but for derivatives."""
    return values


@_derived.defjvp
def _derived_jvp(axis_name: tuple[str, ...], primals: tuple, tangents: tuple) -> tuple[list[Array], list[Array]]:
    means = partial(_means, axis_name=axis_name)
    return _derived(axis_name, *primals), jax.jvp(means, primals[1:], tangents[1:])[1]


@jax.custom_jvp
def inverse_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / sqrt(x)`, whose derivative never has a factor x**-1.5: that of x = 1e26 is zero in float32."""
    return lax.rsqrt(x)


@inverse_sqrt.defjvp
def _inverse_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    y = inverse_sqrt(x)
    return y, y * t / x * -0.5


def _inverse_root(count: Float[Array, ""]) -> Float[Array, ""]:
    """One for an ordinary sum of weights, else a power of two, about 1 / sqrt(count).

    A weight times both a root and an input, and again, is in the range of float32, whatever the order of `count`.
    """
    ordinary = (count == 0) | (count >= _SMALL) & (count <= _LARGE)
    return _power_of_two(lax.rsqrt(jnp.where(ordinary, 1, count)))


def unbiased_var(moments: Moments, weights: Array | None, axis_name: tuple[str, ...]) -> Float[Array, " features"]:
    """The variance times n / (n - 1), where n is the number of values; of weights, Kish's effective sample size."""
    size = count = moments.weight
    if weights is not None:
        root = _inverse_root(jnp.asarray(count))
        weights, count = weights.astype(root.dtype) * root * root, count * root * root
        squares = lax.psum(jnp.sum(weights * weights), axis_name)
        size = count * (count / jnp.where(squares > 0, squares, 1))  # exactly count, if all weights are 0 or 1
    # A size within rounding of one is one: a single value has all the weight.
    return moments.var * jnp.where(size > 1 + _ROUNDING, size / jnp.maximum(size - 1, _ROUNDING), 1)


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


def _round(x: Array, *, bits: int) -> Array:
    """`x` to so many bits less than its type has."""
    if jnp.iscomplexobj(x):
        return lax.complex(_round(x.real, bits=bits), _round(x.imag, bits=bits))
    precision = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, precision.nexp, precision.nmant - bits)


def _power_of_two(x: Array) -> Array:
    """The nearest one to a real `x`, as a constant: what is multiplied by it is divided by it again."""
    return _round(lax.stop_gradient(x), bits=jnp.finfo(x.dtype).nmant)
