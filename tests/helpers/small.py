"""Small runs to test with: a synthetic data set, narrow networks, and trees compared bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny
from vmapbn_flax import default_config
from vmapbn_flax.data import Dataset, Split, load_dataset
from vmapbn_flax.training.hyperparameters import make_hyperparameters
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import create_state
from vmapbn_flax.training.steps import Batch, make_train_step

CLASSES, IMAGE, BATCH = 4, (3, 4), 16
FEATURES = 12
STEPS_PER_EPOCH = 6


def config(**changes):
    """`configs/tiny.py`, narrower still, with `changes` of fields named like `model__norm`."""
    config = tiny.get_config()
    fields = {"model__hidden": (6,), "train__batch_size": BATCH, "train__num_epochs": 4.0} | changes
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config.lock()


def split(size, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    images = rng.integers(0, 256, (size, *IMAGE)).astype(np.uint8)
    images[np.arange(size), 0, labels] |= 128  # so that there is something to learn
    return Split(images, labels)


@functools.cache
def dataset(validation_size=0):
    train, first = split(100, seed=1), 100 - validation_size
    validation = train[first:] if validation_size else None
    return Dataset("small", CLASSES, train[:first], split(37, seed=2), validation)


def load(data):
    """`load_dataset` to which "small" is one, too."""
    if data.name != "small":
        return load_dataset(data)
    found = dataset(data.validation_size)
    return dataclasses.replace(found, streamed=found.nbytes > data.memory_limit * 1e9)


@functools.cache
def mnist():
    return load_dataset(default_config().data)


@functools.cache
def programs(**changes):
    """The programs of `config(**changes)` on `dataset()`, compiled once for all tests."""
    return Programs([config(**changes)], dataset())


def hyper(config, **changes):
    """The hyperparameters of `config` with `changes` of fields named like `optimizer__learning_rate`."""
    hyper = make_hyperparameters(config, STEPS_PER_EPOCH)
    for name, value in changes.items():
        name = name.replace("__", ".")
        hyper[name] = hyper[name].dtype.type(value)
    return hyper


def advanced(programs, *counts, state=None, step=0):
    """The state after so many more steps, on the host."""
    state = programs.create() if state is None else state
    for count in counts:
        state, step = programs.advance(state, step, count), step + count
    return programs.snapshot(state)


def start():
    """The state that every small run with batch norm starts in, one step on: past the rate of zero."""
    state = programs().create()
    return state.replace(step=state.step + 1)


@functools.cache
def train_step(**changes):
    """The compiled step of `config(**changes)`; most of the time of these tests is compiling."""
    return jax.jit(step_of(config(**changes)))


def step_of(config):
    return make_train_step(config.model, config.optimizer, config.train.max_skipped_steps, CLASSES)


@functools.cache
def members():
    """Three members' config, hyperparameters, first states, and the step that takes them all over one batch."""
    shared = config()
    hypers = [hyper(shared, optimizer__learning_rate=rate, seed=seed) for seed, rate in ((0, 0.1), (1, 0.1), (0, 1.0))]
    create = functools.partial(create_state, shared.model, shared.optimizer, CLASSES, IMAGE)
    start = jax.jit(jax.vmap(create))(stack(hypers))
    step = jax.jit(jax.vmap(step_of(shared), in_axes=(0, 0, None)))
    return shared, hypers, start, step


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def member(i, tree):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def batch(size=BATCH, seed=0, mask=None):
    examples = split(size, seed)
    images, labels = jnp.array(examples.images), jnp.array(examples.labels)
    return Batch(images, labels, None if mask is None else jnp.array(mask))


def pad(batch, size):
    """`batch` with examples of nonsense, masked, up to `size`."""
    missing = size - len(batch.labels)
    mask = jnp.arange(size) < len(batch.labels)
    images = jnp.concatenate([batch.images, jnp.full((missing, *IMAGE), 255, jnp.uint8)])
    return Batch(images, jnp.concatenate([batch.labels, jnp.full(missing, 3, jnp.int32)]), mask)


def assert_same_bits(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_bits(a), _bits(b)), got, expected)


def _bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)
