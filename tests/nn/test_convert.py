"""Conversions: the numbers survive bit for bit, and the converted network computes the same."""

import functools
import subprocess
import sys
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import quick
from vmapbn_flax import MLP, BatchNorm, VmapBatch
from vmapbn_flax.nn.convert import from_equinox, from_torch, to_equinox, to_torch

WIDTHS = (6, 5, 4, 3)
MOMENTUM = 0.9
X = np.random.default_rng(1).normal(size=(16, WIDTHS[0])).astype(np.float32)
# Values of order one after three layers of float32.
close = partial(np.testing.assert_allclose, rtol=0, atol=3e-6)

NORM = partial(BatchNorm, momentum=MOMENTUM)
TORCH_NORM = partial(BatchNorm, momentum=MOMENTUM, unbiased_running_var=True)


def mlp(norm):
    return MLP(hidden=WIDTHS[1:-1], num_classes=WIDTHS[-1], norm=norm)


def random_variables(norm):
    """Of our network: kernels of either sign that keep the sigmoids from saturating, all else positive."""
    shapes = jax.eval_shape(partial(mlp(norm).init, train=False), jax.random.key(0), X[0])
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=leaf.shape) if leaf.ndim == 2 else rng.uniform(1, 3, leaf.shape) for leaf in leaves]
    return tree.unflatten(jnp.asarray(draw, leaf.dtype) for draw, leaf in zip(draws, leaves, strict=True))


@partial(quick.jit, static_argnums=(0, 3))
def apply(norm, variables, x, train):
    return VmapBatch(mlp(norm)).apply(variables, x, train=train, mutable=["batch_stats"])


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def assert_same_state_dict(a, b):
    assert list(a) == list(b)
    for key in b:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key].numpy(), b[key].numpy())


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def torch_network(torch, norm=True, bias=False, **attributes):
    """`bias`: whether the linear layers before norms have one; random, as PyTorch starts it."""
    attributes = {"momentum": 1 - MOMENTUM, **attributes}
    layers = []
    for width, next_width in pairwise(WIDTHS[:-1]):
        norms = [torch.nn.BatchNorm1d(next_width, **attributes)] if norm else []
        layers += [torch.nn.Linear(width, next_width, bias=bias or not norm), *norms, torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(*WIDTHS[-2:]))


TORCH_NETWORKS = [
    pytest.param(TORCH_NORM, {}, id="norm"),
    pytest.param(TORCH_NORM, {"bias": True}, id="biases before norms"),
    pytest.param(partial(TORCH_NORM, momentum=None), {"momentum": None}, id="cumulative"),
    pytest.param(partial(TORCH_NORM, use_scale=False, use_bias=False), {"affine": False}, id="not affine"),
    pytest.param(None, {"norm": False}, id="no norm"),
]


@pytest.mark.parametrize(("norm", "attributes"), TORCH_NETWORKS)
def test_torch_holds_our_numbers_and_computes_the_same(torch, norm, attributes):
    variables = random_variables(norm)
    network = torch_network(torch, **attributes)
    network.load_state_dict(to_torch(variables, network.state_dict()))
    cumulative = "momentum" in attributes
    assert_bitwise(from_torch(network.state_dict(), cumulative=cumulative), variables)

    for train in (False, True):
        network.train(train)
        y, updates = apply(norm, variables, X, train)
        close(y, network(torch.from_numpy(X)).detach().numpy())
    trained = from_torch(network.state_dict(), cumulative=cumulative)
    jax.tree.map(close, trained.get("batch_stats", {}), updates.get("batch_stats", {}))


@pytest.mark.parametrize(("norm", "attributes"), TORCH_NETWORKS)
def test_torch_state_dict_survives_the_way_here_and_back(torch, norm, attributes):
    network = torch_network(torch, **attributes)
    network(torch.from_numpy(X))  # num_batches_tracked becomes 1
    state_dict = network.state_dict()
    variables = from_torch(state_dict, cumulative="momentum" in attributes)
    back = to_torch(variables, state_dict)
    if "bias" in attributes:
        for linear, running_mean in (("0", "1"), ("3", "4")):
            bias, mean = state_dict[f"{linear}.bias"], f"{running_mean}.running_mean"
            state_dict |= {f"{linear}.bias": torch.zeros_like(bias), mean: state_dict[mean] - bias}
    assert_same_state_dict(back, state_dict)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == jax.tree.map(jnp.shape, random_variables(norm))


def test_torch_biases_before_norms_change_nothing(torch):
    """A network that has them evaluates and trains as its conversion: statistics but for the biases, and gradients."""
    network = torch_network(torch, bias=True)
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, torch.nn.Linear):
                layer.bias.copy_(torch.linspace(-2, 3, len(layer.bias)))
    variables = from_torch(network.state_dict())
    for train in (False, True, True, False):
        network.train(train)
        y, updates = apply(TORCH_NORM, variables, X, train)
        close(y, network(torch.from_numpy(X)).detach().numpy())
        variables = {**variables, **updates}
        jax.tree.map(close, from_torch(network.state_dict()), variables)


def test_torch_count_is_num_batches_tracked(torch):
    network = torch_network(torch, momentum=None)
    variables = random_variables(partial(TORCH_NORM, momentum=None))
    state_dict = to_torch(variables, network.state_dict())
    assert int(state_dict["1.num_batches_tracked"]) == variables["batch_stats"]["norm_0"]["count"] > 0


def test_torch_training_leaves_the_converted_numbers_alone(torch):
    """PyTorch updates tensors in place, and jax can share their memory."""
    network = torch_network(torch)
    variables = from_torch(network.state_dict())
    before = jax.tree.map(np.array, variables)
    state_dict = to_torch(variables, network.state_dict())
    with torch.no_grad():
        for tensor in [*network.state_dict().values(), *state_dict.values()]:
            tensor.add_(1)
    assert_bitwise(variables, before)


def test_torch_names_of_layers_are_free(torch):
    network = torch_network(torch)
    state_dict = {f"net.layer{key}": value for key, value in network.state_dict().items()}
    variables = from_torch(state_dict)
    assert_bitwise(variables, from_torch(network.state_dict()))
    assert_same_state_dict(to_torch(variables, state_dict), state_dict)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda torch, d: {"a.bias": torch.ones(5)},
            "got 'a.*' with bias; expected weight, bias of a Linear",
        ),
        (
            lambda torch, d: {"2.weight": torch.ones(5), "2.bias": torch.ones(5)},
            "got '2.*' with weight, bias",
        ),
        (
            lambda torch, d: {"1.running_mean": torch.ones(7)},
            r"statistics of shape \(7,\) for norm_0; .*\(5,\)",
        ),
        (lambda torch, d: {"3.weight": torch.ones(4, 7)}, "got 7 inputs of dense_1; expected 5"),
        (
            lambda torch, d: {"7.weight": d["0.weight"]},
            "got 4 linear .* and 2 batch norms",
        ),
        (lambda torch, d: {"0.bias": torch.ones(1)}, r"got a bias of shape \(1,\) for dense_0; expected \(5,\)"),
    ],
)
def test_torch_refuses_what_is_no_mlp(torch, change, message):
    state_dict = torch_network(torch).state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        from_torch({**state_dict, **change(torch, state_dict)})
    assert "\n" not in str(caught.value)


def test_a_missing_bias_is_refused_where_no_norm_follows(torch):
    for network, name in ((torch_network(torch), "6.bias"), (torch_network(torch, norm=False), "0.bias")):
        state_dict = network.state_dict()
        del state_dict[name]
        with pytest.raises(ValueError, match=f"got no bias for {'logits' if name == '6.bias' else 'dense_0'}"):
            from_torch(state_dict)


def test_torch_refuses_variables_of_another_network(torch):
    like = torch_network(torch).state_dict()
    variables = random_variables(TORCH_NORM)
    variables["params"]["logits"]["bias"] = jnp.ones(7)
    with pytest.raises(ValueError, match=r"got \(7,\) for params/logits/bias in the variables.* has \(3,\)"):
        to_torch(variables, like)
    with pytest.raises(ValueError, match=r"got nothing for batch_stats/norm_0/mean .* has \(5,\)"):
        to_torch(random_variables(None), like)


class EquinoxNetwork(eqx.Module):
    dense: list
    norm: list

    def __init__(self, key, mode="batch", bias=False):
        """`bias`: whether the linear layers before norms have one."""
        *keys, last = jax.random.split(key, len(WIDTHS) - 1)
        pairs, bias = pairwise(WIDTHS[:-1]), bias or not mode
        self.dense = [eqx.nn.Linear(*pair, use_bias=bias, key=key) for pair, key in zip(pairs, keys, strict=True)]
        self.dense.append(eqx.nn.Linear(*WIDTHS[-2:], key=last))
        self.norm = [
            eqx.nn.BatchNorm(width, "batch", momentum=MOMENTUM, mode=mode) if mode else eqx.nn.Identity()
            for width in WIDTHS[1:-1]
        ]

    def __call__(self, x, state):
        for dense, norm in zip(self.dense, self.norm, strict=False):
            x = dense(x)
            if isinstance(norm, eqx.nn.BatchNorm):
                x, state = norm(x, state)
            x = jax.nn.sigmoid(x)
        return self.dense[-1](x), state


def sequential(key):
    network = EquinoxNetwork(key)
    pairs = zip(network.dense, network.norm, strict=False)
    hidden = [layer for dense, norm in pairs for layer in (dense, norm, eqx.nn.Lambda(jax.nn.sigmoid))]
    return eqx.nn.Sequential([*hidden, network.dense[-1]])


@functools.cache
def compiled(make):
    return eqx.filter_jit(eqx.nn.make_with_state(make), compiler_options=quick.OPTIONS)


def equinox_network(make=EquinoxNetwork, **attributes):
    return compiled(make)(jax.random.key(0), **attributes)


@partial(eqx.filter_jit, compiler_options=quick.OPTIONS)
def equinox_apply(model, state, x):
    return jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)


@pytest.mark.parametrize("make", [EquinoxNetwork, sequential, partial(EquinoxNetwork, bias=True)])
def test_equinox_batch_mode_holds_our_numbers_and_computes_the_same(make):
    variables = random_variables(NORM)
    model, state = to_equinox(variables, *equinox_network(make))
    assert_bitwise(from_equinox(model, state), variables)

    y, _ = equinox_apply(eqx.nn.inference_mode(model), state, X)
    close(y, apply(NORM, variables, X, False)[0])
    y, state = equinox_apply(model, state, X)
    expected, updates = apply(NORM, variables, X, True)
    close(y, expected)
    # Straight after, with no warm-up of either average:
    jax.tree.map(close, from_equinox(model, state)["batch_stats"], updates["batch_stats"])


def test_equinox_ema_mode_evaluates_the_same():
    variables = random_variables(NORM)
    model, state = to_equinox(variables, *equinox_network(mode="ema"))
    assert_bitwise(from_equinox(model, state), variables)
    y, _ = equinox_apply(eqx.nn.inference_mode(model), state, X)
    close(y, apply(NORM, variables, X, False)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_trained_network_evaluates_the_same_here(mode, bias):
    """In `mode="batch"` the statistics are divided by 1 - momentum**2 on the way."""
    model, state = equinox_network(mode=mode, bias=bias)
    for x in (X, 3 * X):
        _, state = equinox_apply(model, state, x)
    variables = from_equinox(model, state)
    y, _ = equinox_apply(eqx.nn.inference_mode(model), state, X)
    close(y, apply(NORM, variables, X, False)[0])
    assert_bitwise(from_equinox(*to_equinox(variables, model, state)), variables)


def test_equinox_without_norm_and_fresh():
    model, state = equinox_network(mode=None)
    variables = from_equinox(model, state)
    assert variables.keys() == {"params"}
    assert_bitwise(from_equinox(*to_equinox(variables, model, state)), variables)
    for mode in ("batch", "ema"):
        stats = from_equinox(*equinox_network(mode=mode))["batch_stats"]["norm_0"]
        np.testing.assert_array_equal([stats["mean"], stats["var"]], [[0] * 5, [1] * 5])


def test_equinox_leaves_the_callers_model_and_state_alone():
    model, state = equinox_network()
    before = from_equinox(model, state)
    to_equinox(random_variables(NORM), model, state)
    assert_bitwise(from_equinox(model, state), before)


def test_equinox_refuses_variables_of_another_network():
    variables = random_variables(NORM)
    with pytest.raises(ValueError, match=r"got nothing for params/dense_0/bias .* has \(5,\)"):
        to_equinox(variables, *equinox_network(mode=None))
    with pytest.raises(ValueError, match="got 0 linear layers and 0 batch norms; expected an MLP"):
        from_equinox(eqx.nn.Identity(), None)
    model, state = equinox_network(mode=None)
    no_bias = eqx.tree_at(lambda model: model.dense[0].bias, model, None)
    with pytest.raises(ValueError, match="got no bias for dense_0"):
        from_equinox(no_bias, state)


def test_peers_are_imported_only_when_asked_for():
    line = "import sys, vmapbn_flax.nn.convert; print({'torch', 'equinox', 'haiku'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
