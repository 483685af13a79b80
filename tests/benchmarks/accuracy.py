"""From the command to an accuracy, beside PyTorch's same network by the same recipe."""

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from commands import Caches, Finished, torch_accuracy, train
from measure import count, median, say, table

TORCH = "torch"
EVALUATED = "--config.train.eval_every=0.25"

Reached = list[float | None]  # seconds of each repetition, None where it was not reached


class Job(NamedTuple):
    """What is trained: a config of ours and the same network of `peers.torch_accuracy`, the schedule, the goals."""

    config: str
    network: str
    epochs: float
    goals: tuple[float, ...]


MLP = Job("configs/vmap_bn.py", "mlp", 10, (0.97, 0.98))
CONV = Job("configs/conv.py", "conv", 2, (0.99,))
QUICK_EPOCHS = 0.05

INTRO = """\
Seconds from the command to the first evaluation at which the accuracy on MNIST's test images reaches so much:
`{config}` with {epochs} in its schedule, evaluated four times an epoch; ours saves a checkpoint then, too.
"Empty" and "filled" are the cache of compiled programs. PyTorch's script (`tests/benchmarks/peers/torch_accuracy.py`)
trains the same network by the same recipe: optimizer, schedule, batches, augmentation and evaluations. Its weights
start as its layers initialise them. Each round has a seed of its own. The last column is the accuracy at the end, the
mean over the rounds."""


def seconds_to(goal: float, finished: Finished) -> float | None:
    """When a command first says that the test accuracy has reached `goal`; None if it does not."""
    return next((at for at, value in said(finished) if value >= goal), None)


def said(finished: Finished) -> list[tuple[float, float]]:
    """The test accuracies of the evaluations, each with the seconds it came after."""
    matches = [(at, re.search(r"test_accuracy (0\.\d+|1\.0+)$", line)) for at, line in finished.lines]
    return [(at, float(match[1])) for at, match in matches if match]


def cell(seconds: Reached) -> str:
    """The median, and the lowest and the highest."""
    if None in seconds:
        return f"not in {seconds.count(None)} of {len(seconds)}"
    return f"{median(seconds, 1)} ({min(seconds):.1f} to {max(seconds):.1f})"


def ratio(seconds: Reached, others: Sequence[float | None]) -> str:
    """The median over the rounds in which both have reached the goal."""
    both = [a / b for a, b in zip(seconds, others, strict=True) if a is not None and b is not None]
    return median(both) if both else ""


def run(job: Job, repetitions: int, quick: bool) -> tuple[dict, str]:
    epochs = QUICK_EPOCHS if quick else job.epochs
    found: dict[str, dict[str, Reached]] = {}
    last: dict[str, list[float]] = {}

    def note(name: str, finished: Finished) -> None:
        for goal in job.goals:
            found.setdefault(name, {}).setdefault(f"{goal:.0%}", []).append(seconds_to(goal, finished))
        last.setdefault(name, []).append(said(finished)[-1][1])

    with tempfile.TemporaryDirectory() as directory:
        caches = Caches(Path(directory))

        def ours(environment: dict[str, str], epochs: float, seed: int = 0) -> Finished:
            fields = {"train.num_epochs": epochs, "optimizer.warmup_epochs": min(1.0, epochs), "seed": seed}
            flags = [f"--config.{name}={value}" for name, value in fields.items()]
            return train(environment, EVALUATED, *flags, config=job.config)

        has_torch = importlib.util.find_spec("torch") is not None
        # Not counted: they fill the cache, and bring what they read into the page cache.
        ours(caches.filled(), 0.01)
        if has_torch:
            torch_accuracy(job.network, 0, 0, caches.filled())
        for seed in range(repetitions):
            for cache in ("empty", "filled"):
                note(f"ours, {cache}", ours(getattr(caches, cache)(), epochs, seed))
            if has_torch:
                note(TORCH, torch_accuracy(job.network, epochs, seed, caches.filled()))
            say(f"  round {seed + 1} of {repetitions}")

    rows = []
    for name, of_goals in found.items():
        rows.append([name])
        for goal, seconds in of_goals.items():
            rows[-1] += [cell(seconds), *([ratio(seconds, found[TORCH][goal])] if has_torch else [])]
        rows[-1].append(f"{np.mean(last[name]):.4f}")
    columns = [[f"to {goal:.0%}", *([f"to {TORCH}"] if has_torch else [])] for goal in job.goals]
    header = ["command", *(name for names in columns for name in names), "test accuracy"]
    intro = INTRO.format(config=job.config, epochs=count(epochs, "epoch"))
    return {"seconds": found, "test_accuracy": last}, f"{intro}\n\n{table(header, rows)}"


run_mlp, run_conv = partial(run, MLP), partial(run, CONV)
