"""Sets of labelled images, in memory or on the disk: the bundled MNIST, and sets prepared by tensorflow-datasets.

Uses numpy and, for prepared sets, tensorflow-datasets; of this package `errors` alone. Nothing here imports JAX.
"""

import dataclasses
import math

from vmapbn_flax.data import bundled, prepared
from vmapbn_flax.data.arrays import Dataset, Examples, Split
from vmapbn_flax.errors import UsageError

__all__ = ["Dataset", "Examples", "Split", "load_dataset"]


def load_dataset(name: str, data_dir: str = "", validation_size: int = 0, memory_limit: float = math.inf) -> Dataset:
    """Loads a data set from this machine; nothing is ever downloaded.

    >>> from vmapbn_flax.data import load_dataset
    >>> mnist = load_dataset("mnist", validation_size=5_000)
    >>> len(mnist.train), len(mnist.validation), len(mnist.test), mnist.train.images.shape[1:]
    (55000, 5000, 10000, (28, 28))

    Args:
      name: "mnist", the bundled set; or a data set that tensorflow-datasets has prepared as array_record:
        "fashion_mnist", "name/config", "name:1.0.0", "name/config:1.0.0".
      data_dir: where to look. "mnist": a directory with the four files, instead of the bundled ones.
        Any other name: tensorflow-datasets' directory, by default $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      validation_size: how many examples at the end of the training split become the validation split.
      memory_limit: the most gigabytes that the images and labels may take as arrays. A larger data set is
        `streamed`: a prepared one stays on the disk, its splits being read when they are asked; the bundled
        one is in memory anyway.

    Raises:
      UsageError: the data is missing, damaged or not of this kind, or too small for `validation_size`.
    """
    max_bytes = memory_limit * 1e9
    dataset = bundled.load(data_dir) if name == bundled.NAME else prepared.load(name, data_dir, max_bytes)
    dataset = dataclasses.replace(dataset, streamed=dataset.nbytes > max_bytes)
    train, size = dataset.train, validation_size
    if not 0 <= size < len(train):
        raise UsageError(
            f"data.validation_size: got {size}; expected 0 to {len(train) - 1}, for {name} has {len(train)} "
            f"training examples and one must remain. Choose a smaller validation_size."
        )
    if size == 0:
        return dataset
    return dataclasses.replace(dataset, train=train[:-size], validation=train[-size:])
