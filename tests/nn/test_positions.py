"""Batch norm over positions: what its program consists of, on one device and on two, and derivatives of every order."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import quick
from tests.helpers.oracle import error, step
from vmapbn_flax import BatchedBatchNorm, BatchNorm

SHAPE = (32, 12, 10, 4)  # (batch, height, width, features)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def variables(features):
    params = {"scale": 1 + normal(features, seed=1) / 2, "bias": normal(features, seed=2)}
    return {"params": params, "batch_stats": {"mean": jnp.zeros(features), "var": jnp.ones(features)}}


def gradients(layer, x, params, mask):
    def loss(x, params):
        y, stats = step(layer, {**variables(x.shape[-1]), "params": params}, x, mask)
        return jnp.sum(jnp.sin(y)), stats

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


LAYERS = {
    "vmapped": (BatchNorm(), SHAPE, None),
    "batched": (BatchedBatchNorm(), SHAPE, None),
    "masked": (BatchNorm(), SHAPE, SHAPE[:-1]),
    "ghosts": (BatchNorm(replica_axis_name="group"), (4, 8, *SHAPE[1:]), None),
    "one position axis": (BatchNorm(), (32, 120, 4), None),
}


def compiled(layer, shape, mask, place=lambda x: x):
    mask = None if mask is None else place(jnp.ones(mask))
    lowered = jax.jit(partial(gradients, layer)).lower(place(normal(*shape)), variables(shape[-1])["params"], mask)
    return lowered.compile().as_text()


def sums(text):
    """How many values each sum of a compiled program takes, and over axes of which lengths."""
    shapes = {name: [int(n) for n in dims.split(",")] for name, dims in re.findall(r"%(\S+) = \w+\[([\d,]+)\]", text)}
    for operand, dimensions in re.findall(r" reduce\(%(\S+), .*dimensions={([\d,]+)}", text):
        yield math.prod(shapes[operand]), [shapes[operand][int(n)] for n in dimensions.split(",")]
    for operand, window in re.findall(r" reduce-window\(%(\S+), .*window={size=([\dx]+)", text):
        yield math.prod(shapes[operand]), [int(n) for n in window.split("x")]


@pytest.mark.parametrize("name", LAYERS)
def test_sums_of_all_values_are_over_one_short_axis(name):
    """XLA's CPU code for one over several axes takes ten times as long as that of the two sums in its place."""
    layer, shape, mask = LAYERS[name]
    found = [lengths for size, lengths in sums(compiled(layer, shape, mask)) if size >= math.prod(shape)]
    assert len(found) >= 5
    assert [lengths for lengths in found if sum(n > 1 for n in lengths) > 1 or max(lengths) > 16] == []


def test_vmapped_and_batched_have_the_same_sums():
    vmapped, batched = (sorted(sums(compiled(*LAYERS[name]))) for name in ("vmapped", "batched"))
    assert vmapped == batched


@pytest.mark.parametrize("name", ["vmapped", "batched"])
def test_devices_exchange_features_alone(name):
    """Not rows of them, though a sum over positions has two steps."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    text = compiled(*LAYERS[name], lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))))
    reduced = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    assert len(reduced) > 0
    assert {shape for shapes in reduced for shape in re.findall(r"f32\[[\d,]*\]", shapes)} == {"f32[4]"}


def plain(x, weights, scale, bias):
    """The formula that every derivative is compared with, differentiated as it stands."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.sum(weights * x, axes) / jnp.sum(weights)
    var = jnp.sum(weights * (x - mean) ** 2, axes) / jnp.sum(weights)
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def derivative(function, order, v):
    """`x -> d^n function(x + t v) / dt^n`, in forward mode."""
    for _ in range(order):
        function = partial(lambda function, x: jax.jvp(function, (x,), (v,))[1], function)
    return function


def derivatives(function, x, v):
    """Those of order 0 to 3 at `x`, and the gradient of each, in one program."""
    return quick.jit(lambda x: [jax.value_and_grad(derivative(function, n, v))(x) for n in range(4)])(x)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("Layer", [BatchNorm, pytest.param(BatchedBatchNorm, marks=pytest.mark.slow)])
def test_derivatives_up_to_the_third(Layer, masked):
    """In forward mode, and the gradient of each; weights of positions are 0, 1 and 2."""
    shape = (4, 3, 2, 2)
    x, v, vs = 10 + normal(*shape), normal(*shape, seed=3), variables(2)
    weights = jnp.asarray(np.arange(24).reshape(4, 3, 2) % 3) if masked else None

    def loss(x):
        y = step(Layer(), vs, x, weights)[0]
        return jnp.sum(jnp.sin(y) if weights is None else jnp.where(weights[..., None] > 0, jnp.sin(y), 0))

    def plain_loss(x):
        w = jnp.ones((4, 3, 2, 1)) if weights is None else weights[..., None]
        return jnp.sum(jnp.where(w > 0, jnp.sin(plain(x, w, **vs["params"])), 0))

    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        want = derivatives(plain_loss, wide, v.astype(jnp.float64))
    for got, exact in zip(derivatives(loss, x, v), want, strict=True):
        for a, b in zip(got, exact, strict=True):
            assert error(a, b, relative=True) < 5e-6
