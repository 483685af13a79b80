"""Checks of the images that a trained network is given."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def require_images(images: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`images` as an array, `shape` for one image, `(images, *shape)` for many, with its pixels in their own type.

    Args:
      images: as `TrainedRun.predict` takes them.
      shape: of one image, `(height, width)` or `(height, width, channels)`.

    Raises:
      ValueError: they have another shape, type or range.
    """
    try:
        images = np.asarray(images)
    except (TypeError, ValueError):
        raise ValueError("images: got what is no array of numbers; expected images of one size") from None
    size = int(np.prod(shape))
    one = {shape, (size,), (*shape[:2], *(shape[2:] or (1,)))}
    if images.shape in one:
        result = shape
    elif images.shape[1:] in one:
        result = (len(images), *shape)
    else:
        described = " or ".join(map(str, sorted(one, key=len, reverse=True)))
        raise ValueError(
            f"images: got an array of shape {images.shape}; expected {described} for one image, with a leading axis "
            f"for many"
        )
    if images.dtype != np.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images: got {images.dtype}; expected uint8 from 0 to 255, or floats from 0 to 1")
        low, high = (images.min(), images.max()) if images.size else (0, 0)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images: got floats from {low} to {high}; expected 0 to 1. Divide what is from 0 to 255 by 255."
            )
    return images.reshape(result)
