"""Sets of labelled images, in memory or on the disk: the bundled MNIST, a person's own files, and sets prepared by
tensorflow-datasets.

Uses numpy, Pillow and, for prepared sets, tensorflow-datasets; of this package `errors` and `files`. Nothing here
imports JAX.
"""

import dataclasses
import importlib

from ml_collections import ConfigDict

from vmapbn_flax.data import bundled, prepared
from vmapbn_flax.data.arrays import Dataset, Examples, Split, expanded
from vmapbn_flax.data.binary import binarised
from vmapbn_flax.data.splits import require_test
from vmapbn_flax.errors import UsageError

__all__ = ["Dataset", "Examples", "Split", "load_dataset"]

_FORMATS = ("idx", "npz", "folder")  # of a person's own files, each a module here with a function `load`


def load_dataset(data: ConfigDict) -> Dataset:
    """Loads a data set from this machine; nothing is ever downloaded.

    Examples:
      >>> from vmapbn_flax import default_config
      >>> from vmapbn_flax.data import load_dataset
      >>> data = default_config().data
      >>> data.validation_size = 5_000
      >>> mnist = load_dataset(data)
      >>> len(mnist.train), len(mnist.validation), len(mnist.test), mnist.train.images.shape[1:]
      (55000, 5000, 10000, (28, 28))

    Args:
      data: the section `data` of a config.
        `name`: "mnist", the bundled set; "idx", "npz" or "folder", files of one's own, as docs/data.md describes
        them; or a data set that tensorflow-datasets has prepared as array_record: "fashion_mnist", "name/config",
        "name:1.0.0", "name/config:1.0.0".
        `dir`: where to look. "mnist": a directory with the four files; "" for the bundled ones. "idx", "npz",
        "folder": where the files are. Any other name: the directory of tensorflow-datasets; "" for $TFDS_DATA_DIR
        or ~/tensorflow_datasets.
        `test_fraction`: the share of each class that becomes the test split of files that have none.
        `threshold`: the brightness, from 0 to 1, from which on a pixel of any split becomes 255, while one below it
        becomes 0; by default all stay as they are.
        `validation_size`: how many examples at the end of the training split become the validation split.
        `memory_limit`: the most gigabytes that the images and labels may take as arrays. A larger data set is
        `streamed`: a prepared set or a folder stays on the disk and its splits are read piece by piece; the bundled
        set is in memory anyway; "idx" and "npz" are refused.

    Raises:
      UsageError: the data is missing, damaged or not of this kind, or too small for `data.validation_size`.
    """
    max_bytes = data.memory_limit * 1e9
    dataset = _load(data, max_bytes)
    dataset = dataclasses.replace(dataset, streamed=dataset.nbytes > max_bytes)
    if data.threshold:
        train, test = (binarised(split, data.threshold) for split in (dataset.train, dataset.test))
        dataset = dataclasses.replace(dataset, train=train, test=test)
    train, size = dataset.train, data.validation_size
    if not 0 <= size < len(train):
        raise UsageError(
            f"data.validation_size: got {size}; expected 0 to {len(train) - 1}, for {data.name} has {len(train)} "
            f"training examples and one must remain. Choose a smaller validation_size."
        )
    if size == 0:
        return dataset
    return dataclasses.replace(dataset, train=train[:-size], validation=train[-size:])


def _load(data: ConfigDict, max_bytes: float) -> Dataset:
    if data.name in _FORMATS:
        if not data.dir:
            raise UsageError(
                f"data.dir: got ''; expected where the files are, for data.name={data.name}. "
                f"Say so with --config.data.dir=..."
            )
        # Only when it is used, for imaging libraries take a while to import.
        load = importlib.import_module(f"vmapbn_flax.data.{data.name}").load
        return load(expanded(data.dir), data.test_fraction, max_bytes)
    require_test(True, data.test_fraction, data.name)
    return bundled.load(data.dir) if data.name == bundled.NAME else prepared.load(data.name, data.dir, max_bytes)
