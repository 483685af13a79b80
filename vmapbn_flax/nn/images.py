"""What the networks of images share: convolutions, pooling, and masks of positions.

An image is `(height, width, channels)`, a batch `(batch, height, width, channels)`. The functions take both. A mask is
one of examples, with the batch axes alone, or one of positions, with the spatial axes too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from vmapbn_flax.nn.batch_norm import Mask

# He et al. 2015 (Delving Deep into Rectifiers): keeps the variance of what a relu halves.
he_normal = nn.initializers.he_normal()
_SMALL_PATCH = 32  # numbers; 3 x 3 of 3 channels are 27


def conv_norm(
    x: Array,
    mask: Mask | None,
    features: int,
    size: int,
    *,
    stride: int = 1,
    norm: Callable[..., nn.Module] | None,
    train: bool,
    dtype: Any,
    suffix: str,
    **norm_attributes: Any,
) -> tuple[Array, Array | None]:
    """A `size` x `size` convolution, `size` odd, and its norm, in the module that calls this; and their mask.

    Position `i` of the result is centred on position `stride * i` of `x`, which has zeros around it. A convolution that
    a norm follows has no bias, since the norm would subtract it.
    """
    window, padding = (size, size), size // 2
    conv = nn.Conv(
        features,
        window,
        stride,
        padding,
        use_bias=norm is None,
        kernel_init=he_normal,
        dtype=dtype,
        conv_general_dilated=_convolution,
        name=f"conv_{suffix}",
    )
    mask = stride_mask(mask, x, stride)
    x = conv(x)
    if norm is not None:
        x = norm(name=f"norm_{suffix}", **norm_attributes)(x, train=train, mask=mask)
    return x, mask


@jax.custom_jvp
def max_pool_relu(x: Array) -> Array:
    """The relu of the maximum of each 2 x 2 window; an odd last row or column is dropped, as in `flax.linen.max_pool`.

    On a CPU the gradient of `flax.linen.max_pool`, a select-and-scatter, takes several times as long.
    """
    # A reduction that starts at 0 is a relu as well. XLA's CPU code computes anything simpler twice, for the next
    # convolution and, ten times as slowly, in the transposed order in which the gradient of its kernel needs it.
    rows = jnp.where(*_larger(_windows(x), -2))
    return lax.reduce(rows, jnp.zeros((), x.dtype), lax.max, (rows.ndim - 3,))


@max_pool_relu.defjvp
def _max_pool_relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The gradient of jnp.maximum and of jnp.max goes to what equals the result. A compiler may round the two sides of
    # that comparison differently, and then it goes nowhere, or is 0 / 0. A selection has no such comparison.
    (x,), (tangent,) = primals, tangents
    left, a, b = _larger(_windows(x), -2)
    top, a, b = _larger(jnp.where(left, a, b), -3)
    tangent = jnp.where(left, *_halves(_windows(tangent), -2))
    tangent = jnp.where(top, *_halves(tangent, -3))
    return max_pool_relu(x), jnp.where(jnp.where(top, a, b) > 0, tangent, 0)


def pool_mask(mask: Mask | None, x: Array) -> Array | None:
    """The mask of `max_pool_relu(x)`: a window counts as much as the position in it that counts least."""
    if mask is None or not has_positions(mask, x):
        return mask
    return jnp.min(_windows(mask[..., None]), (-4, -2))[..., 0]


def stride_mask(mask: Mask | None, x: Array, stride: int) -> Array | None:
    """The mask of a convolution of `x` with a stride: that of the positions which its windows are centred on."""
    if mask is None or not has_positions(mask, x):
        return mask
    return mask[..., ::stride, ::stride]


def zero_positions(x: Array, mask: Mask | None) -> Array:
    """`x` with zeros where a mask of positions is zero, as a convolution has them around the image."""
    if mask is None or not has_positions(mask, x):
        return x
    return jnp.where(mask[..., None] != 0, x, 0)


def mean_of_positions(x: Array, mask: Mask | None) -> Array:
    """`(..., height, width, channels)` to `(..., channels)`: the mean, without positions that a mask has as zero."""
    if mask is None or not has_positions(mask, x):
        return jnp.mean(x, (-3, -2))
    present = (mask != 0)[..., None]
    return jnp.sum(x, (-3, -2), where=present) / jnp.maximum(jnp.sum(present, (-3, -2)), 1)


def _convolution(x: Array, kernel: Array, strides: Sequence[int], padding: Sequence, **options: Any) -> Array:
    """`lax.conv_general_dilated`; on a CPU, where patches are small, a product with them, three times as fast.

    The gradients are those of the convolution: the product's own would copy the whole cotangent.
    """

    def convolve(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    height, width, channels, _ = kernel.shape
    if max(strides) > 1 or height * width * channels > _SMALL_PATCH:
        return convolve(x, kernel)

    def multiply(x: Array, kernel: Array) -> Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        for axis, size in ((2, width), (1, height)):  # the kernel's last spatial axis is the patch's last but one
            shifts = [lax.slice_in_dim(x, i, i + x.shape[axis] - size + 1, axis=axis) for i in range(size)]
            x = jnp.concatenate(shifts, -1)
        return jnp.dot(x, kernel.reshape(-1, kernel.shape[-1]), precision=options["precision"])

    @jax.custom_jvp
    def product(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=multiply, default=convolve)

    @product.defjvp
    def jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, kernel), (dx, dkernel) = primals, tangents
        return product(x, kernel), convolve(dx, kernel) + convolve(x, dkernel)

    return product(x, kernel)


def has_positions(mask: Mask, x: Array) -> bool:
    """Whether the mask has the spatial axes of `x`."""
    return mask.ndim == x.ndim - 1


def require(network: nn.Module, x: Array, batched: bool) -> None:
    """Refuses an `x` that is no image, or no batch of them.

    Raises:
      ValueError: says which network takes it.
    """
    if x.ndim == 3 + batched:
        return
    name = type(network).__name__
    if batched:
        raise ValueError(
            f"{name}: got x of shape {x.shape}; expected a batch, (batch, height, width, channels). "
            f"For one image use {name.removeprefix('Batched')}, which has the same variables."
        )
    raise ValueError(
        f"{name}: got x of shape {x.shape}; expected one image, (height, width, channels), grey with one channel. "
        f"For a batch of them write VmapBatch({name}(...)), or use Batched{name}."
    )


def _larger(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """Whether the first of the two entries along `axis` is the maximum, and both of them."""
    a, b = _halves(x, axis)
    return (a >= b) | jnp.isnan(a), a, b


def _halves(x: Array, axis: int) -> tuple[Array, Array]:
    """The two entries of `x` along `axis`. The gradient is one concatenation; that of two indices is a sum of two."""
    a, b = lax.split(x, (1, 1), x.ndim + axis)
    return jnp.squeeze(a, axis), jnp.squeeze(b, axis)


def _windows(x: Array) -> Array:
    """`(..., height, width, channels)` to `(..., height // 2, 2, width // 2, 2, channels)`."""
    *batch, height, width, channels = x.shape
    x = x[..., : height // 2 * 2, : width // 2 * 2, :]
    return x.reshape(*batch, height // 2, 2, width // 2, 2, channels)
