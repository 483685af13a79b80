"""Times a sweep's epoch per member, over one and two CPU devices, against a solo epoch and the matrix products.

    python tests/benchmarks/sweep.py

Prints a markdown table: the median over the repetitions, and the median ratios to the solo epoch and to the floor of
the same repetition, both measured on one device, and then what the second device gains; `epoch.py` says what the floor
is. Each number of devices is a process of its own, for a CPU is divided once and for all; the two take turns, and only
one works at a time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from epoch import make_epoch, make_floor  # noqa: E402

from configs import default  # noqa: E402
from vmapbn_flax import mesh  # noqa: E402
from vmapbn_flax.data import load_dataset  # noqa: E402
from vmapbn_flax.group import GroupPrograms  # noqa: E402


def make_member_epoch(members: int, dataset) -> Callable[[], None]:
    """The first epoch of a group of `members` with seeds and learning rates of their own, over and over."""
    configs = [default.get_config() for _ in range(members)]
    for seed, config in enumerate(configs):
        config.seed, config.optimizer.learning_rate = seed, 1e-3 * (1 + seed)
    programs = GroupPrograms(configs, dataset, mesh.member_mesh(configs[0], members))
    state = programs.create()

    def epoch() -> None:
        nonlocal state
        state = jax.block_until_ready(programs.advance(state, 0, programs.steps_per_epoch))

    return epoch


def work(devices: int, sizes: list[int]) -> None:
    """Answers each line on standard input with the seconds of an epoch of everything, per member."""
    dataset = load_dataset("mnist")
    epochs = {f"{size} members": (size, make_member_epoch(size, dataset)) for size in sizes}
    if devices == 1:
        epochs["matrix products alone"] = (1, make_floor(default.get_config(), dataset))
        epochs["solo"] = (1, make_epoch(default.get_config(), dataset, "vmap"))
    for _ in sys.stdin:
        seconds = {}
        for name, (size, epoch) in epochs.items():
            started = time.perf_counter()
            epoch()
            seconds[f"{name}, {devices} device{'s' if devices > 1 else ''}"] = (time.perf_counter() - started) / size
        print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.devices:
        return work(arguments.devices, arguments.members)

    command = [sys.executable, __file__, "--members", *map(str, arguments.members)]
    workers = [
        subprocess.Popen(
            [*command, f"--devices={devices}"],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for devices in (1, 2)
    ]
    repetitions = []
    for _ in range(arguments.repetitions + 1):
        seconds = {}
        for worker in workers:
            print(file=worker.stdin, flush=True)
            seconds |= json.loads(worker.stdout.readline())
        repetitions.append(seconds)
    for worker in workers:
        worker.stdin.close()
        worker.wait()

    times = {name: np.array([seconds[name] for seconds in repetitions[1:]]) for name in repetitions[0]}  # 0 compiles
    solo, floor = times["solo, 1 device"], times["matrix products alone, 1 device"]
    print(f"{os.cpu_count()} cores, jax {jax.__version__}, {arguments.repetitions} interleaved repetitions\n")
    print("| epoch, batch 128 | seconds a member | to solo | to the floor |\n| --- | ---: | ---: | ---: |")
    for name, values in times.items():
        ratios = (np.median(values / other) for other in (solo, floor))
        print(f"| {name} | {np.median(values):.3f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    print("\nThroughput of 2 devices over that of 1:")
    for size in arguments.members:
        values = times[f"{size} members, 1 device"] / times[f"{size} members, 2 devices"]
        print(f"{size} members: {np.median(values):.2f}, from {values.min():.2f} to {values.max():.2f}")
    return None


if __name__ == "__main__":
    main()
