"""Conversions of `ConvNet`, and of folded networks: bit for bit, and the converted network computes the same."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import quick
from tests.helpers.small import assert_same_bits
from tests.nn.test_convert import WIDTHS, X, equinox_apply, equinox_network, mlp, torch_network
from tests.nn.test_folding import evaluate, init
from vmapbn_flax import BatchNorm, ConvNet, ResNet, VmapBatch, fold
from vmapbn_flax.nn.convert import from_equinox, from_torch, make_torch, to_equinox, to_torch

MOMENTUM, FEATURES, CLASSES = 0.9, (4, 6), 3
IMAGES = np.random.default_rng(2).normal(size=(8, 9, 10, 2)).astype(np.float32)  # (batch, height, width, channels)
CHANNELS_FIRST = IMAGES.transpose(0, 3, 1, 2)
LAST = FEATURES[-1] * (9 // 4) * (10 // 4)  # inputs of the dense layer
NORM = partial(BatchNorm, momentum=MOMENTUM)
TORCH_NORM = partial(NORM, unbiased_running_var=True)
close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)


def conv_net(norm=NORM):
    return ConvNet(num_classes=CLASSES, features=FEATURES, norm=norm)


@partial(quick.jit, static_argnums=(0, 2))
def apply(norm, variables, train=False):
    return VmapBatch(conv_net(norm)).apply(variables, jnp.asarray(IMAGES), train=train, mutable=["batch_stats"])


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def torch_conv_net(torch, norm=True, bias=False):
    layers, channels = [], IMAGES.shape[-1]
    for features in FEATURES:
        norms = [torch.nn.BatchNorm2d(features, momentum=1 - MOMENTUM)] if norm else []
        conv = torch.nn.Conv2d(channels, features, 3, padding=1, bias=bias or not norm)
        layers += [conv, *norms, torch.nn.MaxPool2d(2), torch.nn.ReLU()]
        channels = features
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(LAST, CLASSES))


@pytest.mark.parametrize("bias", [False, True])
def test_torch_holds_our_numbers_and_computes_the_same(torch, bias):
    network = torch_conv_net(torch, bias=bias)
    variables = init(conv_net(TORCH_NORM), IMAGES[0])
    network.load_state_dict(to_torch(variables, network.state_dict()))
    assert_same_bits(from_torch(network.state_dict()), variables)
    for train in (False, True):
        network.train(train)
        logits, updates = apply(TORCH_NORM, variables, train)
        close(logits, network(torch.from_numpy(CHANNELS_FIRST)).detach().numpy())
    jax.tree.map(close, from_torch(network.state_dict())["batch_stats"], updates["batch_stats"])


def test_torch_biases_before_norms_change_nothing(torch):
    network = torch_conv_net(torch, bias=True).eval()
    logits, _ = apply(NORM, from_torch(network.state_dict()))
    close(logits, network(torch.from_numpy(CHANNELS_FIRST)).detach().numpy())


def test_torch_state_dict_survives_the_way_here_and_back(torch):
    for network in (torch_conv_net(torch), torch_conv_net(torch, norm=False)):
        state_dict = network.state_dict()
        back = to_torch(from_torch(state_dict), state_dict)
        assert list(back) == list(state_dict)
        assert all(torch.equal(back[name], state_dict[name]) for name in back)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"0.weight": d["0.weight"][:, :, :1, :1]}, r"a window of \(1, 1\) for conv_0; expected \(3, 3\)"),
        (lambda d: {"4.weight": d["4.weight"][:, :3]}, "got 3 inputs of conv_1; expected 4"),
        (lambda d: {"9.weight": d["9.weight"][:, 1:]}, f"got {LAST - 1} inputs of logits; expected {FEATURES[-1]}"),
        (lambda d: {"4.weight": d["9.weight"]}, "got 3 linear layers and 2 batch norms; expected an MLP or a ConvNet"),
    ],
)
def test_torch_refuses_what_is_no_conv_net(torch, change, message):
    state_dict = torch_conv_net(torch).state_dict()
    with pytest.raises(ValueError, match=message):
        from_torch({**state_dict, **change(state_dict)})


class EquinoxConvNet(eqx.Module):
    conv: list
    norm: list
    logits: eqx.nn.Linear

    def __init__(self, key, mode="batch", bias=False):
        keys = jax.random.split(key, 3)
        pairs = zip((IMAGES.shape[-1], *FEATURES), FEATURES, keys[:2], strict=False)
        bias = bias or not mode
        self.conv = [eqx.nn.Conv2d(*pair, 3, padding=1, use_bias=bias, key=key) for *pair, key in pairs]
        norm = partial(eqx.nn.BatchNorm, axis_name="batch", momentum=MOMENTUM, mode=mode)
        self.norm = [norm(features) if mode else eqx.nn.Identity() for features in FEATURES]
        self.logits = eqx.nn.Linear(LAST, CLASSES, key=keys[2])

    def __call__(self, x, state):
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = conv(x)
            if isinstance(norm, eqx.nn.BatchNorm):
                x, state = norm(x, state)
            x = jax.nn.relu(eqx.nn.MaxPool2d(2, 2)(x))
        return self.logits(x.ravel()), state


def test_equinox_holds_our_numbers_and_computes_the_same():
    variables = init(conv_net(), IMAGES[0])
    model, state = to_equinox(variables, *equinox_network(EquinoxConvNet))
    assert_same_bits(from_equinox(model, state), variables)
    logits, _ = equinox_apply(eqx.nn.inference_mode(model), state, CHANNELS_FIRST)
    close(logits, apply(NORM, variables)[0])
    logits, state = equinox_apply(model, state, CHANNELS_FIRST)
    expected, updates = apply(NORM, variables, True)
    close(logits, expected)
    jax.tree.map(close, from_equinox(model, state)["batch_stats"], updates["batch_stats"])


def test_equinox_biases_before_norms_change_nothing():
    model, state = equinox_network(EquinoxConvNet, bias=True, mode="ema")
    _, state = equinox_apply(model, state, CHANNELS_FIRST)
    logits, _ = equinox_apply(eqx.nn.inference_mode(model), state, CHANNELS_FIRST)
    close(apply(NORM, from_equinox(model, state))[0], logits)


# Folded networks.


def folded_conv_net():
    return fold(conv_net(), init(conv_net(), IMAGES[0]), IMAGES[0])


def folded_mlp():
    return fold(mlp(NORM), init(mlp(NORM), X[0]), X[0])


def test_folded_networks_go_to_torch_and_back(torch):
    for (network, variables), other, x in (
        (folded_conv_net(), torch_conv_net(torch, norm=False), IMAGES),
        (folded_mlp(), torch_network(torch, norm=False), X),
    ):
        other.load_state_dict(to_torch(variables, other.state_dict()))
        assert_same_bits(from_torch(other.state_dict()), variables)
        logits = other(torch.from_numpy(x if x.ndim == 2 else CHANNELS_FIRST)).detach().numpy()
        close(evaluate(network, variables, x), logits)


@pytest.mark.slow
def test_folded_networks_go_to_equinox_and_back():
    for (network, variables), make, x in (
        (folded_conv_net(), partial(equinox_network, EquinoxConvNet), IMAGES),
        (folded_mlp(), equinox_network, X),
    ):
        model, state = to_equinox(variables, *make(mode=None))
        assert_same_bits(from_equinox(model, state), variables)
        logits, _ = equinox_apply(model, state, x if x.ndim == 2 else CHANNELS_FIRST)
        close(evaluate(network, variables, x), logits)


# The Sequential.


@pytest.mark.parametrize(
    "norm",
    [
        partial(NORM, epsilon=0.25),
        partial(NORM, momentum=None),
        partial(NORM, use_scale=False, use_bias=False),
        None,
    ],
)
def test_the_sequential_is_the_network(torch, norm):
    for network, x in ((conv_net(norm), IMAGES), (mlp(norm), X)):
        variables = init(network, x[0])
        made, code = make_torch(network, variables)
        again = eval(code, {"nn": torch.nn}).eval()
        again.load_state_dict(made.state_dict())
        example = torch.from_numpy(CHANNELS_FIRST if x.ndim == 4 else X)
        for sequential in (made, again):
            close(sequential(example).detach().numpy(), evaluate(network, variables, x))
    assert f"nn.Linear({WIDTHS[0]}, {WIDTHS[1]}, bias={norm is None})" in code


def test_other_networks_have_no_sequential(torch):
    network = ResNet(num_classes=3, blocks=(1,), width=4)
    with pytest.raises(ValueError, match="ResNet: got a network that has no form for PyTorch; expected an MLP or"):
        make_torch(network, init(network, IMAGES[0]))
    half_affine = mlp(partial(NORM, use_bias=False))  # in PyTorch a norm has both or none
    with pytest.raises(ValueError, match="got nothing for params/norm_0/bias in the variables"):
        make_torch(half_affine, init(half_affine, X[0]))


def test_variables_of_another_network_are_refused():
    network = ResNet(num_classes=3, blocks=(1,), width=4)
    with pytest.raises(ValueError, match=r"got .* in the variables; the network they go to has"):
        to_equinox(init(network, IMAGES[0]), *equinox_network())
