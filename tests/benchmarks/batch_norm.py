"""The layer alone, forward and backward, beside other libraries' layers, in one command of about a minute.

    pip install -e '.[peers]'
    taskset -c 0 python tests/benchmarks/batch_norm.py

Prints a markdown table of CPU milliseconds on one core: what the layer adds to the loss `sum(g * relu(x))` and its
gradients with respect to x, scale and bias, with the statistics moved. Everything takes turns.
"""

import argparse
import os
import time
from collections.abc import Callable

import measure
import numpy as np

os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import torch

from vmapbn_flax import BatchedBatchNorm, BatchNorm, VmapBatch
from vmapbn_flax.cli.environment import keep_freed_memory
from vmapbn_flax.training.compiler import _CPU_OPTIONS

SHAPES = [(128, 28, 28, 32), (128, 14, 14, 64), (128, 100)]


def compiled(norm: Callable, params, stats, x, g) -> Callable[[], object]:
    """A call of the loss and its gradients; `norm(params, stats, x)` returns the output and new statistics."""

    def loss(params, x):
        y, moved = norm(params, stats, x)
        return jnp.sum(g * jax.nn.relu(y)), moved

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=_CPU_OPTIONS)
    return lambda: jax.block_until_ready(step(params, x))


def linen(layer: nn.Module, **flags) -> Callable:
    def norm(params, stats, x):
        y, updates = layer.apply({"params": params, "batch_stats": stats}, x, **flags, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return norm


def layers(x, g) -> dict[str, Callable[[], object]]:
    """What takes turns: no layer first."""
    features = x.shape[-1]
    params = {"scale": jnp.ones(features), "bias": jnp.zeros(features)}
    stats = {"mean": jnp.zeros(features), "var": jnp.ones(features)}
    ours = {"train": True}
    haiku = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.99)(x, is_training=True))
    hk_params, hk_state = haiku.init(None, x)
    equinox, eqx_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(features, "batch", mode="batch")
    eqx_params, static = eqx.partition(equinox, eqx.is_inexact_array)

    def by_haiku(params, state, x):
        return haiku.apply(params, state, None, x)

    def by_equinox(params, state, x):
        layer = eqx.combine(params, static)
        call = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = call(jnp.moveaxis(x, -1, 1), state)
        return jnp.moveaxis(y, 1, -1), state

    return {
        "none": compiled(lambda params, stats, x: (x, stats), params, stats, x, g),
        "vmapped": compiled(linen(VmapBatch(BatchNorm()), **ours), params, stats, x, g),
        "batched": compiled(linen(BatchedBatchNorm(), **ours), params, stats, x, g),
        "flax": compiled(linen(nn.BatchNorm(use_running_average=False)), params, stats, x, g),
        "haiku": compiled(by_haiku, hk_params, hk_state, x, g),
        "equinox": compiled(by_equinox, eqx_params, eqx_state, x, g),
        "torch, none": by_torch(x, g, torch.nn.Identity()),
        "torch": by_torch(x, g, (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(features)),
    }


def by_torch(x, g, layer: torch.nn.Module) -> Callable[[], object]:
    def tensor(array):
        moved = torch.tensor(np.moveaxis(np.asarray(array), -1, 1).copy())
        return moved.contiguous(memory_format=torch.channels_last) if moved.ndim == 4 else moved

    x, g = tensor(x).requires_grad_(), tensor(g)

    def step():
        x.grad = None
        layer.zero_grad()
        (g * torch.relu(layer(x))).sum().backward()

    return step


def take_turns(functions: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """CPU milliseconds of this process at each call."""
    times = {name: [] for name in functions}
    for repetition in range(rounds + 2):  # two that compile and fill caches
        for name, function in functions.items():
            started = time.process_time()
            function()
            if repetition > 1:
                times[name].append(1e3 * (time.process_time() - started))
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    torch.set_num_threads(1)
    about = measure.machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['processor']}, {about['cores']} core, load {about['load']:.1f}. {versions}.\n")
    rows = []
    for shape in SHAPES:
        rng = np.random.default_rng(0)
        x, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
        times = take_turns(layers(x, g), rounds)
        costs = {
            name: np.median(values) - np.median(times["torch, none" if name == "torch" else "none"])
            for name, values in times.items()
            if "none" not in name
        }
        for name, cost in costs.items():
            least = times[name].min() - times["torch, none" if name == "torch" else "none"].min()
            rows.append([f"{shape}, {name}", f"{cost:.2f}", f"{least:.2f}", f"{cost / costs['flax']:.2f}"])
    print(measure.table(["layer", "ms, medians", "ms, minima", "to flax"], rows))


if __name__ == "__main__":
    main()
