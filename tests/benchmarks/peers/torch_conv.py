"""PyTorch, eager, with convolutions: images in its format channels_last, which is its fastest on a CPU."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from peers import BATCH, CLASSES, FEATURES, LEARNING_RATE, SHIFT, WEIGHT_DECAY, Peer
from torch import nn


def make_model(side: int) -> nn.Module:
    """For images of `side` x `side` pixels, `(batch, 1, side, side)`."""
    layers = []
    for inputs, outputs in itertools.pairwise((1, *FEATURES)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs, momentum=0.01), nn.ReLU(), nn.MaxPool2d(2)]
    positions = (side // 2 ** len(FEATURES)) ** 2
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(FEATURES[-1] * positions, CLASSES))
    return model.to(memory_format=torch.channels_last)


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW whose decay is of the kernels alone."""
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY)


def to_inputs(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images[:, np.newaxis].astype(np.float32) / 255)


def shift(images: torch.Tensor) -> torch.Tensor:
    """Each image, `(batch, 1, side, side)`, moved by up to `SHIFT` pixels each way, with zeros beyond the border."""
    padded = F.pad(images, [SHIFT] * 4)[:, 0]
    corners = torch.randint(2 * SHIFT + 1, (2, len(images), 1))
    rows, columns = corners + torch.arange(images.shape[-1])  # each (batch, side)
    examples = torch.arange(len(images))[:, None, None]
    moved = padded[examples, rows[:, :, None], columns[:, None, :]]
    return moved[:, None].contiguous(memory_format=torch.channels_last)


def make(images: np.ndarray, labels: np.ndarray) -> Peer:
    torch.manual_seed(0)
    model = make_model(images.shape[1])
    loss_fn = nn.CrossEntropyLoss()
    optimizer = make_optimizer(model, LEARNING_RATE)
    inputs, targets = to_inputs(images), torch.from_numpy(labels.astype(np.int64))

    def epoch() -> None:
        model.train()
        order = torch.randperm(len(targets))
        for first in range(0, len(targets) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            loss = loss_fn(model(shift(inputs[rows])), targets[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def predict(images: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return model(to_inputs(images)).argmax(-1).numpy()

    return epoch, predict
