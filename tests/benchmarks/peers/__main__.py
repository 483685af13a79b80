"""A whole script of one peer: `python -m peers torch 10` reads MNIST, trains ten epochs, prints the test accuracy."""

import gzip
import importlib
import sys
from pathlib import Path

import numpy as np

MNIST = Path(__file__).parents[3] / "vmapbn_flax" / "data" / "mnist"


def read(name: str, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress((MNIST / f"{name}.gz").read_bytes()), np.uint8, offset=header)


name, num_epochs = sys.argv[1], int(sys.argv[2])
images, labels = read("train-images-idx3-ubyte", 16).reshape(-1, 784), read("train-labels-idx1-ubyte", 8)
test_images, test_labels = read("t10k-images-idx3-ubyte", 16).reshape(-1, 784), read("t10k-labels-idx1-ubyte", 8)
epoch, predict = importlib.import_module(f"peers.{name}_mlp").make(images, labels.astype(np.int32))
for _ in range(num_epochs):
    epoch()
print(np.mean(predict(test_images) == test_labels))
