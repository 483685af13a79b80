"""What a training step sends between devices and keeps on each, read off the compiled programs of the default network.

    python tests/benchmarks/scaling.py

Prints markdown tables: the collectives of a step over 8 devices, the weak scaling that follows from them, and the
memory of a step by members and width. Nothing is timed; the model's assumptions are the constants below.
"""

import collections
import math
import os
import re
import sys
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from vmapbn_flax import default_config  # noqa: E402
from vmapbn_flax.data import Dataset, load_dataset  # noqa: E402
from vmapbn_flax.training import mesh, steps  # noqa: E402
from vmapbn_flax.training.programs import Programs  # noqa: E402

HOP_SECONDS = 4e-6  # from one device to another, software included
BYTES_PER_SECOND = 25e9  # that a device sends and receives at the same time
COMPUTE_SECONDS = (1e-4, 1e-3, 1e-2)  # of a step on one device, with the same examples for each device
DEVICES = (8, 64, 512, 4096)

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
ITEM_BYTES = {"pred": 1, "u8": 1, "s32": 4, "f32": 4}


def config(**changes) -> ConfigDict:
    result = default_config()
    result.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return result


def step_collectives(dataset: Dataset, **changes) -> list[tuple[str, int]]:
    """The kind and the bytes of each collective in a step over 8 devices."""
    of_run = config(mesh__data=8, **changes)
    programs = Programs([of_run], dataset, mesh.solo_mesh(of_run.mesh))
    programs.advance(programs.create(), 0, 1)
    found = []
    for match in COLLECTIVE.finditer(programs.compiler["train"].as_text()):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        sizes = [ITEM_BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in shapes]
        found.append((match[2], sum(sizes)))
    return found


def seconds(found: list[tuple[str, int]], devices: int) -> float:
    """Of all collectives of a step, one after the other: trees there and back for small ones, rings for large ones."""
    hops, share = 2 * math.log2(devices), (devices - 1) / devices
    times = (2 if kind == "all-reduce" else 1 for kind, _ in found)
    return sum(
        hops * HOP_SECONDS + factor * share * size / BYTES_PER_SECOND
        for (_, size), factor in zip(found, times, strict=True)
    )


def step_bytes(dataset: Dataset, members: int, width: int) -> tuple[int, int]:
    """What a step of `members` on one device holds at its peak: states, and everything else but the data set."""
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (mesh.MEMBER, mesh.DATA))
    configs = [config(seed=seed, model__hidden=(width,) * 3) for seed in range(members)]
    programs = Programs(configs, dataset, one)
    state = programs.template()
    several = (members,) if members > 1 else ()
    order = jax.ShapeDtypeStruct((*several, len(dataset.train)), np.int32)
    arguments = (state, programs.hyper, *programs._feed.whole["train"], order, np.int32(0), np.int32(1))
    # As accelerators train them; one CPU device takes one member after the other.
    of_all, num_classes = configs[0], dataset.num_classes
    step = steps.make_train_step(of_all.model, of_all.optimizer, of_all.train.max_skipped_steps, num_classes)
    train_steps = steps.make_train_steps(step, steps.make_take_batch(of_all.train.batch_size))
    at_once = jax.vmap(train_steps, (0, 0, None, None, 0, None, None))
    compiled = jax.jit(at_once if several else train_steps, donate_argnums=0).lower(*arguments).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return held, compiled.memory_analysis().temp_size_in_bytes + order.size * 4


def main() -> None:
    dataset = load_dataset(default_config().data)
    variants = {
        "batch norm": {},
        "ghost batches of 16": {"model__ghost_batch_size": 16},
        "no norm": {"model__norm": "none"},
        "batch norm, 130 examples": {"train__batch_size": 130},
        "batch norm, data set divided": {"mesh__replicate_limit": 0},
    }
    found = {name: step_collectives(dataset, **changes) for name, changes in variants.items()}
    print(f"jax {jax.__version__}\n\n| step over 8 devices | collectives | bytes of each |\n| --- | ---: | --- |")
    for name, collectives_ in found.items():
        counts = collections.Counter(collectives_)
        listed = ", ".join(f"{n} x {kind} {size:,}" for (kind, size), n in counts.items())
        print(f"| {name} | {len(collectives_)} | {listed} |")

    print(f"\n| devices | messages of a step | {' | '.join(f'{t * 1e3:g} ms' for t in COMPUTE_SECONDS)} |")
    print(f"| ---: | --- |{' ---: |' * len(COMPUTE_SECONDS)}")
    for devices in DEVICES:
        for name in ("batch norm", "ghost batches of 16"):
            spent = seconds(found[name], devices)
            shares = " | ".join(f"{t / (t + spent):.0%}" for t in COMPUTE_SECONDS)
            print(f"| {devices:,} | {name}: {spent * 1e6:.0f} us | {shares} |")

    print("\n| width | members | states, MB | the rest of a step, MB |\n| ---: | ---: | ---: | ---: |")
    for width in (100, 1000):
        for members in (1, 4, 16):
            held, rest = step_bytes(dataset, members, width)
            print(f"| {width:,} | {members} | {held / 1e6:,.1f} | {rest / 1e6:,.1f} |")


if __name__ == "__main__":
    main()
