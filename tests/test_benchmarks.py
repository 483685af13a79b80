"""The peers that the benchmark compares ours with do train, its floors are of our step, and its figures are right."""

import importlib
import importlib.util
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax import BatchedConvNet, default_config

BENCHMARKS = Path(__file__).parent / "benchmarks"
EXAMPLES = 20 * 128 + 5  # twenty batches, and a few that no epoch needs
PEERS = {"mlp": ("haiku", "nnx", "linen", "equinox", "torch"), "conv": ("linen", "torch")}


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"peers", *(path.stem for path in BENCHMARKS.glob("*.py"))}:
            del sys.modules[name]


def require(library):
    if not importlib.util.find_spec(library if library in ("haiku", "equinox", "torch") else "flax"):
        pytest.skip(f"{library} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(("network", "name"), [(network, name) for network, names in PEERS.items() for name in names])
def test_peers_learn(network, name):
    require(name)
    train, test = small.mnist().train[:EXAMPLES], small.mnist().test[:1000]
    shape = (-1, 784) if network == "mlp" else (-1, 28, 28)
    epoch, predict = importlib.import_module(f"peers.{name}_{network}").make(train.images.reshape(shape), train.labels)

    def accuracy():
        return np.mean(predict(test.images.reshape(shape)) == test.labels)

    before = accuracy()
    for _ in range(15 if network == "mlp" else 20):
        epoch()
    assert before < 0.3
    assert accuracy() > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_recipe_of_torch_learns(network):
    require("torch")
    peers, recipe = importlib.import_module("peers"), importlib.import_module("peers.torch_accuracy")
    (images, labels), (test_images, test_labels) = peers.mnist()
    train, test = (images[:EXAMPLES], labels[:EXAMPLES]), (test_images[:1000], test_labels[:1000])
    found = list(recipe.accuracies(network, 15, 0, train, test))
    assert len(found) == 4 * 15
    assert found[0] < 0.3
    assert found[-1] > 0.7
    assert list(recipe.accuracies(network, 0.1, 0, train, test))[-1] < 0.3  # two steps


@pytest.mark.parametrize("name", PEERS["conv"])
def test_peers_shift_images(name):
    require(name)
    images = np.zeros((400, 7, 7), np.float32)
    images[:, 3, 3] = 1
    module = importlib.import_module(f"peers.{name}_conv")
    if name == "torch":
        torch = importlib.import_module("torch")
        shifted = module.shift(torch.from_numpy(images[:, np.newaxis]))[:, 0].numpy()
    else:
        corners = np.random.default_rng(0).integers(0, 5, (400, 2))
        shifted = np.asarray(module.shift(images, corners))
    assert {tuple(place) for place in np.argwhere(shifted)[:, 1:]} == {(i, j) for i in range(1, 6) for j in range(1, 6)}
    assert shifted.sum() == 400


def operations(function, *arguments):
    """How often each operation occurs in a function for a CPU; products and convolutions with all that defines them."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general)\(?[^,]*,[^,]*, (.*)", text)
    others = re.findall(r"stablehlo\.(\w+)", text)
    return Counter(products), set(others) - {"convolution", "dot_general"}


def test_floor_of_convolutions_is_of_a_step():
    convolutions = importlib.import_module("convolutions")
    config = default_config("conv")
    config.train.batch_size = 2
    network, images = BatchedConvNet(num_classes=10, norm=None), jnp.ones((2, 28, 28, 1))
    params = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), images)

    def loss(params):
        return jnp.sum(network.apply(params, images, train=True) ** 2)

    of_step, _ = operations(jax.grad(loss), params)
    of_floor, others = operations(convolutions.backward, *convolutions.layers(config, 28))
    assert sum(of_floor.values()) == 3 + 2 + 3 + 3  # forward, to the hidden layers, to the kernels, the dense layer's
    assert of_floor == of_step
    # The others choose the form for the platform, or move numbers: none computes.
    choose, move = {"case", "convert"}, {"reshape", "transpose", "reverse", "pad", "slice", "concatenate"}
    assert others <= {"constant", "return", *choose, *move}


def test_parts_of_a_run():
    parts = importlib.import_module("program").parts
    seconds = {"compile": 1.0, "startup": 2.0, "train": 4.0, "evaluate": 0.5, "checkpoint": 0.25, "total": 9.0}
    # A loop of 5 seconds, 3 of them in the compiled program.
    found = parts(seconds, {"examples_per_second": 200.0, "fraction_outside_device_program": 0.4}, 1000, epochs=2)
    assert found == {"train": 2.0, "outside": 0.5, "rows": 0.5, "evaluations": 0.25, "saves": 0.125}


def test_speed_is_read_from_the_console():
    program, commands = importlib.import_module("program"), importlib.import_module("commands")
    lines = ["step 3 of 6: test_accuracy 0.5", "  examples_per_second               493     "]
    lines += ["  fraction_outside_device_program   0.0017  ", "  seconds                           298.8 "]
    finished = commands.Finished(1.0, 1.0, [(0.5, line) for line in lines])
    assert program.said_speed(finished) == {"examples_per_second": 493, "fraction_outside_device_program": 0.0017}


def test_seconds_to_an_accuracy():
    accuracy, commands = importlib.import_module("accuracy"), importlib.import_module("commands")
    lines = ["starting", "step 1 of 3: test_loss 0.1, test_accuracy 0.9700", "test_accuracy 0.9810"]
    lines += ["step 3 of 3: test_loss 0.1, test_accuracy 0.9799", "  test_accuracy       0.9799  "]
    finished = commands.Finished(9.0, 1.0, [(float(at), line) for at, line in enumerate(lines)])
    assert accuracy.said(finished) == [(1.0, 0.97), (2.0, 0.981), (3.0, 0.9799)]
    assert [accuracy.seconds_to(goal, finished) for goal in (0.97, 0.98, 0.99)] == [1.0, 2.0, None]
    assert accuracy.cell([3.0, 1.0, 2.0]) == "2.0 (1.0 to 3.0)"
    assert accuracy.cell([3.0, None]) == "not in 1 of 2"
    assert accuracy.ratio([3.0, None, 4.0], [2.0, 1.0, None]) == "1.50"
    assert accuracy.ratio([None], [1.0]) == ""
