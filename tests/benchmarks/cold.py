"""From the command to the end: one and ten epochs, the first step, the same again, whole scripts of peers."""

import importlib.util
import re
import tempfile
from pathlib import Path

import numpy as np
from commands import Caches, Finished, bare, peer, seconds_to_first_step, train
from measure import count, median, ratio, say, spread, table

SCRIPTS = ("haiku", "torch")
BARE = "bare start"

INTRO = """\
Wall time of whole commands, from start to exit: imports, reading the data, compiling, training, evaluating, and for
ours checkpoints, TensorBoard files and the picture. "Empty" and "filled" are the cache of compiled programs. "Finished
again" is the command of a finished run, which says so. The peers' scripts train {epochs} epochs and evaluate once at
the end (`python -m peers haiku {epochs}`, in `tests/benchmarks`); ours evaluates and saves after each. The bare start
imports jax, flax, optax, orbax and clu, and compiles and runs one operation. The files of all of them were in the page
cache. Memory is the maximum resident set size."""


def accuracy(finished: Finished) -> float:
    """The last test accuracy that a command says."""
    said = " ".join(line for _, line in finished.lines if re.search(r"test_accuracy 0\.\d+$|^0\.\d+$", line))
    return float(said.split()[-1])


def run(repetitions: int, quick: bool) -> tuple[dict, str]:
    many = 1 if quick else 10
    scripts = [name for name in SCRIPTS if importlib.util.find_spec(name)]
    times: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}

    def note(name: str, finished: Finished) -> None:
        times.setdefault(name, []).append(finished.seconds)
        memory.setdefault(name, []).append(finished.megabytes)
        accuracies.setdefault(name, []).append(accuracy(finished))

    with tempfile.TemporaryDirectory() as directory:
        caches = Caches(Path(directory))
        # Not counted: they fill the cache, and bring what they read into the page cache.
        finished = Path(directory, "finished")
        train(caches.filled(), "--config.train.num_epochs=1", workdir=finished)
        for name in scripts:
            peer(name, 1, caches.filled())
        for repetition in range(repetitions):
            for cache in ("empty", "filled"):
                environment = getattr(caches, cache)
                for epochs in dict.fromkeys((many, 1)):
                    note(
                        f"ours, {count(epochs, 'epoch')}, {cache}",
                        train(environment(), f"--config.train.num_epochs={epochs}"),
                    )
                times.setdefault(f"ours, to the first step, {cache}", []).append(seconds_to_first_step(environment()))
            again = train(caches.filled(), "--config.train.num_epochs=1", workdir=finished)
            times.setdefault("ours, finished again", []).append(again.seconds)
            times.setdefault(BARE, []).append(bare(caches.filled()).seconds)
            for name in scripts:
                note(f"{name}, {count(many, 'epoch')}", peer(name, many, caches.filled()))
            say(f"  round {repetition + 1} of {repetitions}")

    peers = [f"{name}, {count(many, 'epoch')}" for name in scripts]
    rows = []
    for name, seconds in times.items():
        whole = count(many, "epoch") in name
        ratios = ["" if whole else median(ratio(times, name, BARE))]
        ratios += [median(ratio(times, name, other)) if whole else "" for other in peers]
        figures = [f"{np.median(memory[name]):.0f}", f"{np.mean(accuracies[name]):.4f}"] if name in memory else ["", ""]
        rows.append([name, median(seconds), spread(seconds), *ratios, *figures])
    to = [f"to {name}" for name in (f"the {BARE}", *scripts)]
    header = ["command", "seconds", "quartiles", *to, "memory, MB", "test accuracy"]
    markdown = f"{INTRO.format(epochs=many)}\n\n{table(header, rows)}"
    return {"seconds": times, "megabytes": memory, "test_accuracy": accuracies}, markdown
