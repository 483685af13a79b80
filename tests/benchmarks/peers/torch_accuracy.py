"""PyTorch by the recipe of our configs, as a whole script: its test accuracy four times an epoch.

`python -m peers.torch_accuracy mlp 5 0`: the network, epochs and seed. The recipe is that of `configs/vmap_bn.py`, of
the network "conv" that of `configs/conv.py`: Adam or AdamW at a rate of 1e-2 after an epoch of warm-up, then a cosine
to zero. Weights are initialised as PyTorch does.
"""

import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from peers import BATCH, Examples, mnist, torch_conv, torch_mlp
from torch import nn

PEAK_RATE, WARMUP_EPOCHS, EVALUATIONS = 1e-2, 1, 4  # evaluations an epoch
EVAL_BATCH = 1000


def accuracies(network: str, num_epochs: float, seed: int, train: Examples, test: Examples) -> Iterator[float]:
    """Trains, and yields the test accuracy at each evaluation; the last one is at the end."""
    torch.manual_seed(seed)
    size = train[0].shape[1:]
    if network == "conv":
        model, to_inputs = torch_conv.make_model(size[0]), torch_conv.to_inputs
        augment, optimizer = torch_conv.shift, torch_conv.make_optimizer(model, PEAK_RATE)
    else:
        model, to_inputs, augment = torch_mlp.make_model(math.prod(size)), torch_mlp.to_inputs, nn.Identity()
        optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_RATE)
    inputs, targets = to_inputs(train[0]), torch.from_numpy(train[1].astype(np.int64))
    test_inputs, test_targets = to_inputs(test[0]), torch.from_numpy(test[1].astype(np.int64))
    steps = len(targets) // BATCH
    warmup, total = (round(epochs * steps) for epochs in (min(WARMUP_EPOCHS, num_epochs), num_epochs))

    def schedule(step: int) -> float:
        if step < warmup:
            return step / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    loss_fn = nn.CrossEntropyLoss()

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            pairs = zip(test_inputs.split(EVAL_BATCH), test_targets.split(EVAL_BATCH), strict=True)
            right = sum((model(images).argmax(-1) == labels).sum().item() for images, labels in pairs)
        model.train()
        return right / len(test_targets)

    model.train()
    for step in range(total):
        if step % steps == 0:
            order = torch.randperm(len(targets))
        rows = order[step % steps * BATCH :][:BATCH]
        loss = loss_fn(model(augment(inputs[rows])), targets[rows])
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // EVALUATIONS) == 0 or step + 1 == total:
            yield accuracy()


if __name__ == "__main__":
    network, num_epochs, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    for accuracy in accuracies(network, num_epochs, seed, *mnist()):
        print(f"test_accuracy {accuracy:.4f}", flush=True)
