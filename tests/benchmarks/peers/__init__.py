"""Other libraries training our networks, each written the way its own documentation does, on arrays in memory.

All train with batch norm and no bias before it, on batches of 128, shuffled each epoch; each step also updates the
running statistics. None keeps metrics, which ours does. The modules are of two networks:

- `*_mlp`: 784-100-100-100-10 with batch norm before each sigmoid, by Adam at 1e-3.
- `*_conv`: three blocks of 3x3 convolution, batch norm, relu and pooling, and a dense layer, by AdamW at 1e-3 with
  decay of the kernels, on images shifted at random, as in `configs/conv.py`.

`make(images, labels)` of a module takes the training set and returns `epoch`, which trains one, and `predict`, the
classes of images; `python -m peers haiku 10` is a whole script of an MLP. `python -m peers.torch_accuracy conv 2 0`
trains by the recipe of our configs, evaluating four times an epoch. No module imports another's library, nor ours.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HIDDEN, CLASSES, BATCH, LEARNING_RATE = (100, 100, 100), 10, 128, 1e-3
FEATURES, WEIGHT_DECAY, SHIFT = (32, 64, 64), 0.05, 2  # of the convolutional network; a shift in pixels

NAMES = ("haiku", "nnx", "linen", "equinox", "torch")
CONV_NAMES = ("linen", "torch")

Peer = tuple[Callable[[], None], Callable[[np.ndarray], np.ndarray]]
Examples = tuple[np.ndarray, np.ndarray]  # images, (examples, height, width) in uint8, and labels in int32

_MNIST = Path(__file__).parents[3] / "vmapbn_flax" / "data" / "mnist"


def mnist() -> tuple[Examples, Examples]:
    """The training and the test set."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((_MNIST / f"{name}.gz").read_bytes()), np.uint8, offset=header)

    def split(name: str) -> Examples:
        images, labels = read(f"{name}-images-idx3-ubyte", 16), read(f"{name}-labels-idx1-ubyte", 8)
        return images.reshape(-1, 28, 28), labels.astype(np.int32)

    return split("train"), split("t10k")


def batches(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """The whole batches of one epoch, in a fresh order."""
    order = rng.permutation(len(labels))
    for first in range(0, len(labels) - BATCH + 1, BATCH):
        rows = order[first : first + BATCH]
        yield images[rows], labels[rows]
