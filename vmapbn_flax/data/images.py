"""PNG and JPEG files, whose kind and size are looked at before a pixel is decoded."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from vmapbn_flax.data.records import first_line
from vmapbn_flax.data.splits import described
from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import read_file

_MOST_PIXELS = 2**26  # of one image
_MOST_BYTES = 3e8  # of one file
_CHANNELS = {"L": (), "RGB": (3,)}  # by Pillow's name of the mode
_READERS: dict[bytes, Callable[[Any], Image]] = {b"\x89PNG": PngImageFile, b"\xff\xd8": JpegImageFile}


def image_shape(path: Path) -> tuple[int, ...]:
    """`(height, width)` of a grey image, `(height, width, 3)` of one in colour, from the file's header.

    Raises:
      UsageError: the file is not an image of one of these kinds, or has more than 2**26 pixels.
    """
    with _opened(path) as image:
        if (pixels := image.width * image.height) > _MOST_PIXELS:
            raise UsageError(
                f"{path}: got an image of {image.height} x {image.width}, {pixels / 1e6:.0f} million pixels; expected "
                f"at most {_MOST_PIXELS / 1e6:.0f} million. Make the images smaller."
            )
        return _shape(image, path)


def read_image(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "height width *channels"]:
    """The pixels of an image that has to have that shape. Any other is refused before it is decoded.

    Raises:
      UsageError: the image has another shape, or cannot be read.
    """
    with _opened(path) as image:
        if (got := _shape(image, path)) != shape:
            raise UsageError(
                f"{path}: got an image of {described(got)}; expected {described(shape)}, as the first image has. "
                f"Bring all images to one size and kind."
            )
        return np.asarray(image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """The image in a file, of which only the header is read yet; every error names the file."""
    try:
        content = read_file(path, _MOST_BYTES)
        reader = next((reader for magic, reader in _READERS.items() if content.startswith(magic)), None)
        if reader is None:
            raise _unreadable(path, "neither PNG nor JPEG")
        with reader(io.BytesIO(content)) as image:  # of the file itself, Pillow allocates what a chunk claims to have
            yield image
    except UsageError:
        raise
    except Exception as error:  # a damaged image may raise anything
        got = getattr(error, "strerror", None) or f"a damaged image ({first_line(error)})"
        raise _unreadable(path, got) from None


def _unreadable(path: Path, got: str) -> UsageError:
    return UsageError(f"{path}: got {got}; expected a whole PNG or JPEG image. Replace the file, or take it away.")


def _shape(image: Image, path: Path) -> tuple[int, ...]:
    if image.mode not in _CHANNELS:
        raise UsageError(
            f"{path}: got pixels of the kind {image.mode}; expected grey or RGB of 8 bits, without transparency or a "
            f"palette. Convert the image."
        )
    return (image.height, image.width, *_CHANNELS[image.mode])
