"""How exact batch norms are far from zero: `python tests/benchmarks/exactness.py > docs/exactness.md`.

Each layer normalises one float32 batch of N(0, 1) + offset in training. Its outputs, and the gradient of a
random weighted sum of them, are compared with numpy in float64.
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Sequence

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from vmapbn_flax import BatchedBatchNorm, BatchNorm, BatchRenorm, VmapBatch
from vmapbn_flax.nn import nnx as ours

BATCH, FEATURES, EPSILON = 128, 100, 1e-5
OFFSETS = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)

# From their sources: the variance, then the output. `inv` is 1 / sqrt(var + epsilon).
FORMULAS = {
    "ours, vmapped": "`d = x - mean(x); c = mean(d); var = mean(d * d) - c * c; y = (d - c) * inv`, "
    "two reductions over the axis of `jax.vmap`",
    "ours, batched": "the same on a whole batch",
    "ours, nnx": "the same again, under `nnx.vmap`",
    "ours, renorm": "batch renormalisation, by the running statistics x[0] and 2; its d has the digits of the mean "
    "that float32 has no place for",
    "flax": "`var = max(0, mean(x * x) - mean(x)**2); y = (x - mean(x)) * inv`, one reduction "
    "(`use_fast_variance=True`, the default)",
    "flax nnx": "the same",
    "haiku": "the same without the `max`, so that rounding can make the variance negative, hence NaN",
    "equinox": '`var = mean((x - mean(x))**2); y = (x - mean(x)) / sqrt(var + epsilon)` (`mode="batch"`)',
    "torch": "`var = mean((x - mean(x))**2); y = x * inv - mean(x) * inv` (on a CPU)",
}

Layer = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def exact(x: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and the gradient of sum(cotangent * outputs), in float64."""
    x, g = np.float64(x), np.float64(cotangent)
    inv = 1 / np.sqrt(x.var(0) + EPSILON)
    y = (x - x.mean(0)) * inv
    return y, inv * (g - g.mean(0) - y * (g * y).mean(0))


def exact_renorm(x: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of batch renormalisation within its limits, which is normalised by the running statistics."""
    _, grad = exact(x, cotangent)
    sigma = np.sqrt(2 + EPSILON)
    return (np.float64(x) - x[0]) / sigma, grad * np.sqrt(np.float64(x).var(0) + EPSILON) / sigma


def layers() -> dict[str, Layer]:
    """Each layer as a function of a batch and a cotangent that returns outputs and gradient."""

    def linen(layer: nn.Module, **train: bool) -> Layer:
        variables = jax.jit(lambda: layer.init(jax.random.key(0), jnp.ones((BATCH, FEATURES)), **train))()
        return differentiated(lambda x: layer.apply(variables, x, **train, mutable=["batch_stats"])[0])

    def new(Norm: type[nnx.Module], call: Callable) -> Layer:
        return differentiated(lambda x: call(Norm(FEATURES, epsilon=EPSILON, rngs=nnx.Rngs(0)), x))

    def renorm(x: jax.Array) -> jax.Array:
        stats = {"mean": x[0], "var": jnp.full(FEATURES, 2.0), "count": jnp.int32(0)}
        at_once = {"warmup_steps": 0, "r_max_steps": 0, "d_max_steps": 0}
        layer = VmapBatch(BatchRenorm(epsilon=EPSILON, use_scale=False, use_bias=False, **at_once))
        return layer.apply({"batch_stats": lax.stop_gradient(stats)}, x, train=True, mutable=["batch_stats"])[0]

    vmapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="batch")
    haiku = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.99, eps=EPSILON)(x, True))
    haiku_variables = haiku.init(None, jnp.ones((BATCH, FEATURES)))
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(FEATURES, "batch", eps=EPSILON, mode="batch")
    equinox = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    found = {
        "ours, vmapped": linen(VmapBatch(BatchNorm(epsilon=EPSILON)), train=True),
        "ours, batched": linen(BatchedBatchNorm(epsilon=EPSILON), train=True),
        "ours, nnx": new(ours.BatchNorm, vmapped),
        "ours, renorm": differentiated(renorm),
        "flax": linen(nn.BatchNorm(epsilon=EPSILON), use_running_average=False),
        "flax nnx": new(nnx.BatchNorm, nnx.BatchNorm.__call__),
        "haiku": differentiated(lambda x: haiku.apply(*haiku_variables, None, x)[0]),
        "equinox": differentiated(lambda x: equinox(x, state)[0]),
    }
    if importlib.util.find_spec("torch"):
        found["torch"] = torch_layer
    return found


def differentiated(forward: Callable[[jax.Array], jax.Array]) -> Layer:
    @jax.jit
    def layer(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(forward, x)
        return y, pullback(cotangent)[0]

    return layer


def torch_layer(x: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    inputs = torch.from_numpy(x).requires_grad_(True)
    y = torch.nn.BatchNorm1d(FEATURES, eps=EPSILON)(inputs)
    y.backward(torch.from_numpy(cotangent))
    return y.detach().numpy(), inputs.grad.numpy()


def measure(offsets: Sequence[float] = OFFSETS) -> dict[str, list[tuple[float, float]]]:
    """Largest error of outputs and of gradients, by layer and offset.

    Outputs are of order one; the error of gradients is a fraction of the largest exact one.
    """
    rng = np.random.default_rng(0)
    noise, cotangent = rng.normal(size=(2, BATCH, FEATURES))
    errors: dict[str, list[tuple[float, float]]] = {}
    for name, layer in layers().items():
        for offset in offsets:
            x, g = np.float32(noise + offset), np.float32(cotangent)
            want = exact_renorm if name == "ours, renorm" else exact
            (y, grad), (exact_y, exact_grad) = layer(x, g), want(x, g)
            grad_error = np.abs(grad - exact_grad).max() / np.abs(exact_grad).max()
            errors.setdefault(name, []).append((float(np.abs(y - exact_y).max()), float(grad_error)))
    return errors


def table(errors: dict[str, list[tuple[float, float]]], which: int) -> str:
    lines = [["offset", *errors], ["---:"] * (1 + len(errors))]
    for i, offset in enumerate(OFFSETS):
        figures = (rows[i][which] for rows in errors.values())
        lines.append([f"{offset:,}", *("NaN" if np.isnan(x) else f"{x:.1e}" for x in figures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    errors = measure()
    packages = ["jax", "flax", "dm-haiku", "equinox", *(["torch"] if "torch" in errors else [])]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    device = f"{jax.devices()[0].device_kind}, {platform.machine()}"
    formulas = "\n".join(f"- **{name}**: {formula}." for name, formula in FORMULAS.items() if name in errors)
    absent = "" if "torch" in errors else "\nPyTorch was not installed; its column is left out.\n"
    print(f"""# How exact the statistics are

Far from zero, the digits that tell examples apart are the last ones, and a batch norm loses them first. Ours
corrects its mean for its own rounding and keeps them all.

Written by `python tests/benchmarks/exactness.py > docs/exactness.md`. One batch of {BATCH} examples of
{FEATURES} features, N(0, 1) + offset in float32, is normalised in training with epsilon {EPSILON:g}. The
figures are the largest differences from numpy in float64 on the same numbers.

Device: {device}. Versions: {versions}.
{absent}
Outputs, which are of order one:

{table(errors, 0)}

Gradients with respect to the input, as a fraction of the largest one:

{table(errors, 1)}

What each computes:

{formulas}

## How large, how small

Outputs, statistics and gradients are right, or NaN where numbers overflow; the training program skips such a step and
counts it. Of ours, in float32:

| | right | beyond |
| --- | --- | --- |
| inputs | the squares of x - mean(x) sum to less than 3.4e38 | NaN |
| of 128 examples; of 100,000 values | up to 1e18; up to 4e16 | |
| small inputs | all; a variance below 1e-30 is nothing beside epsilon | |
| gradients | those of 1.2e-38 and more | zero on most devices |
| mask weights | from 1.2e-38 on, in any mixture | zero on most devices |
| sum of the weights, and of weight times input | below 3.4e38 | refused; NaN where it is traced |
| bfloat16 and float16 | as the float32 that they are turned into first | |

These limits are tests: `tests/nn/test_extremes.py`.""")


if __name__ == "__main__":
    main()
