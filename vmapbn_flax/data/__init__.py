"""Sets of labelled images, in memory or on the disk: the bundled MNIST, and sets prepared by tensorflow-datasets.

Uses numpy and, for prepared sets, tensorflow-datasets; of this package `errors` and `files`. Nothing here imports JAX.
"""

import dataclasses

from ml_collections import ConfigDict

from vmapbn_flax.data import bundled, prepared
from vmapbn_flax.data.arrays import Dataset, Examples, Split
from vmapbn_flax.errors import UsageError

__all__ = ["Dataset", "Examples", "Split", "load_dataset"]


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
        `name`: "mnist", the bundled set; or a data set that tensorflow-datasets has prepared as array_record:
        "fashion_mnist", "name/config", "name:1.0.0", "name/config:1.0.0".
        `dir`: where to look. "mnist": a directory with the four files; "" for the bundled ones. Any other name:
        the directory of tensorflow-datasets; "" for $TFDS_DATA_DIR or ~/tensorflow_datasets.
        `validation_size`: how many examples at the end of the training split become the validation split.
        `memory_limit`: the most gigabytes that the images and labels may take as arrays. A larger data set is
        `streamed`: a prepared one stays on the disk and its splits are read piece by piece; the bundled one is in
        memory anyway.

    Raises:
      UsageError: the data is missing, damaged or not of this kind, or too small for `data.validation_size`.
    """
    max_bytes = data.memory_limit * 1e9
    dataset = bundled.load(data.dir) if data.name == bundled.NAME else prepared.load(data.name, data.dir, max_bytes)
    dataset = dataclasses.replace(dataset, streamed=dataset.nbytes > max_bytes)
    train, size = dataset.train, data.validation_size
    if not 0 <= size < len(train):
        raise UsageError(
            f"data.validation_size: got {size}; expected 0 to {len(train) - 1}, for {data.name} has {len(train)} "
            f"training examples and one must remain. Choose a smaller validation_size."
        )
    if size == 0:
        return dataset
    return dataclasses.replace(dataset, train=train[:-size], validation=train[-size:])
