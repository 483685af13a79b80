"""Data sets of a person's own, written as files to test with."""

import gzip
import struct

import numpy as np
import PIL.Image

from tests.helpers import small
from vmapbn_flax import default_config
from vmapbn_flax.data import Split, load_dataset

NAMES = ("cat", "dog", "eel", "fox")
IDX = {"train": "train-{}-idx{}-ubyte.gz", "test": "t10k-{}-idx{}-ubyte.gz"}


def load(name, where, **fields):
    """The data set in the files `where`, with `fields` of `config.data`."""
    data = default_config().data
    data.update(name=name, dir=str(where), **fields)
    return load_dataset(data)


def examples(size, seed, shape=(8, 9)):
    """Random images, with labels that have each class in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size, dtype=np.int32) % small.CLASSES
    return Split(rng.integers(0, 256, (size, *shape)).astype(np.uint8), labels)


def idx_bytes(array, code=8):
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(directory, **splits):
    """The files of MNIST's format; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        for kind, array in (("images", part.images), ("labels", part.labels)):
            path = directory / IDX[split].format(kind, array.ndim)
            path.write_bytes(gzip.compress(idx_bytes(array), 1))
    return directory


def write_folder(directory, suffix="png", **splits):
    """A folder of images, numbered in each class; returns `directory`."""
    for split, part in splits.items():
        for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            path = directory / split / NAMES[label] / f"{number:04}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(path)
    return directory


def assert_equal(got, expected):
    """Two splits, bit for bit."""
    assert (got.images.dtype, got.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(got.images, expected.images)
    np.testing.assert_array_equal(got.labels, expected.labels)
