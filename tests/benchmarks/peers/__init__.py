"""Other libraries training this network, each written the way its own documentation does, on arrays in memory.

All train 784-100-100-100-10 with batch norm before each sigmoid and no bias before a batch norm, by Adam at 1e-3, on
batches of 128, shuffled each epoch; each step also updates the running statistics. None keeps metrics, which ours does.
`make(images, labels)` of a module takes the training set and returns `epoch`, which trains one, and `predict`, the
classes of images; `python -m peers haiku 10` is a whole script. No module imports another's library, nor ours.
"""

from collections.abc import Callable, Iterator

import numpy as np

HIDDEN, CLASSES, BATCH, LEARNING_RATE = (100, 100, 100), 10, 128, 1e-3

NAMES = ("haiku", "nnx", "linen", "equinox", "torch")

Peer = tuple[Callable[[], None], Callable[[np.ndarray], np.ndarray]]


def batches(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """The whole batches of one epoch, in a fresh order."""
    order = rng.permutation(len(labels))
    for first in range(0, len(labels) - BATCH + 1, BATCH):
        rows = order[first : first + BATCH]
        yield images[rows], labels[rows]
