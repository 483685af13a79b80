"""A data set: arrays in memory, and a name."""

import dataclasses

import numpy as np
from jaxtyping import Int32, UInt8


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images, in a fixed order.

    Attributes:
      images: intensities from 0 to 255, `(examples, height, width)` when grey, with a last axis of
        channels otherwise.
      labels: the class of each image, from 0.
    """

    images: UInt8[np.ndarray, "examples height width *channels"]
    labels: Int32[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, examples: slice) -> "Split":
        return Split(self.images[examples], self.labels[examples])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of one data set; `validation` is None where none was asked for."""

    name: str
    num_classes: int
    train: Split
    test: Split
    validation: Split | None = None
