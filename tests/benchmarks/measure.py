"""Measurements that take turns, their medians, quartiles and ratios, and markdown tables of them."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

Times = dict[str, list[float]]  # seconds of each repetition, by what was timed


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def timed(function: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    # Threads of whatever ran before may be looking for work a little longer.
    time.sleep(0.05)
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def take_turns(functions: Mapping[str, Callable[[], object]], repetitions: int) -> Times:
    """Times everything once, then everything again, ...; a first round compiles and is not counted."""
    rounds = []
    for repetition in range(repetitions + 1):
        rounds.append({name: timed(function) for name, function in functions.items()})
        say(f"  round {repetition} of {repetitions}")
    return {name: [round_[name] for round_ in rounds[1:]] for name in functions}


def ratio(times: Times, name: str, other: str) -> np.ndarray:
    """Seconds of `name` over those of `other`, of each repetition."""
    return np.array(times[name]) / np.array(times[other])


def fastest(times: Times, names: Sequence[str]) -> str:
    """The one of `names` with the smallest median."""
    return min(names, key=lambda name: np.median(times[name]))


def count(number: int, what: str) -> str:
    """`1 epoch`, `10 epochs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def median(values: Sequence[float], digits: int = 2) -> str:
    return f"{np.median(values):.{digits}f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The quartiles."""
    low, high = np.percentile(values, (25, 75))
    return f"{low:.{digits}f} to {high:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose first column is text and the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, object]:
    """What a figure depends on beside the code; `load` is that of others, before anything is measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("jax", "flax", "optax", "dm-haiku", "equinox", "torch", "numpy")
    installed = {package.metadata["Name"] for package in importlib.metadata.distributions()}
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages if package in installed},
    }
