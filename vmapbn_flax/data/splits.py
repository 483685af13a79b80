"""The splits of a person's own files: checked, and a test split held out where the files have none."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from vmapbn_flax.data.arrays import Dataset, Split
from vmapbn_flax.errors import UsageError

_MOST_CHANNELS = 4


class ArrayFile(NamedTuple):
    """An array, and the name of what holds it for errors."""

    where: str
    array: np.ndarray


def make_dataset(
    directory: Path,
    train: tuple[ArrayFile, ArrayFile],
    test: tuple[ArrayFile, ArrayFile] | None,
    test_fraction: float,
    max_bytes: float,
) -> Dataset:
    """The data set of images and labels in memory.

    Args:
      directory: the name of the data set.
      train: images, `(examples, height, width)` or `(examples, height, width, channels)` in uint8, and their labels,
        integers from 0, `(examples,)` or `(examples, 1)`.
      test: the same, with images of the same size, and labels that are in `train`'s range.
      test_fraction: see `hold_out`; 0 where there is a test split.
      max_bytes: that the arrays may take.

    Raises:
      UsageError: the arrays are of other kinds, or take more than `max_bytes`; there are fewer than two classes; or
        see `require_test`.
    """
    require_test(test is not None, test_fraction, str(directory))
    images, labels = _images(train[0]), _labels(*train)
    num_classes = require_classes(labels, train[1].where)
    split = Split(images, labels)
    if test is None:
        rest, held_out = hold_out(labels, test_fraction, train[1].where)
        parts = split.read(rest), split.read(held_out)
    else:
        test_images, test_labels = _images(test[0]), _labels(*test)
        if test_images.shape[1:] != images.shape[1:]:
            raise UsageError(
                f"{test[0].where}: got images of {described(test_images.shape[1:])}; expected "
                f"{described(images.shape[1:])}, as in {train[0].where}. Bring all images to one size."
            )
        if test_labels.max() >= num_classes:
            raise UsageError(
                f"{test[1].where}: got labels up to {test_labels.max()}; expected 0 to {num_classes - 1}, those of "
                f"{train[1].where}. Leave the other classes out."
            )
        parts = split, Split(test_images, test_labels)
    dataset = Dataset(str(directory), num_classes, *parts)
    if dataset.nbytes > max_bytes:
        raise UsageError(
            f"{directory}: got {dataset.gigabytes} GB of images; expected at most data.memory_limit="
            f"{max_bytes / 1e9:.3g}. Raise it, or make a folder of images, which is read piece by piece."
        )
    return dataset


def require_test(has_test: bool, test_fraction: float, where: str) -> None:
    """Checks that there is a test split, or a fraction to hold out, and not both.

    Raises:
      UsageError: there is neither, or both.
    """
    if has_test and test_fraction:
        raise UsageError(
            f"data.test_fraction: got {test_fraction}; expected 0, for {where} has a test split. "
            f"Leave data.test_fraction out."
        )
    if not has_test and not test_fraction:
        raise UsageError(
            f"{where}: got no test split; expected one, or a data.test_fraction of the training examples to hold out. "
            f"Set it with --config.data.test_fraction=0.1."
        )


def require_classes(labels: Integer[np.ndarray, " examples"], where: str) -> int:
    """The number of classes: one more than the largest label.

    Raises:
      UsageError: there is one class, or classes are not counted from 0.
    """
    largest = int(labels.max())
    if largest >= len(labels):
        raise UsageError(
            f"{where}: got labels up to {largest} for {len(labels)} examples; expected classes that are counted from "
            f"0. Number them so."
        )
    if labels.min() == largest:
        raise UsageError(
            f"{where}: got the one label {largest} in all {len(labels)} examples; expected two classes or more."
        )
    return largest + 1


def hold_out(
    labels: Integer[np.ndarray, " examples"], fraction: float, where: str
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """The numbers of the examples that stay, and of those that are held out as the test split, each ascending.

    Of each class `fraction` is held out, rounded, at least one example and never the last; which ones is a function
    of the labels alone, the same for every seed, process and version of NumPy.

    Raises:
      UsageError: no class has two examples; `where` names the labels.
    """
    order = permutation(len(labels))
    shuffled = labels[order]
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[shuffled == label]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[:count]] = True
    if not held_out.any():
        raise UsageError(
            f"{where}: got one example of each class; expected a second one, to hold out. Add more examples."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def permutation(size: int) -> Int[np.ndarray, " size"]:
    """A fixed permutation; NumPy promises the same raw integers in every version, and not the same `permutation`."""
    return np.argsort(np.random.PCG64(0).random_raw(size), kind="stable")


def described(shape: tuple[int, ...]) -> str:
    """The shape of an image in words, such as "28 x 28, grey"."""
    height, width, *channels = shape
    kind = {(): "grey", (3,): "colour"}.get(tuple(channels), f"{channels[0] if channels else 1} channels")
    return f"{height} x {width}, {kind}"


def _images(file: ArrayFile) -> np.ndarray:
    """Images with an axis of channels where there are several."""
    where, images = file
    if images.dtype != np.uint8:
        raise UsageError(
            f"{where}: got images in {images.dtype}; expected intensities from 0 to 255 in uint8. Convert them."
        )
    valid = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] <= _MOST_CHANNELS)
    if not valid or 0 in images.shape:
        raise UsageError(
            f"{where}: got an array of shape {images.shape}; expected images, (examples, height, width) or "
            f"(examples, height, width, channels) with at most {_MOST_CHANNELS} channels. Reorder its axes."
        )
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def _labels(images: ArrayFile, file: ArrayFile) -> np.ndarray:
    """Labels in int32, one for each image."""
    where, labels = file
    count = len(images.array)
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise UsageError(
            f"{where}: got {labels.dtype} of shape {labels.shape}; expected {count} integers, one for each image in "
            f"{images.where}. Write both from the same examples."
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UsageError(
            f"{where}: got labels from {labels.min()} to {labels.max()}; expected classes that are counted from 0. "
            f"Number them so."
        )
    return labels.reshape(count).astype(np.int32)
