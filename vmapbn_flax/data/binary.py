"""Images in black and white, by a threshold."""

import dataclasses

import numpy as np
from jaxtyping import Integer

from vmapbn_flax.data.arrays import Examples, Split


def binarised(examples: Examples, threshold: float) -> Examples:
    """`examples` with 255 for each intensity that is at least `threshold` times 255, else 0.

    Each channel of a colour image counts by itself. Examples in files are changed when they are read.
    """
    least = least_white(threshold)
    return _binarised(examples, least) if isinstance(examples, Split) else Binarised(examples, least)


def least_white(threshold: float) -> int:
    """The least intensity that `threshold` makes white."""
    return int(np.sum(np.arange(256, dtype=np.float32) / 255 < np.float32(threshold)))


@dataclasses.dataclass(frozen=True)
class Binarised(Examples):
    """Examples in files, with 255 for each intensity that is at least `least`, else 0."""

    examples: Examples
    least: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.examples.image_shape

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, examples: slice) -> "Binarised":
        return dataclasses.replace(self, examples=self.examples[examples])

    def read(self, rows: Integer[np.ndarray, " rows"]) -> Split:
        return _binarised(self.examples.read(rows), self.least)


def _binarised(split: Split, least: int) -> Split:
    return Split(np.where(split.images >= least, np.uint8(255), np.uint8(0)), split.labels)
