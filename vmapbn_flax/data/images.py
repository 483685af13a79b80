"""PNG and JPEG files, whose kind and size are looked at before a pixel is decoded."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image as pillow
from PIL import ImageOps
from PIL.Image import Image, Resampling
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from vmapbn_flax.data.splits import described
from vmapbn_flax.errors import UsageError, first_line
from vmapbn_flax.files import read_file

SUFFIXES = (".png", ".jpg", ".jpeg")

_MOST_PIXELS = 2**26  # of one image
_MOST_BYTES = 3e8  # of one file
_CHANNELS = {"L": (), "RGB": (3,)}  # by Pillow's name of the mode
_MODES = {(): "L", (1,): "L", (3,): "RGB", (4,): "RGBA"}
_SIXTEEN_BITS = ("I", "I;16", "I;16B")
_TRANSPARENT = ("LA", "PA", "RGBA")
_ORIENTATION = 0x0112  # the tag in the EXIF data of a JPEG
_READERS: dict[bytes, Callable[[Any], Image]] = {b"\x89PNG": PngImageFile, b"\xff\xd8": JpegImageFile}


def image_shape(path: Path) -> tuple[int, ...]:
    """`(height, width)` of a grey image, `(height, width, 3)` of one in colour, from the file's header.

    Raises:
      UsageError: the file is not an image of one of these kinds, or has more than 2**26 pixels.
    """
    with _opened(path) as image:
        _require_decodable(image, path)
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


def read_converted(
    path: Path, shape: tuple[int, ...], *, strict: bool = False
) -> tuple[UInt8[np.ndarray, "height width *channels"], tuple[str, ...]]:
    """The pixels of an image of any size and mode, brought to `shape`, and what had to be done to it, in words.

    It is turned as its EXIF data says, brought to grey or colour of 8 bits, with white behind what is transparent, and
    resized by Lanczos's filter, whatever its proportions. An image that has `shape` comes out as `read_image` gives it.

    Raises:
      UsageError: the image cannot be read, or would have to be changed and `strict` is true; or there are no images of
        so many channels.
    """
    height, width, *channels = shape
    mode = _MODES.get(tuple(channels))
    if mode is None:
        raise UsageError(f"{path}: got an image for a network of {channels[0]} channels; expected an array, as .npy.")
    with _opened(path) as opened:
        _require_decodable(opened, path)
        got = f"{opened.height} x {opened.width} in the mode {opened.mode}"
        opened.draft(None, (4 * width, 4 * height))  # a large JPEG is decoded smaller, in less time
        image, done = _upright(opened), []
        if image is not opened:
            done.append("turned upright")
        if image.mode in _SIXTEEN_BITS:
            image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if mode != "RGBA" and (image.mode in _TRANSPARENT or "transparency" in image.info):
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                done.append("laid on white")
            image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
        if opened.mode != mode:
            done.append("made grey of 8 bits" if mode == "L" else "made colour of 8 bits")
        image = image.convert(mode)
        if image.size != (width, height):
            done.append(f"resized to {height} x {width}")
            image = image.resize((width, height), Resampling.LANCZOS, reducing_gap=3.0)
        if done and strict:
            raise UsageError(
                f"{path}: got an image of {got}, which would have to be {' and '.join(done)}; expected "
                f"{described(shape)}. Convert it yourself, or leave --strict out."
            )
        return np.asarray(image).reshape(shape), tuple(done)


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


def _upright(image: Image) -> Image:
    """The image turned as its EXIF data says; itself, where they say nothing or cannot be read."""
    with contextlib.suppress(Exception):
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _require_decodable(image: Image, path: Path) -> None:
    if (pixels := image.width * image.height) > _MOST_PIXELS:
        raise UsageError(
            f"{path}: got an image of {image.height} x {image.width}, {pixels / 1e6:.0f} million pixels; expected "
            f"at most {_MOST_PIXELS / 1e6:.0f} million. Make the images smaller."
        )


def _unreadable(path: Path, got: str) -> UsageError:
    return UsageError(f"{path}: got {got}; expected a whole PNG or JPEG image. Replace the file, or take it away.")


def _shape(image: Image, path: Path) -> tuple[int, ...]:
    if image.mode not in _CHANNELS:
        raise UsageError(
            f"{path}: got pixels of the kind {image.mode}; expected grey or RGB of 8 bits, without transparency or a "
            f"palette. Convert the image."
        )
    return (image.height, image.width, *_CHANNELS[image.mode])
