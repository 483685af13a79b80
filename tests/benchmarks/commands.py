"""Whole commands, each in a process of its own: how long they take, what memory, and when they say what."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from measure import ROOT

TRAIN = (sys.executable, "train.py")
_BARE = """\
import clu.metrics, flax.linen, jax, optax, orbax.checkpoint
jax.jit(lambda x: x + 1)(0).block_until_ready()"""


class Finished(NamedTuple):
    """What a command took.

    Attributes:
      seconds: from its start to its end.
      megabytes: the most memory that it held up to its last line.
      lines: all that it said, each with the seconds it came after.
    """

    seconds: float
    megabytes: float
    lines: list[tuple[float, str]]


class Caches:
    """Environments whose cache of compiled programs is empty, or filled by the commands before.

    Whatever else is kept between commands (matplotlib's list of fonts) is kept in both.
    """

    def __init__(self, directory: Path):
        self._directory = directory

    def filled(self) -> dict[str, str]:
        return self._environment(self._directory / "filled")

    def empty(self) -> dict[str, str]:
        return self._environment(Path(tempfile.mkdtemp(dir=self._directory)))

    def _environment(self, cache: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        return {**kept, "XDG_CACHE_HOME": str(cache), "MPLCONFIGDIR": str(self._directory / "matplotlib")}


def run(command: Sequence[str], environment: dict[str, str], cwd: Path = ROOT) -> Finished:
    """Runs a command to its end.

    Raises:
      RuntimeError: its status is not 0.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, kilobytes = [], 0
    for line in process.stdout:
        lines.append((time.monotonic() - started, line.rstrip()))
        # Not what `os.wait4` says: that is at least what this process holds, from which the command was started.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        kilobytes = int(peak[1]) if peak else kilobytes
    status = process.wait()
    seconds = time.monotonic() - started
    if status:
        said = "\n".join(line for _, line in lines[-20:])
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{said}")
    return Finished(seconds, kilobytes / 1024, lines)


def train(
    environment: dict[str, str], *flags: str, config: str = "configs/vmap_bn.py", workdir: Path | None = None
) -> Finished:
    """`python train.py` from start to end, in an empty workdir unless one is given."""
    with tempfile.TemporaryDirectory() as directory:
        workdir = workdir or Path(directory, "run")
        return run([*TRAIN, f"--config={config}", f"--workdir={workdir}", *flags], environment)


def bare(environment: dict[str, str]) -> Finished:
    """The imports of the libraries, and one compiled operation."""
    return run([sys.executable, "-c", _BARE], environment)


def peer(name: str, num_epochs: int, environment: dict[str, str]) -> Finished:
    """A peer's whole script."""
    return run([sys.executable, "-m", "peers", name, str(num_epochs)], environment, Path(__file__).parent)


def torch_accuracy(network: str, num_epochs: float, seed: int, environment: dict[str, str]) -> Finished:
    """PyTorch's script by the recipe of our configs."""
    command = [sys.executable, "-m", "peers.torch_accuracy", network, str(num_epochs), str(seed)]
    return run(command, environment, Path(__file__).parent)


def seconds_to_first_step(environment: dict[str, str]) -> float:
    """From the command to the row of the first training step in `metrics.jsonl`."""
    flags = ("--config.train.num_epochs=0.003", "--config.optimizer.warmup_epochs=0.0", "--config.train.log_every=1")
    with tempfile.TemporaryDirectory() as directory:
        command = [*TRAIN, "--config=configs/vmap_bn.py", f"--workdir={directory}/run", *flags]
        metrics = Path(directory, "run", "metrics.jsonl")
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode} before its first row")
            time.sleep(0.005)
        elapsed = time.monotonic() - started
        process.wait()
    return elapsed
