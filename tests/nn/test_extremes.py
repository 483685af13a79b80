"""How large and how small inputs and weights may be; docs/exactness.md has this as a table.

Within the limits every figure is right, gradients included. Beyond them it is NaN: a number that overflows never gives
a wrong one.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers.oracle import error, measure, train
from vmapbn_flax import BatchedBatchNorm, BatchNorm, VmapBatch

both = pytest.mark.parametrize("Layer", [BatchNorm, BatchedBatchNorm])
PARAMS = {"scale": np.float32([1.0, -0.5]), "bias": np.float32([0.0, 2.0])}
LARGEST = float(np.finfo(np.float32).max)


def batch(spread, offset=0.0, *, size=128):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, size, 2))
    return (x * spread + offset).astype(np.float32), cotangent.astype(np.float32)


def weights(size, *, largest):
    return (np.random.default_rng(1).uniform(0.25, 1, size) * largest).astype(np.float32)


def require_right(layer, x, cotangent, mask=None):
    got = measure(layer, PARAMS, x, cotangent, None if mask is None else jnp.asarray(mask))
    want = oracle.batch_norm(x, cotangent, weights=mask, **PARAMS)
    for name in oracle.Result._fields:
        unit = max(np.max(np.abs(getattr(want, name))), 1e-30)  # a variance below that is nothing beside epsilon
        if name == "mean":
            unit = max(unit, np.max(np.abs(x)))
        assert error(getattr(got, name), getattr(want, name)) < 1e-6 * unit, name


def require_nan(layer, x, cotangent, mask=None):
    got = measure(layer, PARAMS, x, cotangent, None if mask is None else jnp.asarray(mask))
    for name in ("y", "var", "dx", "dscale"):
        assert np.all(np.isnan(getattr(got, name))), name


@both
@pytest.mark.parametrize("spread", [1e-30, 1e-18, 1e-10, 1e10, 1e13, 1e18])
@pytest.mark.parametrize("gradient", [1e-12, 1])
def test_inputs_up_to_1e18_are_right(Layer, spread, gradient):
    """The gradient too, in which x**-1.5 of the variance would be zero from 1e13 on, and x**-1 from 1e17 on."""
    x, cotangent = batch(spread)
    require_right(Layer(), x, cotangent * np.float32(gradient))


@both
@pytest.mark.parametrize("spread", [2e18, 1e20, 1e30, 3e37])
def test_larger_inputs_give_nan(Layer, spread):
    require_nan(Layer(), *batch(spread))


@pytest.mark.parametrize("size", [8, 128, 100_000])
def test_the_limit_of_inputs(size):
    """The sum of the squares of x - mean(x) stays below 3.4e38; of 128 examples, at 1e18."""
    x, cotangent = batch(1, size=size)
    largest = np.sqrt(LARGEST / np.sum((x - x.mean(0)) ** 2, 0).max())
    require_right(BatchedBatchNorm(), np.float32(x * largest * 0.99), cotangent)
    got = measure(BatchedBatchNorm(), PARAMS, np.float32(x * largest * 1.01), cotangent)
    assert np.isnan(got.y).all(0).any()


@both
@pytest.mark.parametrize("offset", [1e7, 1e9, 1e12, 1e15, 1e18])
def test_inputs_far_from_zero_and_wide(Layer, offset):
    require_right(Layer(), *batch(1e-3 * offset, offset))


@both
@pytest.mark.parametrize(
    ("largest", "spread"),
    [
        *((5e-38, 1e-10), (5e-38, 1), (5e-38, 1e18), (1e-20, 1e-10), (1e-10, 1e18), (1, 1e18)),
        *((1e10, 1e18), (1e18, 1e18), (1e30, 1e3), (1e36, 1e-3), (3e36, 1e-3)),
    ],
)
def test_weights_from_1e_38_to_1e36_are_right(Layer, largest, spread):
    """Their sum, of the last ones, is beyond 8.5e37, whose inverse is zero on a CPU."""
    require_right(Layer(), *batch(spread), weights(128, largest=largest))


@both
def test_the_smallest_weights_of_inputs_far_from_zero(Layer):
    """The products of weights and inputs, of order 1e-39, are zero on a CPU."""
    require_right(Layer(), *batch(0.01, 0.5), weights(128, largest=5e-38))


@both
def test_weights_far_apart(Layer):
    mask = weights(128, largest=1)
    mask[::2] *= np.float32(1e-37)
    require_right(Layer(), *batch(1, 100), mask)


@both
def test_a_large_input_of_little_weight(Layer):
    """Weight over the sum of weights, times the input, times the input: the first is zero in float32."""
    (x, cotangent), mask = batch(1), np.ones(128, np.float32)
    x[0], mask[0] = 1e18, 1e-36
    require_right(Layer(), x, cotangent, mask)


@both
@pytest.mark.parametrize("largest", [1e-30, 0.5, 1e30])
def test_the_unbiased_variance_of_weights_of_any_size(Layer, largest):
    """Their squares, of which Kish's effective size has a sum, would be zero or infinite."""
    x, _ = batch(1, size=8)
    mask = weights(8, largest=largest)
    layer = Layer(momentum=0.0, unbiased_running_var=True)
    stats = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    _, stats = train(layer, {"params": PARAMS, "batch_stats": stats}, x, jnp.asarray(mask))
    assert error(stats["var"], np.diag(np.cov(x.T, aweights=np.float64(mask)))) < 1e-6


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
