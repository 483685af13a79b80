"""PyTorch, eager: nn.Sequential and the loop of its quickstart, with batches indexed out of tensors in memory.

That is faster than a DataLoader, which would fetch one example at a time; the pixels are floats beforehand.
"""

import itertools

import numpy as np
import torch
from peers import BATCH, CLASSES, HIDDEN, LEARNING_RATE, Peer
from torch import nn


def make_model(num_features: int) -> nn.Module:
    widths = (num_features, *HIDDEN)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, momentum=0.01), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], CLASSES))


def to_inputs(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    torch.manual_seed(0)
    model = make_model(images.shape[1])
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    inputs, targets = to_inputs(images), torch.from_numpy(labels.astype(np.int64))

    def epoch() -> None:
        model.train()
        order = torch.randperm(len(targets))
        for first in range(0, len(targets) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            loss = loss_fn(model(inputs[rows]), targets[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def predict(images: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return model(to_inputs(images)).argmax(-1).numpy()

    return epoch, predict
