"""Folding: the network without its norms computes the same, and what cannot be folded is refused."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.own_network import Net
from tests.helpers import quick, small
from vmapbn_flax import (
    MLP,
    BatchedBatchNorm,
    BatchedConvNet,
    BatchedMLP,
    BatchedResNet,
    BatchNorm,
    ConvNet,
    ResNet,
    VmapBatch,
    fold,
)


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch):
    """`fold` evaluates either network."""
    monkeypatch.setattr(jax, "jit", quick.jit)


CONV = {"num_classes": 10, "features": (4, 6)}
SMALL = {"num_classes": 10, "blocks": (1, 1), "width": 4}
NETWORKS = {
    "mlp": MLP(hidden=(8, 8), num_classes=10),
    "conv": ConvNet(**CONV),
    "resnet": ResNet(**SMALL, zero_scale=True),
    "resnet18": ResNet(**SMALL, imagenet=True),
    "bottleneck": ResNet(**SMALL, imagenet=True, bottleneck=True),
    "batched mlp": BatchedMLP(hidden=(8, 8), num_classes=10),
    "batched conv": BatchedConvNet(**CONV),
    "batched resnet": BatchedResNet(**SMALL),
    "own": Net(num_classes=10, norm=BatchNorm, width=4),
    "averaged": MLP(hidden=(8,), num_classes=10, norm=partial(BatchNorm, momentum=None)),
    "no scale": MLP(hidden=(8,), num_classes=10, norm=partial(BatchNorm, use_scale=False, epsilon=jnp.float32(0.1))),
    "no bias": MLP(hidden=(8,), num_classes=10, norm=partial(BatchNorm, use_bias=False, epsilon=0.1)),
    "no norm": MLP(hidden=(8,), num_classes=10, norm=None),
}


def init(network, x):
    """Variables whose every leaf matters: no zero biases, no unit scales, positive variances."""
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            values = rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
        else:
            values = 0.5 + rng.uniform(size=leaf.shape)
        return np.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def evaluate(network, variables, images):
    network = network if type(network).__name__.startswith("Batched") else VmapBatch(network)
    return np.asarray(quick.jit(partial(network.apply, train=False))(variables, images))


def assert_equal_in_evaluation(network, images):
    """Folds `network` and returns the folded variables."""
    x = images[:1] if type(network).__name__.startswith("Batched") else images[0]
    variables = init(network, x)
    folded, folded_variables = fold(network, variables, x)
    logits = evaluate(network, variables, images)
    np.testing.assert_allclose(
        evaluate(folded, folded_variables, images), logits, rtol=0, atol=1e-5 * np.abs(logits).max()
    )
    return folded_variables


SLOW = ("resnet18", "batched resnet", "bottleneck")  # whose layers the others have, too


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(network, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, network in NETWORKS.items()
    ],
)
def test_folded_networks_compute_the_same(network):
    images = np.float32(small.mnist().test.images[:100]) / 255
    images = images.reshape(100, -1) if isinstance(network, MLP) else images[..., np.newaxis]
    variables = assert_equal_in_evaluation(network, images)
    # An ordinary tree: that of the network with norm=None.
    plain = network.clone(norm=None, **{"zero_scale": False} if isinstance(network, ResNet) else {})
    x = images[:1] if type(network).__name__.startswith("Batched") else images[0]
    fresh = jax.eval_shape(partial(plain.init, train=False), jax.random.key(0), x)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )


def test_the_numbers_are_the_formula():
    network = MLP(hidden=(3,), num_classes=2, norm=partial(BatchNorm, epsilon=0.5))
    variables = init(network, np.ones(4))
    layer, norm = variables["params"]["dense_0"], variables["params"]["norm_0"]
    stats = variables["batch_stats"]["norm_0"]
    multiplier = np.float64(norm["scale"]) / np.sqrt(np.float64(stats["var"]) + 0.5)
    _, folded = fold(network, variables, np.ones(4))
    kernel, bias = folded["params"]["dense_0"]["kernel"], folded["params"]["dense_0"]["bias"]
    np.testing.assert_array_equal(kernel, np.float32(np.float64(layer["kernel"]) * multiplier))
    np.testing.assert_array_equal(bias, np.float32(norm["bias"] - stats["mean"] * multiplier))


class Own(nn.Module):
    """Calls `body(norm, x)` on a flat or spatial example, where `norm(name)` makes a norm, or the identity."""

    body: Callable
    norm: Callable | None = BatchNorm

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        def norm(name):
            return (lambda x: x) if self.norm is None else lambda x: self.norm(name=name)(x, train=train, mask=mask)

        return self.body(norm, x)


def norm_first(norm, x):
    x = norm("norm_0")(x)
    x = nn.relu(norm("norm_1")(nn.Conv(3, (2, 2), padding="VALID", name="conv_0")(x)))
    x = nn.Conv(3, (1, 1), name="conv_1")(norm("norm_2")(x))  # 1x1: "SAME" pads nothing
    return nn.Dense(4, name="logits")(norm("norm_3")(nn.relu(x).ravel()))


class Stages(nn.Module):
    """A layer and its norm in a module of their own, without names, recomputed in the backward pass."""

    norm: Callable | None = BatchNorm

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        class Stage(nn.Module):
            norm: Callable | None

            @nn.compact
            def __call__(self, x):
                x = nn.Dense(3)(x)
                return nn.relu(x if self.norm is None else self.norm()(x, train=train))

        for _ in range(2):
            x = nn.remat(Stage)(self.norm)(x)
        return x


def test_own_networks_fold():
    images = np.random.default_rng(0).normal(size=(5, 6, 7, 2)).astype(np.float32)
    folded = assert_equal_in_evaluation(Own(norm_first), images)
    assert folded["params"].keys() == {"conv_0", "conv_1", "logits"}
    assert_equal_in_evaluation(Stages(), images)


def test_a_layer_used_twice_folds_with_the_norm_it_always_has():
    class Shared(nn.Module):
        norm: Callable | None = BatchNorm

        def setup(self):
            self.dense = nn.Dense(4)
            self.between = self.norm() if self.norm else None

        def __call__(self, x, *, train, mask=None):
            for _ in range(2):
                x = self.dense(x)
                x = nn.tanh(self.between(x, train=train) if self.between else x)
            return x

    assert_equal_in_evaluation(Shared(), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))


def skip(norm, x):
    y = nn.Dense(7, name="dense")(x)
    return y + norm("norm")(y)


def twice(norm, x):
    dense = nn.Dense(7, name="dense")
    return norm("norm")(dense(x)) + dense(nn.relu(x))


REFUSED = {
    "a padded convolution": (
        lambda norm, x: nn.Conv(3, (3, 3), name="conv")(norm("norm")(x)),
        "cannot fold norm into conv after it: got a convolution that pads its input with zeros",
    ),
    "grouped": (
        lambda norm, x: nn.Conv(2, (3, 3), padding=0, feature_group_count=2, name="conv")(norm("norm")(x)),
        "cannot fold norm into conv after it: got groups of features, expected one",
    ),
    "between relus": (
        lambda norm, x: nn.Dense(3)(nn.relu(norm("norm")(nn.relu(nn.Dense(4)(x))))),
        "cannot fold norm: got an input that is not the output of one dense layer or convolution",
    ),
    "used twice": (twice, "cannot fold norm: got an input that is not the output of one"),
    "used beside the norm": (skip, r"got results that differ by .* nothing but the norm uses the output"),
    "no bias": (
        lambda norm, x: norm("norm")(nn.Dense(3, use_bias=False, name="dense")(x)),
        r"Own with norm=None: got dense without a bias; expected one.* use_bias=self.norm is None",
    ),
    "a norm that stays": (
        lambda norm, x: BatchNorm(name="stays")(nn.Dense(3, name="dense")(x), train=False),
        "Own with norm=None: got .* the same layers by the same names, without norms",
    ),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_folded_is_refused(body, message):
    x = np.ones((6, 7, 2), np.float32)
    network = Own(body)
    with pytest.raises(ValueError, match=message) as caught:
        fold(network, init(network, x), x)
    assert "\n" not in str(caught.value)


def test_a_network_without_norms_to_leave_out_is_refused():
    x = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="Dense: got a network without an attribute norm"):
        fold(nn.Dense(3), {}, x)

    class Always(Own):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            return self.norm(name="norm")(nn.Dense(3)(x), train=train)

    network = Always(None)
    with pytest.raises(ValueError, match="Always with norm=None: got \"'NoneType' object is not callable\""):
        fold(network, init(network, x), x)

    network = MLP(hidden=(3,), num_classes=2)
    variables = init(network, x)
    variables["batch_stats"]["norm_9"] = variables["batch_stats"]["norm_0"]
    with pytest.raises(ValueError, match="MLP: got statistics of norm_9; expected only those of a BatchNorm that"):
        fold(network, variables, x)


@pytest.mark.parametrize("var", [0.0, np.nan])
def test_variances_that_are_not_positive_are_refused(var):
    network = MLP(hidden=(3,), num_classes=2, norm=partial(BatchNorm, epsilon=0.0))
    variables = init(network, np.ones(4))
    variables["batch_stats"]["norm_0"]["var"] = np.float32([1, var, 1])
    with pytest.raises(ValueError, match=f"cannot fold norm_0: got variances, with epsilon, down to {var}; expected"):
        fold(network, variables, np.ones(4))


def test_layers_in_a_stack_are_refused():
    class Block(nn.Module):
        norm: Callable | None

        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(3, name="dense")(x)
            return (x if self.norm is None else self.norm(name="norm")(x, train=False)), None

    class Stack(nn.Module):
        norm: Callable | None = BatchNorm

        @nn.compact
        def __call__(self, x, *, train, mask=None):
            axes = {"params": 0, "batch_stats": 0}
            return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)(self.norm)(x, None)[0]

    x = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"got statistics of shape \(2, 3\) for 3 features"):
        fold(Stack(), init(Stack(), x), x)


def test_other_collections_and_narrow_types_stay():
    network = MLP(hidden=(3,), num_classes=2, norm=partial(BatchNorm, param_dtype=jnp.bfloat16))
    variables = init(network, np.ones(4))
    variables["params"]["dense_0"]["kernel"] = variables["params"]["dense_0"]["kernel"].astype(jnp.bfloat16)
    _, folded = fold(network, {**variables, "cache": {"seen": np.ones(3)}}, np.ones(4))
    assert folded["cache"]["seen"].shape == (3,)
    assert folded["params"]["dense_0"]["bias"].dtype == jnp.bfloat16
    assert folded["params"]["logits"]["kernel"].dtype == np.float32


def test_a_batched_norm_of_ones_own_folds():
    class Twin(Own):
        norm: Callable | None = BatchedBatchNorm

    images = np.random.default_rng(0).normal(size=(5, 6, 7, 2)).astype(np.float32)
    network = Twin(norm_first)
    variables = init(network, images)
    assert len(fold(network, variables, images)) == 2
