"""How large and how small inputs and weights may be; docs/exactness.md has this as a table.

Within the limits every figure is right, gradients included. Beyond them it is NaN, or the mask is refused: a number
that overflows never gives a wrong one. Gradients underflow earlier: the last factor of ten is right but for them.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers.oracle import error, measure
from vmapbn_flax import BatchedBatchNorm, BatchNorm, VmapBatch

both = pytest.mark.parametrize("Layer", [BatchNorm, BatchedBatchNorm])
PARAMS = {"scale": np.float32([1.0, -0.5]), "bias": np.float32([0.0, 2.0])}
FORWARD = ("y", "mean", "var", "dscale", "dbias")
LARGEST = float(np.finfo(np.float32).max)


def batch(spread, offset=0.0, *, size=128):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, size, 2))
    return (x * spread + offset).astype(np.float32), cotangent.astype(np.float32)


def weights(size, *, largest):
    return (np.random.default_rng(1).uniform(0.25, 1, size) * largest).astype(np.float32)


def require_right(layer, x, cotangent, mask=None, figures=oracle.Result._fields):
    got = measure(layer, PARAMS, x, cotangent, None if mask is None else jnp.asarray(mask))
    want = oracle.batch_norm(x, cotangent, weights=mask, **PARAMS)
    for name in figures:
        unit = max(np.max(np.abs(getattr(want, name))), 1e-30)  # a variance below that is nothing beside epsilon
        if name == "mean":
            unit = max(unit, np.max(np.abs(x)))
        assert error(getattr(got, name), getattr(want, name)) < 1e-6 * unit, name


def require_nan(layer, x, cotangent, mask=None):
    got = measure(layer, PARAMS, x, cotangent, None if mask is None else jnp.asarray(mask))
    for name in ("y", "var", "dx", "dscale"):
        assert np.all(np.isnan(getattr(got, name))), name


@both
@pytest.mark.parametrize("spread", [1e-30, 1e-18, 1e-10, 1e10, 1e13, 1e17])
def test_inputs_up_to_1e17_are_right(Layer, spread):
    """The gradient too, in which x**-1.5 of the variance would be zero from 1e13 on."""
    require_right(Layer(), *batch(spread))


@both
@pytest.mark.parametrize("spread", [2e18, 1e20, 1e30, 3e37])
def test_larger_inputs_give_nan(Layer, spread):
    require_nan(Layer(), *batch(spread))


@pytest.mark.parametrize("size", [8, 128, 100_000])
def test_the_limit_of_inputs(size):
    """The sum of the squares of x - mean(x) stays below 3.4e38; of 128 examples, at 1e18."""
    x, cotangent = batch(1, size=size)
    largest = np.sqrt(LARGEST / np.sum((x - x.mean(0)) ** 2, 0).max())
    require_right(BatchedBatchNorm(), np.float32(x * largest * 0.1), cotangent)
    require_right(BatchedBatchNorm(), np.float32(x * largest * 0.99), cotangent, figures=FORWARD)
    got = measure(BatchedBatchNorm(), PARAMS, np.float32(x * largest * 1.01), cotangent)
    assert np.isnan(got.y).all(0).any()


@both
@pytest.mark.parametrize("offset", [1e7, 1e9, 1e12, 1e15, 1e18])
def test_inputs_far_from_zero_and_wide(Layer, offset):
    require_right(Layer(), *batch(1e-3 * offset, offset))


@both
@pytest.mark.parametrize(
    ("largest", "spread"),
    [(1e-36, 1), (1e-36, 1e18), (1e-20, 1e-10), (1e-10, 1e18), (1e10, 1e18), (1e18, 1e18), (1e30, 1e3), (1e36, 1e-3)],
)
def test_weights_from_1e_36_to_1e36_are_right(Layer, largest, spread):
    require_right(Layer(), *batch(spread), weights(128, largest=largest))


@both
def test_weights_far_apart(Layer):
    mask = weights(128, largest=1)
    mask[::2] *= np.float32(1e-37)
    require_right(Layer(), *batch(1, 100), mask)


@both
@pytest.mark.parametrize(("largest", "spread"), [(1e38, 1), (1e38, 1e-3), (1e36, 1e3), (1e20, 1e18), (1, 3e38)])
def test_larger_weights_give_nan(Layer, largest, spread):
    """The sum of weights and the sum of weight times input stay below 3.4e38."""
    with np.errstate(over="ignore"):
        require_nan(Layer(), *batch(spread), weights(128, largest=largest))


@pytest.mark.parametrize("largest", [1e38, 3e38])
def test_weights_whose_sum_overflows_are_refused(largest):
    x, mask = jnp.ones((8, 2)), jnp.full(8, largest)
    for layer in (VmapBatch(BatchNorm()), BatchedBatchNorm()):
        with pytest.raises(ValueError, match=r"weights sum to (8e\+38|2.4e\+39); expected a sum below 3.4e38"):
            layer.apply({"params": PARAMS}, x, train=True, mask=mask, mutable=["batch_stats"])
