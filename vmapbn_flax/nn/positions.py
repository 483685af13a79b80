"""Sums over positions and batch, and broadcasts against them, in the order of operations that is fast on a CPU.

XLA's CPU code for a sum over several axes takes ten times as long as one over a single short axis that is not the last:
that one is unrolled and vectorised, and computes what it sums on the way. So a sum starts with pieces of the last
position axis. The gradient of a broadcast is a sum; `spread` broadcasts in two steps as well, so that this sum is a
fast one too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

_LONGEST = 16  # numbers in a piece: with 8 or 32 a layer takes longer, forward and backward


def totals(terms: Sequence[Inexact[Array, "*positions _"]], axis_name: tuple[str, ...]) -> list[Inexact[Array, " _"]]:
    """The sum of each term over all its positions and over the axes `axis_name`, in one reduction across these."""

    def own(x: Array) -> Array:
        if _takes_steps(x, axis_name):
            *outer, width, features = x.shape
            x = lax.optimization_barrier(jnp.sum(x.reshape(*outer, -1, _piece(width), features), -2))
            # Example by example, then over the batch: a sum of many numbers in a row loses digits. The sum of an
            # example is a product with ones: a second sum would be fused with the first, to a slow one over two axes.
            examples = () if axis_name else outer[:1]
            x = x.reshape(*examples, -1, features)
            x = _own_to_each(jnp.ones((*examples, 1, x.shape[-2]), x.dtype), axis_name) @ x
        return jnp.sum(x, tuple(range(x.ndim - 1)))

    return lax.psum([own(x) for x in terms], axis_name)


def spread(
    v: Inexact[Array, " features"],
    x: Inexact[Array, "*positions features"],
    axis_name: tuple[str, ...],
    replica_axis_name: tuple[str, ...] = (),
) -> Inexact[Array, "*some features"]:
    """`v` for each example, in a shape that broadcasts to that of `x`."""
    if not _takes_steps(x, axis_name):
        return v
    # Otherwise the gradient would be summed over the batch and over positions at once, outside `vmap`.
    v = _own_to_each(v, axis_name + replica_axis_name)
    *outer, width, features = x.shape
    piece = _piece(width)
    v = lax.optimization_barrier(jnp.broadcast_to(v, (*outer, width // piece, 1, features)))
    return jnp.broadcast_to(v, (*outer, width // piece, piece, features)).reshape(x.shape)


def _own_to_each(v: Array, axis_name: tuple[str, ...]) -> Array:
    """`v`, which from here on differs between examples as far as `vmap` knows: an integer zero of each is added."""
    for name in axis_name:
        v = v + (0 * lax.axis_index(name)).astype(v.dtype)
    return v


def _piece(width: int) -> int:
    """The largest divisor up to `_LONGEST`; all of it, if that is 1."""
    return max((n for n in range(2, _LONGEST + 1) if width % n == 0), default=width)


def _takes_steps(x: Array, axis_name: tuple[str, ...]) -> bool:
    """Whether there are several axes to sum over, and a CPU to do it; other backends get one plain sum."""
    return x.ndim > 1 and x.ndim - 1 + len(axis_name) > 1 and jax.default_backend() == "cpu"
