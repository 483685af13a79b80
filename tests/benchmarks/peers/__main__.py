"""A whole script of one peer: `python -m peers torch 10` reads MNIST, trains ten epochs, prints the test accuracy."""

import importlib
import sys

import numpy as np
from peers import mnist

name, num_epochs = sys.argv[1], int(sys.argv[2])
(images, labels), (test_images, test_labels) = mnist()
epoch, predict = importlib.import_module(f"peers.{name}_mlp").make(images.reshape(-1, 784), labels)
for _ in range(num_epochs):
    epoch()
print(np.mean(predict(test_images.reshape(-1, 784)) == test_labels))
