"""A data set: its name and its splits, which read examples by their numbers."""

import abc
import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Integer, Shaped, UInt8

from vmapbn_flax.errors import UsageError

_SAMPLE = 256  # examples that a fingerprint looks at in files
_FEW = 16  # examples whose borders are looked at
_BLOCK = 1024  # examples in one read; one at a time takes three times as long


class Examples(abc.ABC):
    """Labelled images in a fixed order, in memory or in files."""

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image: `(height, width)` when grey, otherwise `(height, width, channels)`."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, examples: slice) -> "Examples":
        """The examples of a slice, in the same order."""

    @abc.abstractmethod
    def read(self, rows: Integer[np.ndarray, " rows"]) -> "Split":
        """The examples whose numbers, counted from 0, are `rows`, in that order.

        Raises:
          UsageError: an example cannot be read, or has another shape or label than the data set declares.
        """

    @property
    def nbytes(self) -> int:
        """Bytes that the examples take as the arrays of a `Split`."""
        return len(self) * (math.prod(self.image_shape) + np.dtype(np.int32).itemsize)

    def _sample(self) -> "Split":
        """Examples that stand for all of them."""
        return self.read(np.linspace(0, len(self) - 1, min(len(self), _SAMPLE)).astype(np.int64))

    def fingerprint(self) -> str:
        """What differs where the examples or their order do; of examples in files, by a sample of them.

        Raises:
          UsageError: an example of the sample cannot be read.
        """
        sample = self._sample()
        digest = hashlib.sha256(np.ascontiguousarray(sample.images).data)
        digest.update(np.ascontiguousarray(sample.labels).data)
        shape = "x".join(map(str, self.image_shape))
        return f"{len(self)} images of {shape}, {digest.hexdigest()[:16]}"


@dataclasses.dataclass(frozen=True)
class Split(Examples):
    """Examples as arrays in memory.

    Attributes:
      images: intensities from 0 to 255, `(examples, height, width)` when grey, otherwise
        `(examples, height, width, channels)`.
      labels: the class of each image, from 0.
    """

    images: UInt8[np.ndarray, "examples height width *channels"]
    labels: Int32[np.ndarray, " examples"]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, examples: slice) -> "Split":
        return Split(self.images[examples], self.labels[examples])

    def read(self, rows: Integer[np.ndarray, " rows"]) -> "Split":
        return Split(self.images[rows], self.labels[rows])

    def _sample(self) -> "Split":
        return self


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of one data set; `validation` is None where the config asks for none.

    Attributes:
      streamed: whether training reads the examples batch by batch. Otherwise the splits are arrays, and the
        device holds them whole.
      class_names: a name for each label; the digits where the data set has no names.
    """

    name: str
    num_classes: int
    train: Examples
    test: Examples
    validation: Examples | None = None
    streamed: bool = False
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(map(str, range(self.num_classes))))

    @property
    def splits(self) -> dict[str, Examples]:
        """The splits that there are, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that all splits take as arrays."""
        return sum(split.nbytes for split in self.splits.values())

    @property
    def gigabytes(self) -> float:
        """The smallest `data.memory_limit` that admits this data set, rounded up to a hundredth."""
        return math.ceil(self.nbytes / 1e7) / 100

    def described(self) -> dict[str, Any]:
        """What has to be known of the data where a trained network is used without them, as JSON.

        `border` is the mean of the outermost pixels of a few training images, from 0 to 1.

        Raises:
          UsageError: one of these images cannot be read.
        """
        rows = np.linspace(0, len(self.train) - 1, min(len(self.train), _FEW)).astype(np.int64)
        return {
            "image_shape": list(self.train.image_shape),
            "class_names": list(self.class_names),
            "border": round(float(border(self.train.read(rows).images).mean()), 3),
        }

    def fingerprint(self) -> dict[str, str]:
        """`Examples.fingerprint` of each split."""
        return {name: split.fingerprint() for name, split in self.splits.items()}


def border(images: Shaped[np.ndarray, "examples height width *channels"]) -> Float[np.ndarray, " examples"]:
    """The mean of the outermost pixels of each image, from 0 to 1, of images in uint8 or in floats."""
    outermost = np.ones(images.shape[1:3], bool)
    outermost[1:-1, 1:-1] = False
    pixels = images[:, outermost]  # (examples, pixels, *channels)
    mean = pixels.mean(tuple(range(1, pixels.ndim)), dtype=np.float64)
    return mean / 255 if images.dtype == np.uint8 else mean


def expanded(name: str) -> Path:
    """`name` as a path, with `~` and `~user` replaced by home directories.

    Raises:
      UsageError: the home directory is not known.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(
            f"data.dir: got {name}, a home that is not known here; expected a directory. Write it without a ~."
        ) from None


def gather(
    examples: Examples,
    rows: Integer[np.ndarray, " rows"],
    stopped: Callable[[], bool] = lambda: False,
    on_read: Callable[[int], object] = lambda count: None,
) -> Split:
    """`examples.read(rows)`, a block at a time, with zeros where a row is -1.

    Asks `stopped` before each block; once it is true, the rest stays zero. Calls `on_read` with the number of examples
    in a block when it is read.
    """
    images, labels = np.zeros((len(rows), *examples.image_shape), np.uint8), np.zeros(len(rows), np.int32)
    (wanted,) = np.nonzero(rows >= 0)
    for start in range(0, len(wanted), _BLOCK):
        if stopped():
            break
        places = wanted[start : start + _BLOCK]
        block = examples.read(rows[places])
        images[places], labels[places] = block.images, block.labels
        on_read(len(places))
    return Split(images, labels)
