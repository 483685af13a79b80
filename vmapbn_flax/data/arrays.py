"""A data set: a name, and splits of which examples can be asked for by their numbers."""

import abc
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from vmapbn_flax.errors import UsageError

_BLOCK = 1024  # examples; read together they take a third of the time


class Examples(abc.ABC):
    """Labelled images in a fixed order, wherever they are."""

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """That of one image: `(height, width)` when grey, with a last axis of channels otherwise."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, examples: slice) -> "Examples":
        """A run of them, in the same order."""

    @abc.abstractmethod
    def read(self, rows: Integer[np.ndarray, " rows"]) -> "Split":
        """The examples of these numbers, from 0, in the order of `rows`.

        Raises:
          UsageError: one cannot be read, or is not what the data set says it is.
        """

    @property
    def nbytes(self) -> int:
        """What all of them take as the arrays of a `Split`."""
        return len(self) * (math.prod(self.image_shape) + np.dtype(np.int32).itemsize)


@dataclasses.dataclass(frozen=True)
class Split(Examples):
    """Examples as arrays in memory.

    Attributes:
      images: intensities from 0 to 255, `(examples, height, width)` when grey, with a last axis of
        channels otherwise.
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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of one data set; `validation` is None where none was asked for.

    Attributes:
      streamed: whether training is to read the examples as it goes; otherwise the splits are arrays, and
        are put on the device whole.
    """

    name: str
    num_classes: int
    train: Examples
    test: Examples
    validation: Examples | None = None
    streamed: bool = False

    @property
    def nbytes(self) -> int:
        """What all splits take as arrays."""
        return sum(split.nbytes for split in (self.train, self.test, self.validation) if split is not None)

    @property
    def gigabytes(self) -> float:
        """The smallest memory limit, to a hundredth, that this fits."""
        return math.ceil(self.nbytes / 1e7) / 100


def expanded(name: str) -> Path:
    """`name` as a path, `~` and `~user` being the homes of users.

    Raises:
      UsageError: no such user is known.
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
) -> Split:
    """`examples.read(rows)`, a block at a time; zeros where a row is -1, and from the block on before `stopped()`."""
    images, labels = np.zeros((len(rows), *examples.image_shape), np.uint8), np.zeros(len(rows), np.int32)
    (wanted,) = np.nonzero(rows >= 0)
    for start in range(0, len(wanted), _BLOCK):
        if stopped():
            break
        places = wanted[start : start + _BLOCK]
        block = examples.read(rows[places])
        images[places], labels[places] = block.images, block.labels
    return Split(images, labels)
