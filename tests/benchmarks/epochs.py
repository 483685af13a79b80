"""Epochs: ours, each peer's, and the floor, which is the matrix products alone."""

import importlib
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from measure import fastest, median, ratio, say, spread, table, take_turns
from ml_collections import ConfigDict
from peers import NAMES

from vmapbn_flax import default_config
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.training.programs import Programs

FLOOR = "matrix products alone"
_ROW = 1024  # numbers that are read and written in a row, so that a gradient is still in the cache for all three
OURS = ("vmap", "batched", "none")

INTRO = """\
One epoch of 784-100-100-100-10 with batch norm before each sigmoid, Adam, batches of 128, shuffled: all 468 whole
batches of MNIST's 60,000 training images, drawing their order included. The floor is the forward and backward matrix
products of the same network in one compiled loop over as many batches, in float32, with neither gather nor anything
elementwise. Each peer is written the way its own documentation writes it, on arrays in memory
(`tests/benchmarks/peers/`, a page each)."""


def make_floor(config: ConfigDict, images: jax.Array, num_steps: int) -> Callable[[], None]:
    """The matrix products of `num_steps` steps: forward, and backward to every kernel and every hidden layer.

    Args:
      config: of the network and the batch size.
      images: float32, `(examples, features)`.
      num_steps: at most an epoch.
    """
    size = config.train.batch_size
    widths = (images.shape[1], *config.model.hidden, 10)
    kernels = [jnp.full(shape, 1e-3) for shape in itertools.pairwise(widths)]

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

    products = jax.jit(lambda kernels: lax.fori_loop(0, num_steps, step, kernels))
    return lambda: jax.block_until_ready(products(kernels))


def make_traffic(config: ConfigDict, features: int, num_steps: int) -> Callable[[], None]:
    """The least memory traffic of Adam in `num_steps` steps, in one loop with nearly no arithmetic.

    Parameters and both moments are read and written once, gradients are read once.
    """
    widths = (features, *config.model.hidden, 10)
    rows = -(-sum(a * b + b for a, b in itertools.pairwise(widths)) // _ROW)
    kept, gradients = jnp.zeros((rows, 3, _ROW)), jnp.ones((rows, 1, _ROW))
    update = jax.jit(
        lambda kept, gradients: lax.fori_loop(0, num_steps, lambda i, kept: kept + gradients, kept), donate_argnums=0
    )

    def steps() -> None:
        nonlocal kept
        kept = jax.block_until_ready(update(kept, gradients))

    return steps


def as_inputs(dataset: Dataset) -> jax.Array:
    """The training images as the floor takes them."""
    return jnp.asarray(dataset.train.images.reshape(len(dataset.train), -1), jnp.float32) / 255


def long_config() -> ConfigDict:
    """The default config, of a run that no benchmark gets to the end of."""
    config = default_config()
    config.train.num_epochs = 1000.0
    return config


def make_epochs(programs: Programs, state=None) -> Callable[[], None]:
    """The epochs of a run, one a call, as `Run` trains them; the order of each is drawn in its call."""
    state, step = programs.create() if state is None else state, 0

    def epoch() -> None:
        nonlocal state, step
        state = jax.block_until_ready(programs.advance(state, step, programs.steps_per_epoch))
        step += programs.steps_per_epoch

    return epoch


def make_ours(dataset: Dataset, norm: str) -> Callable[[], None]:
    config = long_config()
    config.model.norm = norm
    return make_epochs(Programs([config], dataset))


def make_floor_epoch(dataset: Dataset) -> Callable[[], None]:
    config = default_config()
    return make_floor(config, as_inputs(dataset), len(dataset.train) // config.train.batch_size)


def make_peers(dataset: Dataset, network: str = "mlp", names: Sequence[str] = NAMES) -> dict[str, Callable[[], None]]:
    """An epoch of each of the peers that is installed."""
    images, found = dataset.train.images, {}
    if network == "mlp":
        images = images.reshape(len(images), -1)
    for name in names:
        try:
            found[name], _ = importlib.import_module(f"peers.{name}_{network}").make(images, dataset.train.labels)
        except ModuleNotFoundError as error:
            say(f"  leaving {name} out: {error}; pip install -e '.[peers]'")
    return found


def run(repetitions: int, quick: bool) -> tuple[dict, str]:
    dataset = load_dataset(default_config().data)
    epochs = {norm: make_ours(dataset, norm) for norm in OURS}
    peers = make_peers(dataset)
    times = take_turns({FLOOR: make_floor_epoch(dataset), **epochs, **peers}, repetitions)
    others = [name for name in peers if name in times]
    best = fastest(times, others or [FLOOR])
    rows = []
    for name, seconds in times.items():
        to_floor, to_best = ratio(times, name, FLOOR), ratio(times, name, best)
        rows.append([name, median(seconds, 3), spread(seconds, 3), median(to_floor), spread(to_floor), median(to_best)])
    header = ["epoch, batch 128", "seconds", "quartiles", "to the floor", "quartiles", f"to {best}"]
    alike = ratio(times, "vmap", "batched")
    twins = (
        f"vmap / batched: {median(alike, 3)}, quartiles {spread(alike, 3)}. The two compile to the same instructions, "
        "but for their\nnames (`tests/training/test_programs.py`), so the ratio shows how even the measurement was."
    )
    return {"seconds": times}, f"{INTRO}\n\n{table(header, rows)}\n\n{twins}"
