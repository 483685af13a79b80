"""Times an epoch of each network against its matrix products alone, interleaved, and a cold start.

    python tests/benchmarks/epoch.py

Prints a markdown table: the median over the repetitions, and the median ratio to the floor of the same repetition,
with the ratio's quartiles. The floor is the forward and backward matrix products of the same network in one compiled
loop over the same number of batches, float32, with neither gather nor anything elementwise.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from configs import default  # noqa: E402
from vmapbn_flax.data import Dataset, load_dataset  # noqa: E402
from vmapbn_flax.programs import Programs  # noqa: E402


def make_floor(config: ConfigDict, dataset: Dataset) -> Callable[[], None]:
    """The matrix products of an epoch: forward, and backward to every kernel and every hidden layer."""
    size = config.train.batch_size
    widths = (dataset.train.images[0].size, *config.model.hidden, dataset.num_classes)
    kernels = [jnp.full(shape, 1e-3) for shape in itertools.pairwise(widths)]
    images = jnp.asarray(dataset.train.images.reshape(len(dataset.train), -1), jnp.float32) / 255

    def step(i: jax.Array, kernels: list[jax.Array]) -> list[jax.Array]:
        inputs = [lax.dynamic_slice_in_dim(images, i * size, size)]
        for kernel in kernels:
            inputs.append(inputs[-1] @ kernel)
        cotangent, gradients = inputs.pop(), []
        for layer in reversed(range(len(kernels))):
            gradients.insert(0, inputs[layer].T @ cotangent)
            if layer:
                cotangent = cotangent @ kernels[layer].T
        # Something has to depend on every product, or the compiler drops it.
        return [kernel - 1e-9 * gradient for kernel, gradient in zip(kernels, gradients, strict=True)]

    epoch = jax.jit(lambda kernels: lax.fori_loop(0, len(images) // size, step, kernels))
    return lambda: jax.block_until_ready(epoch(kernels))


def make_epoch(config: ConfigDict, dataset: Dataset, norm: str) -> Callable[[], None]:
    """The first epoch of a run, over and over, as `loop.Run` trains it."""
    config.model.norm = norm
    programs = Programs(ConfigDict(config), dataset)
    state = programs.create()

    def epoch() -> None:
        nonlocal state
        state = jax.block_until_ready(programs.advance(state, 0, programs.steps_per_epoch))

    return epoch


def seconds_to_first_step(config: str) -> float:
    """From the command to the first training step, in a process of its own with an empty workdir."""
    command = [sys.executable, "train.py", f"--config={config}", "--config.train.num_epochs=0.003"]
    command += ["--config.optimizer.warmup_epochs=0.0", "--config.train.log_every=1"]
    with tempfile.TemporaryDirectory() as workdir:
        started = time.monotonic()
        process = subprocess.Popen([*command, f"--workdir={workdir}/run"], cwd=ROOT, stderr=subprocess.DEVNULL)
        metrics = Path(workdir, "run", "metrics.jsonl")
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
            time.sleep(0.005)
        elapsed = time.monotonic() - started
        process.wait()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--starts", type=int, default=3, help="cold starts of the command")
    arguments = parser.parse_args()

    config, dataset = default.get_config(), load_dataset("mnist")
    epochs = {"matrix products alone": make_floor(config, dataset)}
    epochs |= {norm: make_epoch(config, dataset, norm) for norm in ("vmap", "batched", "none")}
    seconds = {name: [] for name in epochs}
    for repetition in range(arguments.repetitions + 1):
        for name, epoch in epochs.items():
            started = time.perf_counter()
            epoch()
            if repetition:  # the first one compiles
                seconds[name].append(time.perf_counter() - started)

    times = {name: np.array(values) for name, values in seconds.items()}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.repetitions} interleaved repetitions\n")
    print("| epoch, batch 128 | seconds | to the floor | quartiles |\n| --- | ---: | ---: | ---: |")
    for name, values in times.items():
        ratio = values / times["matrix products alone"]
        low, middle, high = np.percentile(ratio, (25, 50, 75))
        print(f"| {name} | {np.median(values):.3f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    print(f"\nvmapped / batched: {np.median(times['vmap'] / times['batched']):.3f}")
    starts = [seconds_to_first_step("configs/vmap_bn.py") for _ in range(arguments.starts)]
    print(f"from the command to the first training step: {statistics.median(starts):.1f} s")


if __name__ == "__main__":
    main()
