"""Random changes of training images, made on the devices inside a step. Each is exact on uint8.

What happens to an example is a function of the key and of its place in the batch alone: not of the devices, the members
beside it, or how the data is read.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray, UInt8

from vmapbn_flax.errors import UsageError

Images = UInt8[Array, "batch height width *channels"]
Augment = Callable[[PRNGKeyArray, Images], Images]


def unchanged(key: PRNGKeyArray, images: Images) -> Images:
    """The change that is none."""
    return images


def make_augment(names: Sequence[str], image_shape: Sequence[int]) -> Augment:
    """`augment(key, images) -> images`, which makes the changes of `config.data.augment` in their order.

    Args:
      names: "shift:N", a shift by up to N pixels in each direction, with zeros beyond the border; "flip", left and
        right exchanged in half of the images; "cutout:N", a square of N by N pixels around a random one becomes zero
        (DeVries & Taylor, 2017).
      image_shape: `(height, width)` or `(height, width, channels)`.

    Raises:
      UsageError: a number does not fit the images.
    """
    changes: list[Callable] = []
    for name in names:
        kind, _, number = name.partition(":")
        if number and int(number) >= min(image_shape[:2]):
            raise UsageError(
                f"config.data.augment: got {name!r}, expected less than {min(image_shape[:2])}, for the images have "
                f"{image_shape[0]} x {image_shape[1]} pixels. Change it with --config.data.augment=..."
            )
        changes.append(partial(_CHANGES[kind], *([int(number)] if number else [])))

    def augment(key: PRNGKeyArray, images: Images) -> Images:
        for number, change in enumerate(changes):
            of_change = jax.random.fold_in(key, number)
            keys = jax.vmap(partial(jax.random.fold_in, of_change))(jnp.arange(len(images)))
            images = jax.vmap(change)(keys, images)
        return images

    return augment


Image = UInt8[Array, "height width *channels"]


def _shift(most: int, key: PRNGKeyArray, image: Image) -> Image:
    down, right = jax.random.randint(key, (2,), 0, 2 * most + 1)
    padded = jnp.pad(image, ((most, most), (most, most), *((0, 0) for _ in image.shape[2:])))
    return lax.dynamic_slice(padded, (down, right, *(0 for _ in image.shape[2:])), image.shape)


def _flip(key: PRNGKeyArray, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _cutout(size: int, key: PRNGKeyArray, image: Image) -> Image:
    def cut(centre: Array, length: int) -> Array:
        start = centre - size // 2
        places = jnp.arange(length)
        return (places >= start) & (places < start + size)

    height, width = image.shape[:2]
    row, column = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    inside = cut(row, height)[:, jnp.newaxis] & cut(column, width)
    return jnp.where(inside.reshape(height, width, *(1 for _ in image.shape[2:])), 0, image).astype(image.dtype)


_CHANGES: dict[str, Callable] = {"shift": _shift, "flip": _flip, "cutout": _cutout}
