"""Networks under Flax's lifted transformations: the outputs, statistics and gradients of the plain network."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import quick
from vmapbn_flax import MLP, BatchNorm, VmapBatch

WIDTH, DEPTH = 4, 3


class Block(nn.Module):
    """A layer as one writes it, `train` in the call."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        return nn.tanh(BatchNorm(name="norm")(nn.Dense(WIDTH, use_bias=False, name="dense")(x), train=train, mask=mask))


class Attribute(nn.Module):
    """The same, with `train` as an attribute."""

    train: bool | None = None

    @nn.compact
    def __call__(self, x, mask=None):
        return Block.__call__.__wrapped__(self, x, self.train, mask)


class Plain(nn.Module):
    """Blocks, one after the other."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        for i in range(DEPTH):
            x = self.block(f"block_{i}", x, train, mask)
        return x

    def block(self, name, x, train, mask):
        return Block(name=name)(x, train, mask)


class RematAttribute(Plain):
    def block(self, name, x, train, mask):
        return nn.remat(Attribute)(name=name, train=train)(x, mask)


class RematStatic(Plain):
    def block(self, name, x, train, mask):
        return nn.remat(Block, static_argnums=(2,))(name=name)(x, train, mask)  # 0 is self


class RematFunction(Plain):
    def block(self, name, x, train, mask):
        return nn.remat(lambda block, x, mask: block(x, train, mask))(Block(name=name), x, mask)


class JitAttribute(Plain):
    def block(self, name, x, train, mask):
        return nn.jit(Attribute)(name=name, train=train)(x, mask)


class JitStatic(Plain):
    def block(self, name, x, train, mask):
        return nn.jit(Block, static_argnames="train")(name=name)(x, train=train, mask=mask)


class Scan(nn.Module):
    """The blocks as one, with a leading axis of the variables."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        scan = nn.scan(
            lambda block, x, mask: (block(x, train, mask), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=DEPTH,
        )
        return scan(Block(name="blocks"), x, mask)[0]


def sequential(train):
    """`train` reaches the norms as their attribute; a mask cannot."""
    layers = [(nn.Dense(WIDTH, use_bias=False), BatchNorm(train=train), nn.tanh) for _ in range(DEPTH)]
    return nn.Sequential(tuple(layer for block in layers for layer in block))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@partial(quick.jit, static_argnums=(0, 1))
def step(network, train, variables, x, mask):
    """Outputs, statistics and gradients; `train=None` leaves it out."""
    train = {} if train is None else {"train": train}

    def loss(params):
        y, updates = network.apply({**variables, "params": params}, x, mask=mask, mutable=["batch_stats"], **train)
        return jnp.sum(jnp.sin(y[:6])), (y[:6], updates)

    return jax.grad(loss, has_aux=True)(variables["params"])


def variables_of(network):
    """Of the plain network, with statistics and parameters of no special value."""
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), jnp.ones((8, WIDTH)))
    leaves, tree = jax.tree.flatten(shapes)
    draws = [np.random.default_rng(i).normal(1.5, 0.1, leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [jnp.asarray(np.float32(draw)) for draw in draws])


def assert_equal(got, want):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), got, want)


PLAIN = VmapBatch(Plain())
X, MASK = normal(8, WIDTH), jnp.arange(8) < 6


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("Network", [RematAttribute, RematStatic, RematFunction, JitAttribute, JitStatic])
def test_blocks(Network, train):
    variables = variables_of(PLAIN)
    got = step(VmapBatch(Network()), train, variables, X, MASK)
    assert_equal(got, step(PLAIN, train, variables, X, MASK))


def test_remat_runs_the_forward_pass_again():
    def count(network):
        return str(step.trace(network, True, variables_of(PLAIN), X, None).jaxpr).count("tanh ")

    assert count(VmapBatch(RematAttribute())) == 2 * count(PLAIN) == 2 * DEPTH


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_a_whole_network(lift, train):
    """`VmapBatch` called without `train` calls the module without it."""
    network, variables = VmapBatch(lift(Attribute)(train=train)), variables_of(VmapBatch(Block()))
    got = step(network, None, variables, X, MASK)
    assert_equal(got, step(VmapBatch(Block()), train, variables, X, MASK))


class Rematted(nn.Module):
    """A network of the package, whose `train` is in the call."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        network = MLP(hidden=(3,), num_classes=2, name="mlp")
        return nn.remat(lambda network, x, mask: network(x, train=train, mask=mask))(network, x, mask)


def test_a_network_of_the_package():
    plain = VmapBatch(MLP(hidden=(3,), num_classes=2))
    variables = variables_of(plain)
    nested = {kind: {"mlp": tree} for kind, tree in variables.items()}
    gradients, (y, updates) = step(VmapBatch(Rematted()), True, nested, X, MASK)
    got = gradients["mlp"], (y, {"batch_stats": updates["batch_stats"]["mlp"]})
    assert_equal(got, step(plain, True, variables, X, MASK))


@pytest.mark.parametrize("train", [True, False])
def test_scan(train):
    variables = variables_of(PLAIN)
    stacked = {
        kind: {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[f"block_{i}"] for i in range(DEPTH)))}
        for kind, tree in variables.items()
    }
    network = VmapBatch(Scan())
    made = jax.eval_shape(partial(network.init, train=train), jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, stacked)
    gradients, (y, updates) = step(network, train, stacked, X, MASK)
    for i in range(DEPTH):
        want_gradients, (want, want_updates) = step(PLAIN, train, variables, X, MASK)
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], (gradients["blocks"], updates["batch_stats"]["blocks"]))
        assert_equal(layer, (want_gradients[f"block_{i}"], want_updates["batch_stats"][f"block_{i}"]))
    assert_equal(y, want)


@pytest.mark.parametrize("train", [True, False])
def test_sequential(train):
    variables = variables_of(PLAIN)

    def flat(tree):
        layers = {}
        for i in range(DEPTH):
            block = tree[f"block_{i}"]
            layers |= {f"layers_{3 * i + j}": block[name] for j, name in enumerate(("dense", "norm")) if name in block}
        return layers

    network = VmapBatch(sequential(train))
    gradients, (y, updates) = step(network, None, {kind: flat(tree) for kind, tree in variables.items()}, X, None)
    want_gradients, (want, want_updates) = step(PLAIN, train, variables, X, None)
    assert_equal((gradients, y), (flat(want_gradients), want))
    assert_equal(updates["batch_stats"], flat(want_updates["batch_stats"]))


def test_an_axis_left_out_is_refused_here_too():
    network = VmapBatch(sequential(True), axis_name=("group", "batch"))
    with pytest.raises(ValueError, match="layers_1: got axis_name='batch' under VmapBatch"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 4, WIDTH)))


def test_a_traced_train_says_what_to_write(unchecked):
    class Traced(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            return nn.remat(BatchNorm)(name="norm")(x, train=train)

    with pytest.raises(TypeError, match=r"norm: got a traced train; .* or make it an attribute of the layer"):
        VmapBatch(Traced()).init(jax.random.key(0), X, train=True)
