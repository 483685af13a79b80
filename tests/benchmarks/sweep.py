"""Sweeps: the epoch of a member on one device and on two, and a whole sweep against the commands it replaces.

Each number of devices is a process of its own, for a CPU is divided once and for all: `python sweep.py 2 1 4 16` takes
turns with others by answering each line on standard input with the seconds of an epoch of everything, per member.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from commands import Caches, Finished, train
from epochs import FLOOR, long_config, make_epochs, make_floor_epoch, make_ours, make_peers
from measure import ROOT, count, fastest, median, ratio, say, spread, table, timed

from vmapbn_flax import default_config
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs

DEVICES = (1, 2)

INTRO = """\
Seconds per member of an epoch of a group that trains as one program, each member with a learning rate, a seed and
batches of its own, drawing their order included. One device is a whole CPU with its threads; two are the same CPU
divided. The floor, the solo epoch and the peers' are those of the table above, measured again in the same rounds, on
one device."""

COMMAND_INTRO = """\
A whole sweep of {members} seeds x {epochs} epochs of `configs/best.py`, from the command to its end, beside as many
solo commands one after another. Of the latter, one with an empty cache and one with the cache filled were run in each
round, and the second is counted {others} times: an estimate. The sweep starts with an empty cache and uses all cores
as devices."""


def make_member_epochs(members: int, dataset: Dataset) -> Callable[[], None]:
    configs = [long_config() for _ in range(members)]
    for seed, config in enumerate(configs):
        config.seed, config.optimizer.learning_rate = seed, 1e-3 * (1 + seed)
    programs = Programs(configs, dataset, mesh.member_mesh(configs[0].mesh, members))
    # Compiles it, so that the first round need not be a whole epoch.
    return make_epochs(programs, jax.block_until_ready(programs.advance(programs.create(), 0, 1)))


def work(devices: int, sizes: list[int]) -> None:
    dataset = load_dataset(default_config().data)
    epochs = {
        f"{count(size, 'member')}, {count(devices, 'device')}": (size, make_member_epochs(size, dataset))
        for size in sizes
    }
    if devices == 1:
        others = {FLOOR: make_floor_epoch(dataset), "solo": make_ours(dataset, "vmap"), **make_peers(dataset)}
        for name, epoch in others.items():
            epoch()  # compiles
            epochs[name] = (1, epoch)
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = {name: timed(epoch) / size for name, (size, epoch) in epochs.items()}
        print(json.dumps(seconds), flush=True)


def run(repetitions: int, quick: bool) -> tuple[dict, str]:
    sizes = (1, 4) if quick else (1, 4, 16, 64)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        workers = []
        for devices in DEVICES:
            workers.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(devices), *map(str, sizes)],
                    env={**Caches(Path(directory)).filled(), "JAX_NUM_CPU_DEVICES": str(devices)},
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            if workers[-1].stdout.readline() != "ready\n":
                raise RuntimeError(f"the worker of {devices} devices ended with status {workers[-1].wait()}")
        for repetition in range(repetitions):
            rounds.append({})
            for worker in workers:
                print(file=worker.stdin, flush=True)
                rounds[-1] |= json.loads(worker.stdout.readline())
            say(f"  round {repetition + 1} of {repetitions}")
        for worker in workers:
            worker.stdin.close()
            worker.wait()

    times = {name: [seconds[name] for seconds in rounds] for name in rounds[0]}
    peers = [name for name in times if name not in (FLOOR, "solo") and "member" not in name]
    best = fastest(times, peers or [FLOOR])
    rows = [
        [
            name,
            median(seconds, 3),
            spread(seconds, 3),
            *(median(ratio(times, name, to)) for to in ("solo", FLOOR, best)),
        ]
        for name, seconds in times.items()
    ]
    header = ["epoch, batch 128", "seconds a member", "quartiles", "to solo", "to the floor", f"to {best}"]
    return {"seconds": times}, f"{INTRO}\n\n{table(header, rows)}"


def run_command(repetitions: int, quick: bool) -> tuple[dict, str]:
    members, epochs = (2, 1) if quick else (16, 10)
    length = f"--config.train.num_epochs={epochs}"
    seeds = f"--config.sweep.seed={tuple(range(members))}"
    solo = (length, "--config.data.validation_size=5000")
    found: dict[str, list[Finished]] = {"sweep": [], "solo, empty": [], "solo, filled": []}
    with tempfile.TemporaryDirectory() as directory:
        caches = Caches(Path(directory))
        train(caches.filled(), *solo, config="configs/best.py")  # fills the cache
        for repetition in range(repetitions):
            found["sweep"].append(train(caches.empty(), length, seeds, config="configs/sweep_seeds.py"))
            found["solo, empty"].append(train(caches.empty(), *solo, config="configs/best.py"))
            seed = f"--config.seed={repetition + 1}"
            found["solo, filled"].append(train(caches.filled(), *solo, seed, config="configs/best.py"))
            say(f"  round {repetition + 1} of {repetitions}")

    times = {name: [finished.seconds for finished in runs] for name, runs in found.items()}
    memory = {name: [finished.megabytes for finished in runs] for name, runs in found.items()}
    times["solo, all"] = list(np.array(times["solo, empty"]) + (members - 1) * np.array(times["solo, filled"]))
    labels = {
        "sweep": f"sweep of {members}",
        "solo, all": f"{members} solo commands (estimated)",
        "solo, empty": "one solo command, empty",
        "solo, filled": "one solo command, filled",
    }
    rows = [
        [
            label,
            median(times[name], 1),
            spread(times[name], 1),
            median(ratio(times, name, "solo, all")),
            median(memory[name], 0) if name in memory else "",
        ]
        for name, label in labels.items()
    ]
    header = ["command", "seconds", "quartiles", f"to {members} solo commands", "memory, MB"]
    intro = COMMAND_INTRO.format(members=members, epochs=epochs, others=members - 1)
    return {"seconds": times, "megabytes": memory}, f"{intro}\n\n{table(header, rows)}"


if __name__ == "__main__":
    work(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
