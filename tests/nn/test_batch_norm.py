import functools
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import oracle, quick
from tests.helpers.oracle import error, measure, quick_measure, quick_train, step, train
from vmapbn_flax import BatchedBatchNorm, BatchNorm, VmapBatch

both = pytest.mark.parametrize("Layer", [BatchNorm, BatchedBatchNorm])


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def parameters(features, dtype=jnp.float32):
    scale, bias = 1 + 0.5 * normal(features, seed=1), normal(features, seed=2)
    return {"scale": jnp.asarray(np.asarray(scale, dtype)), "bias": jnp.asarray(np.asarray(bias, dtype))}


def variables(features, mean=0.0, var=1.0):
    def filled(value):
        return jnp.asarray(np.full(features, value, np.float32))

    stats = {"mean": filled(mean), "var": filled(var)}
    return {"params": {"scale": filled(1), "bias": filled(0)}, "batch_stats": stats}


def init(layer, x, **options):
    """The variables of `layer`."""
    return quick.jit(partial(layer.init, **options))(jax.random.key(0), x)


def expected(x, params, cotangent=0.0, **kwargs):
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return oracle.batch_norm(x, cotangent, **params, **kwargs)


# Statistics, output and gradients.


@both
def test_by_hand(Layer):
    x = jnp.array([[1.0], [3.0], [5.0], [7.0]])  # mean 4, variance 5
    y, stats = quick_train(Layer(momentum=0.9, epsilon=4.0), variables(1), x)
    np.testing.assert_allclose(y, [[-1.0], [-1 / 3], [1 / 3], [1.0]], rtol=1e-6)
    np.testing.assert_allclose(stats["mean"], [0.4], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 + 0.5], rtol=1e-6)


@both
@pytest.mark.parametrize("offset", [0, 1, 10, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
def test_float64_oracle_at_every_offset(Layer, offset):
    x, cotangent = normal(128, 16) + np.float32(offset), normal(128, 16, seed=3)
    got = measure(Layer(), variables(16)["params"], x, cotangent)
    want = oracle.batch_norm(x, cotangent)
    assert error(got.y, want.y) < 1e-6
    assert error(got.var, want.var) < 1e-6
    for name in ("mean", "dx", "dscale", "dbias"):
        assert error(getattr(got, name), getattr(want, name), relative=True) < 1e-6, name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(48, 256), (100, 100)])
def test_one_rounding_of_the_mean_in_every_program(shape, masked):
    """A mean times 1/n, fused into one use of x - mean and not into another, once cost 4e-2 of y here."""
    x, cotangent, vs = normal(*shape) + np.float32(1e6), normal(*shape, seed=3), variables(shape[1])
    mask = jnp.ones(shape[0]) if masked else None  # a constant, so the compiler knows n

    def forward(x):
        return step(BatchNorm(), vs, x, mask)[0]

    dx = jax.jit(jax.grad(lambda x: jnp.sum(cotangent * forward(x))))(x)
    want = oracle.batch_norm(x, cotangent)
    assert error(jax.jit(forward)(x), want.y) < 1e-6
    assert error(dx, want.dx, relative=True) < 1e-6


@both
def test_spatial_axes_belong_to_the_statistics(Layer):
    x, cotangent, params = 3 + normal(8, 5, 4, 3), normal(8, 5, 4, 3, seed=3), parameters(3)
    got, want = quick_measure(Layer(), params, x, cotangent), expected(x, params, cotangent)
    for name in want._fields:
        assert error(getattr(got, name), getattr(want, name), relative=True) < 1e-6, name


@both
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e3, 1e6 + 0.3, 1e-30])
def test_constant_feature(Layer, fast, value):
    x, cotangent, params = np.full((100, 3), value, np.float32), normal(100, 3, seed=3), parameters(3)
    got = measure(Layer(use_fast_variance=fast), params, x, cotangent)
    assert np.all(got.var >= 0)
    assert all(np.all(np.isfinite(figure)) for figure in got)
    if not fast:
        want = expected(x, params, cotangent)
        assert error(got.y, want.y) < 1e-6
        assert error(got.dx, want.dx, relative=True) < 1e-6


@both
def test_fast_variance_is_the_one_pass_formula(Layer):
    # 4097^2 needs 25 bits. In float32 it rounds to 4097^2 - 1, and E[x^2] - E[x]^2 = 1/4 to zero.
    x = jnp.array([[4096.0], [4097.0]])
    layer = Layer(momentum=0.0)
    assert train(layer.clone(use_fast_variance=True), variables(1), x)[1]["var"] == 0.0
    assert train(layer, variables(1), x)[1]["var"] == 0.25


@both
def test_fast_variance_near_zero(Layer):
    x, cotangent, params = normal(64, 3), normal(64, 3, seed=3), parameters(3)
    got, want = quick_measure(Layer(use_fast_variance=True), params, x, cotangent), expected(x, params, cotangent)
    for name in want._fields:
        assert error(getattr(got, name), getattr(want, name), relative=True) < 2e-6, name


@pytest.mark.parametrize(
    ("narrow", "dtype", "param_dtype", "result"),
    [
        (jnp.bfloat16, None, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, None, jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, None, jnp.float16, jnp.float16),
    ],
)
def test_narrow_input_accumulates_in_float32(narrow, dtype, param_dtype, result):
    x = np.asarray(normal(1000, 3) + 5, narrow)  # a narrow sum of these would stall
    params = parameters(3, param_dtype)
    got = measure(BatchNorm(dtype=dtype, param_dtype=param_dtype), params, x, np.ones_like(x))
    want = expected(x, params)
    assert got.mean.dtype == got.var.dtype == jnp.float32
    assert error(got.mean, want.mean, relative=True) < 1e-6
    assert error(got.var, want.var, relative=True) < 1e-6
    assert got.y.dtype == result
    # Nothing is rounded to the result's dtype but the result.
    rounding = np.abs(want.y) * float(jnp.finfo(result).eps) / 2
    assert np.all(np.abs(np.asarray(got.y, np.float64) - want.y) < rounding + 1e-6)


@both
def test_float64_stays_float64(Layer):
    with jax.enable_x64(True):
        x, cotangent = normal(128, 4, dtype=np.float64) + 5, normal(128, 4, seed=3, dtype=np.float64)
        params = parameters(4, jnp.float64)
        got = measure(Layer(param_dtype=jnp.float64), params, x, cotangent)
        want = expected(x, params, cotangent)
        assert {figure.dtype for figure in got} == {np.dtype(np.float64)}
        for name in want._fields:
            assert error(getattr(got, name), getattr(want, name), relative=True) < 1e-14, name


def complex_normal(*shape, seed=0):
    return (normal(*shape, seed=seed) + 1j * normal(*shape, seed=seed + 10)).astype(np.complex64)


@both
@pytest.mark.parametrize("fast", [False, True])
def test_complex_is_flax_s(Layer, fast):
    """Output, statistics and the gradients of x, scale and bias; the variance is that of the modulus."""
    x, g = complex_normal(32, 3) + np.complex64(3 - 2j), complex_normal(32, 3, seed=5)
    params, stats = parameters(3), variables(3)["batch_stats"]

    def ours(x, params):
        return step(Layer(use_fast_variance=fast), {"params": params, "batch_stats": stats}, x)

    def theirs(x, params):
        layer, vs = nn.BatchNorm(use_fast_variance=fast), {"params": params, "batch_stats": stats}
        y, updates = layer.apply(vs, x, use_running_average=False, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    def differentiate(forward):
        def loss(x, params):
            y, stats = forward(x, params)
            return jnp.sum((g * y).real) + jnp.sum(jnp.abs(stats["mean"])), (y, stats)

        return quick.jit(jax.grad(loss, (0, 1), has_aux=True))(jnp.asarray(x), params)

    got, want = differentiate(ours), differentiate(theirs)
    assert got[1][1]["mean"].dtype == np.complex64
    assert got[1][1]["var"].dtype == np.float32
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())
    centred = np.complex128(x) - np.complex128(x).mean(0)
    want_var = 0.99 + 0.01 * (np.abs(centred) ** 2).mean(0)
    assert error(got[1][1]["var"], want_var) < 1e-6


@both
def test_complex_far_from_zero_masked_and_evaluated(Layer):
    """Exact where flax.linen's is not; variables that are made for it keep their types from step to step."""
    x, mask = complex_normal(32, 3) + np.complex64(1e4 + 1e4j), np.arange(32) % 3 > 0
    layer = Layer(momentum=0.0)
    vs = init(layer, jnp.asarray(x), train=False)
    assert jax.tree.map(lambda leaf: str(leaf.dtype), vs["batch_stats"]) == {"mean": "complex64", "var": "float32"}
    y, stats = train(layer, vs, np.where(mask[:, None], x, np.nan), jnp.asarray(mask))
    assert [leaf.dtype for leaf in stats.values()] == [leaf.dtype for leaf in vs["batch_stats"].values()]
    kept = np.complex128(x)[mask]
    var = np.mean(np.abs(kept - kept.mean(0)) ** 2, 0)
    want = (kept - kept.mean(0)) / np.sqrt(var + 1e-5)
    assert np.abs(np.asarray(y)[mask] - want).max() < 1e-6
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
    evaluated = quick.jit(partial(layer.apply, train=False))({**vs, "batch_stats": stats}, x[:3])
    assert np.abs(evaluated[1:] - want[:2]).max() < 1e-2  # the mean, rounded at 1e4; example 0 is masked


@both
def test_integers_are_promoted(Layer):
    y, _ = quick_train(Layer(), variables(1), jnp.array([[1], [3], [5], [7]]))
    assert error(y, oracle.batch_norm([[1], [3], [5], [7]]).y) < 1e-6


def test_numpy_arrays(unchecked):
    x, mask = normal(6, 3), np.array([1, 1, 0, 1, 1, 1])
    y, _ = forward(BatchedBatchNorm(), x, mask)
    assert error(y, oracle.batch_norm(x, weights=mask).y, where=mask[:, None] > 0) < 1e-6


@both
def test_without_scale_and_bias(Layer):
    x = normal(32, 3)
    layer = Layer(use_scale=False, use_bias=False)
    assert "params" not in init(layer, jnp.asarray(x), train=False)
    y, _ = quick_train(layer, {"batch_stats": variables(3)["batch_stats"]}, x)
    assert error(y, oracle.batch_norm(x).y) < 1e-6


# Masks.

NOT_A_NUMBER = [np.nan, np.inf, -np.inf, 3e38]


def poison(x, mask):
    """`x` with the worst values wherever `mask` is zero."""
    mask = np.asarray(mask).reshape(np.shape(mask) + (1,) * (x.ndim - np.ndim(mask)))
    return np.where(mask != 0, x, np.resize(np.float32(NOT_A_NUMBER), x.shape))


@both
@pytest.mark.parametrize(
    ("dtype", "positions", "fast"),
    [
        (bool, (8,), False),
        (np.int32, (8, 4), False),
        (np.float32, (8, 4), False),
        (jnp.bfloat16, (8,), False),
        (np.float32, (8,), True),
    ],
)
def test_masked_values_disturb_nothing(Layer, dtype, positions, fast):
    mask = np.random.default_rng(4).integers(0, 3, positions) / 2  # weights 0, 1/2 and 1
    mask = (mask if dtype in (np.float32, jnp.bfloat16) else mask > 0).astype(dtype)
    x, params = poison(normal(8, 4, 3), mask), parameters(3)
    present = np.broadcast_to((mask > 0).reshape(*positions, *(1,) * (3 - len(positions))), x.shape)
    cotangent = np.where(present, normal(8, 4, 3, seed=3), 0)
    got = quick_measure(Layer(use_fast_variance=fast), params, x, cotangent, jnp.asarray(mask))
    want = expected(x, params, cotangent, weights=mask)
    assert np.all(np.isfinite(got.y))
    assert np.all(got.dx[~present] == 0)
    for name in ("y", "dx"):
        assert error(getattr(got, name), getattr(want, name), where=present) < 2e-6, name
    for name in ("mean", "var", "dscale", "dbias"):
        assert error(getattr(got, name), getattr(want, name), relative=True) < 2e-6, name


@both
def test_a_mask_may_have_a_last_axis_of_one(Layer):
    x, mask = normal(8, 4, 3), np.random.default_rng(4).integers(0, 2, (8, 4))
    for got, want in zip(*(measure(Layer(), parameters(3), x, x, m) for m in (mask, mask[..., None])), strict=True):
        np.testing.assert_array_equal(got, want)


@both
def test_equal_weights_are_no_weights(Layer):
    x, params = normal(8, 4, 3), parameters(3)
    plain = quick_measure(Layer(), params, x, x)
    for mask in (jnp.ones(8, bool), jnp.full((8, 4), 0.25)):
        for got, want in zip(quick_measure(Layer(), params, x, x, mask), plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize(("momentum", "unbiased"), [(0.9, True), (None, False)])
def test_nothing_left_leaves_the_statistics_alone(Layer, momentum, unbiased):
    layer = Layer(momentum=momentum, unbiased_running_var=unbiased)
    before = variables(3, mean=0.1, var=0.7)
    if momentum is None:
        before["batch_stats"]["count"] = jnp.int32(7)
    y, stats = quick_train(layer, before, poison(normal(4, 3), np.zeros(4)), jnp.zeros(4))
    assert np.all(np.isfinite(y))
    jax.tree.map(np.testing.assert_array_equal, stats, before["batch_stats"])


def test_gradient_of_a_batch_with_nothing_left():
    x, mask = jnp.full((4, 3), jnp.nan), jnp.zeros(4, bool)
    got = quick_measure(BatchNorm(), parameters(3), x, jnp.ones((4, 3)), mask)
    assert all(np.all(np.isfinite(figure)) for figure in got)
    assert np.all(got.dx == 0)


@both
@pytest.mark.parametrize("fast", [False, True])
def test_results_of_masked_values_have_no_gradient(Layer, fast):
    """They are the bias, whatever the batch, also where the loss has a part of them."""
    x, mask, cotangent = normal(8, 3), np.arange(8) < 5, normal(8, 3, seed=3)
    layer = Layer(use_fast_variance=fast)
    got = quick_measure(layer, parameters(3), x, cotangent, jnp.asarray(mask))
    want = quick_measure(layer, parameters(3), x, np.where(mask[:, None], cotangent, 0), jnp.asarray(mask))
    np.testing.assert_array_equal(got.y[5:], np.broadcast_to(parameters(3)["bias"], (3, 3)))
    np.testing.assert_array_equal(got.dx, want.dx)
    assert error(got.dbias, cotangent.sum(0)) < 1e-6


@both
def test_padded_batch_equals_the_batch(Layer):
    x, params, cotangent = 10 + normal(5, 3), parameters(3), normal(5, 3, seed=3)
    pad = [(0, 3), (0, 0)]
    padded, mask = np.pad(x, pad, constant_values=np.nan), np.arange(8) < 5
    got = quick_measure(Layer(), params, padded, np.pad(cotangent, pad), jnp.asarray(mask))
    want = quick_measure(Layer(), params, x, cotangent)
    got = got._replace(y=got.y[:5], dx=got.dx[:5])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@both
def test_gradient_of_the_weights(Layer):
    """d mean / dw_i = (x_i - mean) / W,  d var / dw_i = ((x_i - mean)^2 - var) / W."""
    x, weights = 5 + normal(6, 2), jnp.array([0.5, 1.0, 2.0, 0.25, 1.5, 1.0])

    def stats(weights):
        return step(Layer(momentum=0.0), variables(2), x, weights)[1]

    got, want = quick.jit(jax.jacobian(stats))(weights), oracle.batch_norm(x, weights=weights)
    deviation = (x - want.mean).T
    assert error(got["mean"], deviation / weights.sum()) < 1e-6
    assert error(got["var"], (deviation**2 - want.var[:, None]) / weights.sum()) < 1e-6


# Several axes: nested batches, replicas, ghost batches.


def test_two_axes_are_one_flat_batch():
    x, params, cotangent = 7 + normal(3, 4, 5), parameters(5), normal(3, 4, 5, seed=3)
    nested = quick_measure(BatchNorm(axis_name=("inner", "outer")), params, x, cotangent)
    want = expected(x, params, cotangent)
    for name in want._fields:
        assert error(getattr(nested, name), getattr(want, name), relative=True) < 1e-6, name


def test_ghost_batches():
    layer = BatchNorm(axis_name="batch", replica_axis_name="group", momentum=0.9)
    groups, vs = normal(3, 6, 2) * [[[1.0]], [[2.0]], [[5.0]]] + 4, variables(2, mean=0.5, var=2.0)
    groups = groups.astype(np.float32)
    y, stats = quick_train(layer, vs, groups)
    alone = [quick_train(BatchNorm(momentum=0.9), vs, group) for group in groups]
    np.testing.assert_allclose(y, [y for y, _ in alone], rtol=1e-6, atol=1e-6)
    # The average of the groups' variances, which is not the variance of the whole.
    want = [oracle.batch_norm(group) for group in groups]
    assert error(stats["mean"], 0.45 + 0.1 * np.mean([w.mean for w in want], 0)) < 1e-6
    assert error(stats["var"], 1.8 + 0.1 * np.mean([w.var for w in want], 0)) < 2e-6


def test_ghost_batches_average_the_groups_with_examples():
    layer = BatchNorm(replica_axis_name="group", momentum=0.0)
    groups = normal(3, 6, 2)
    mask = np.array([[1] * 6, [1, 1, 1, 1, 0, 0], [0] * 6])  # equal votes for the first two, none for the last
    y, stats = quick_train(layer, variables(2), poison(groups, mask), jnp.asarray(mask))
    want = [oracle.batch_norm(groups[0]), oracle.batch_norm(groups[1, :4])]
    assert np.all(np.isfinite(y))
    assert error(y[0], want[0].y) < 1e-6
    assert error(y[1, :4], want[1].y) < 1e-6
    for name in ("mean", "var"):
        assert error(stats[name], np.mean([getattr(w, name) for w in want], 0)) < 1e-6


def test_ghost_batches_all_masked():
    layer = BatchNorm(replica_axis_name="group")
    before = variables(2, mean=0.1, var=0.7)
    _, stats = quick_train(layer, before, jnp.full((3, 6, 2), jnp.nan), jnp.zeros((3, 6)))
    jax.tree.map(np.testing.assert_array_equal, stats, before["batch_stats"])


def test_batched_layer_over_a_named_axis():
    """Synchronised: each shard holds part of the batch. Replicated: each normalises its own."""
    shards, vs = normal(4, 6, 3) * [[[1.0]], [[2.0]], [[3.0]], [[4.0]]], variables(3)

    def run(layer):
        def forward(x):
            y, updates = layer.apply(vs, x, train=True, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        return quick.jit(jax.vmap(forward, out_axes=(0, None), axis_name="shard"))(shards)

    synchronised, stats = run(BatchedBatchNorm(axis_name="shard", momentum=0.0))
    want = oracle.batch_norm(shards)
    assert error(synchronised, want.y) < 1e-6
    assert error(stats["var"], want.var, relative=True) < 1e-6

    replicated, stats = run(BatchedBatchNorm(replica_axis_name="shard", momentum=0.0))
    want = [oracle.batch_norm(shard) for shard in shards]
    assert error(replicated, [w.y for w in want]) < 1e-6
    assert error(stats["var"], np.mean([w.var for w in want], 0), relative=True) < 1e-6


# Running statistics.


@both
def test_decay_over_several_steps(Layer):
    layer, batches = Layer(momentum=0.8), 2 + normal(5, 16, 3)
    vs, mean, var = variables(3), np.zeros(3), np.ones(3)
    for batch in batches:
        vs["batch_stats"] = quick_train(layer, vs, batch)[1]
        want = oracle.batch_norm(batch)
        mean, var = 0.8 * mean + 0.2 * want.mean, 0.8 * var + 0.2 * want.var
    assert error(vs["batch_stats"]["mean"], mean) < 1e-6
    assert error(vs["batch_stats"]["var"], var) < 1e-6


@both
def test_cumulative_average(Layer):
    layer, batches = Layer(momentum=None), jnp.asarray(2 + normal(5, 16, 3))
    vs = init(layer, batches[0], train=False)
    assert vs["batch_stats"]["count"] == 0
    for batch in batches:
        vs["batch_stats"] = quick_train(layer, vs, batch)[1]
    want = [oracle.batch_norm(batch) for batch in batches]
    assert vs["batch_stats"]["count"] == 5
    assert error(vs["batch_stats"]["mean"], np.mean([w.mean for w in want], 0)) < 1e-6
    assert error(vs["batch_stats"]["var"], np.mean([w.var for w in want], 0)) < 1e-6


WEIGHTS = {
    "whole": None,
    "present": [1.0, 1, 1, 1, 0, 0],
    "tenths": [0.1] * 10,  # whose sum is one
    "fractions": [0.5, 0.5, 1, 0.25, 0.25, 0.5],
    "large": [3e3, 1e3, 2e3, 5e3, 0, 4e3],
    "nearly one": [1, 1e-3, 0, 0, 0, 0],
}


@both
@pytest.mark.parametrize("mask", WEIGHTS.values(), ids=WEIGHTS)
def test_unbiased_running_variance(Layer, mask):
    x = normal(10, 3)[: None if mask is None else len(mask)]
    layer = Layer(momentum=0.0, unbiased_running_var=True)
    y, stats = quick_train(layer, variables(3), x, None if mask is None else jnp.array(mask))
    want = np.diag(np.cov(np.float64(x).T, aweights=mask))
    assert error(stats["var"], want, relative=True) < (1e-6 if mask != WEIGHTS["nearly one"] else 1e-3)
    present = np.reshape([True] * 10 if mask is None else np.array(mask) > 0, (-1, 1))
    # Normalised by the biased variance all the same.
    assert error(y, oracle.batch_norm(x, weights=mask).y, where=present, relative=True) < 1e-6


@both
@pytest.mark.parametrize("weight", [1, 0.3, 1e-6, 7e4, 1 / 3])
def test_unbiased_running_variance_of_one_value(Layer, weight):
    """Nothing is known of the variance: it is left as it is, and not multiplied by what rounding makes of 1 / 0."""
    x = 1e3 + normal(6, 3)
    mask, layer = jnp.zeros(6).at[4].set(weight), Layer(momentum=0.0)
    _, biased = train(layer, variables(3), x, mask)
    _, stats = train(layer.clone(unbiased_running_var=True), variables(3), x, mask)
    np.testing.assert_array_equal(stats["var"], biased["var"])


@both
def test_unbiased_running_variance_of_present_values_is_as_by_their_number(Layer):
    """Bit for bit: n is exactly the number of them."""
    x, mask = normal(300, 3), np.arange(300) % 7 > 0
    layer = Layer(momentum=0.0)
    _, biased = train(layer, variables(3), x, mask)
    _, stats = train(layer.clone(unbiased_running_var=True), variables(3), x, mask)
    n = np.sum(mask, dtype=np.float32)
    np.testing.assert_array_equal(stats["var"], biased["var"] * (n / (n - 1)))


def test_unbiased_running_variance_over_several_axes():
    """The sums run over all axes of the batch, positions included; each ghost batch has a size of its own."""
    x, mask = normal(3, 4, 5, 2), np.random.default_rng(4).uniform(size=(3, 4, 5)).astype(np.float32)

    def expected(x, mask):
        return np.diag(np.cov(np.float64(x).reshape(-1, 2).T, aweights=mask.ravel()))

    layer = BatchNorm(axis_name=("inner", "outer"), momentum=0.0, unbiased_running_var=True)
    _, stats = quick_train(layer, variables(2), x, jnp.array(mask))
    assert error(stats["var"], expected(x, mask)) < 1e-6
    ghost = BatchNorm(axis_name="inner", replica_axis_name="outer", momentum=0.0, unbiased_running_var=True)
    _, stats = quick_train(ghost, variables(2), x, jnp.array(mask))
    assert error(stats["var"], np.mean([expected(*group) for group in zip(x, mask, strict=True)], 0)) < 1e-6


@both
def test_momentum_zero_is_the_batch(Layer):
    x = 3 + normal(16, 3)
    _, stats = quick_train(Layer(momentum=0.0), variables(3, mean=1e6, var=1e6), x)
    assert error(stats["mean"], oracle.batch_norm(x).mean) < 1e-6
    assert error(stats["var"], oracle.batch_norm(x).var) < 1e-6


@both
def test_traced_momentum_and_epsilon(Layer):
    x, vs = jnp.asarray(normal(16, 3)), variables(3, mean=0.5)

    def run(momentum, epsilon):
        # Attributes that are traced are not hashable, and so not static under jit.
        return step(Layer(momentum=momentum, epsilon=epsilon), vs, x)

    momenta, epsilons = jnp.array([0.0, 0.5, 0.9]), jnp.array([1e-5, 1e-3, 1.0])
    y, stats = quick.jit(jax.vmap(run))(momenta, epsilons)
    want = oracle.batch_norm(x)
    for i, (momentum, epsilon) in enumerate(zip(momenta.tolist(), epsilons.tolist(), strict=True)):
        assert error(y[i], oracle.batch_norm(x, epsilon=epsilon).y) < 1e-6
        assert error(stats["mean"][i], momentum * 0.5 + (1 - momentum) * want.mean) < 1e-6
        single_y, single_stats = quick.jit(run)(momentum, epsilon)
        np.testing.assert_allclose(y[i], single_y, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(stats["var"][i], single_stats["var"], rtol=1e-6)


@both
def test_evaluation_uses_and_leaves_the_running_statistics(Layer):
    x, vs = normal(4, 3), variables(3, mean=2.0, var=9.0)
    vs["params"] = parameters(3)
    evaluate = quick.jit(partial(Layer().apply, train=False, mutable=["batch_stats"]))
    y, updates = evaluate(vs, x[0] if Layer is BatchNorm else x)
    want = (x - 2.0) / np.sqrt(9.0 + 1e-5) * vs["params"]["scale"] + vs["params"]["bias"]
    assert error(y, want[0] if Layer is BatchNorm else want) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], vs["batch_stats"])


# Variables.


@both
@pytest.mark.parametrize("training", [False, True])
def test_variables_are_flax_s(Layer, training):
    x = jnp.full((7, 3), 5.0)
    ours = init(Layer(), x, train=training)  # no axis, and nothing has moved
    theirs = init(nn.BatchNorm(use_running_average=False), x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@both
def test_dtypes_of_the_variables(Layer):
    layer = Layer(param_dtype=jnp.bfloat16, scale_init=nn.initializers.constant(3), momentum=None)
    vs = init(layer, jnp.ones((2, 3)), train=False)
    assert vs["params"]["scale"].tolist() == [3, 3, 3]
    assert jax.tree.map(lambda leaf: str(leaf.dtype), vs) == {
        "params": {"scale": "bfloat16", "bias": "bfloat16"},
        "batch_stats": {"mean": "float32", "var": "float32", "count": "int32"},
    }


def test_defaults_are_flax_s():
    ours, theirs = BatchNorm(), nn.BatchNorm()
    for name in ("momentum", "epsilon", "use_scale", "use_bias", "scale_init", "bias_init", "dtype", "param_dtype"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.use_fast_variance, theirs.use_fast_variance) == (False, True)


@pytest.mark.parametrize("masked", [False, True])
def test_initialisation_normalises_by_the_batch(masked):
    """By the axes that are mapped, as flax.linen's; no statistic moves."""
    x, mask = 3 + normal(6, 4, 3), jnp.arange(6) < 4 if masked else None
    want = oracle.batch_norm(x, weights=mask).y

    def initialise(layer, x, mask=None):
        return quick.jit(partial(layer.init_with_output, train=True))(jax.random.key(0), x, mask=mask)

    present = True if mask is None else np.asarray(mask)[:, None, None]
    for layer in (BatchedBatchNorm(), VmapBatch(BatchNorm())):
        y, vs = initialise(layer, x, mask)
        assert error(y, want, where=present) < 1e-6
        jax.tree.map(np.testing.assert_array_equal, vs, variables(3))
    y, _ = initialise(BatchNorm(), x[0])
    assert error(y, oracle.batch_norm(x[0]).y) < 1e-6


# Errors.


@both
def test_train_has_no_default(Layer):
    with pytest.raises(TypeError, match="train"):
        Layer().init(jax.random.key(0), jnp.ones((2, 3)))


@both
def test_train_is_said_once(Layer):
    x, vs = jnp.asarray(normal(4, 3)), variables(3, mean=0.5)
    want = Layer().apply(vs, x, train=False)
    np.testing.assert_array_equal(Layer(train=False).apply(vs, x), want)
    with pytest.raises(ValueError, match="got train=True in the call and train=False as its attribute; expected one"):
        Layer(train=False).apply(vs, x, train=True)


@both
@pytest.mark.parametrize("train", ["False", None, 1, 0.0, np.int64(0)])
def test_train_is_a_bool(unchecked, Layer, train):
    with pytest.raises(TypeError, match=rf"got train={re.escape(repr(train))}; expected True or False") as caught:
        Layer().init(jax.random.key(0), jnp.ones((2, 3)), train=train)
    assert str(caught.value).startswith(Layer.__name__)


def test_train_may_be_numpy_s(unchecked):
    layer, x = BatchedBatchNorm(), jnp.asarray(normal(4, 3))
    y, _ = layer.apply(variables(3), x, train=np.bool_(True), mutable=["batch_stats"])
    assert error(y, oracle.batch_norm(x).y) < 1e-6
    np.testing.assert_allclose(layer.apply(variables(3), x, train=np.bool_(False)), x, rtol=1e-4)


def test_train_is_not_traced(unchecked):
    with pytest.raises(TypeError, match=r"BatchNorm: got a traced train; expected True or False.* static_argnames"):
        jax.jit(lambda x, train: BatchNorm().apply(variables(3), x, train=train))(jnp.ones(3), True)


@both
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_impossible_weights(Layer, weight):
    layer, mask = Layer(axis_name=()), jnp.ones(4).at[2].set(weight)
    with pytest.raises(ValueError, match=rf"BatchNorm: got a mask with the weight {weight}; expected finite weights"):
        forward(layer, jnp.ones((4, 3)), mask)
    # Traced weights have no values to look at.
    jax.eval_shape(lambda mask: forward(layer, jnp.ones((4, 3)), mask), mask)


def forward(layer, x, mask=None):
    return layer.apply(variables(x.shape[-1]), x, train=True, mask=mask, mutable=["batch_stats"])


def test_no_axis_in_training():
    with pytest.raises(NameError, match=r"'batch'.*VmapBatch") as caught:
        forward(BatchNorm(), jnp.ones(3))
    assert 'VmapBatch(module, axis_name="batch")' in str(caught.value).replace("'", '"')


def test_an_axis_that_is_not_mapped():
    for layer in (
        BatchNorm(axis_name=("batch", "device")),
        BatchNorm(axis_name="batch", replica_axis_name="device"),
    ):
        with pytest.raises(NameError, match="no axis is named 'device'") as caught:
            jax.vmap(lambda x, layer=layer: forward(layer, x), axis_name="batch")(jnp.ones((4, 3)))
        assert "replica_axis_name" in str(caught.value)
        assert "VmapBatch(module, axis_name=(" in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BatchNorm(), (1, 3)),
        (BatchedBatchNorm(), (1, 3)),
        (BatchedBatchNorm(), (1, 1, 1, 3)),
        (BatchNorm(replica_axis_name="group"), (8, 1, 3)),
    ],
    ids=str,
)
def test_a_batch_of_one_value_is_refused(layer, shape):
    with pytest.raises(ValueError, match=r"one value per feature.*variance is zero.*train=False"):
        quick_train(layer, variables(3), jnp.ones(shape))


def test_one_example_of_several_positions_is_a_batch():
    x = normal(1, 5, 3)
    y, _ = quick_train(BatchNorm(), variables(3), x)
    assert error(y, oracle.batch_norm(x).y) < 1e-6


@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 1), (4, 5, 3), ()])
def test_mask_shapes_of_the_batched_layer(shape):
    with pytest.raises(ValueError, match=r"expected \(4,\) or \(4, 5\)") as caught:
        forward(BatchedBatchNorm(), jnp.ones((4, 5, 3)), jnp.ones(shape))
    assert f"mask of shape {shape} for x of shape (4, 5, 3)" in str(caught.value)


@pytest.mark.parametrize("shape", [(4,), (3,), (5, 3), (1,)])
def test_mask_shapes_of_one_example(shape):
    with pytest.raises(ValueError, match=r"expected \(\) or \(5,\)") as caught:
        jax.vmap(lambda x: forward(BatchNorm(), x, jnp.ones(shape)), axis_name="batch")(jnp.ones((4, 5, 3)))
    assert f"mask of shape {shape} for x of shape (5, 3)" in str(caught.value)


def test_errors_name_the_layer():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm(name="norm_3")(x, train=True)

    with pytest.raises(NameError, match="BatchNorm norm_3"):
        Network().apply({"params": {"norm_3": parameters(3)}}, jnp.ones(3), mutable=["batch_stats"])


# Cost.


def rounds(jaxpr):
    """Reductions that wait for one another: the longest chain of them."""
    depth = {}
    for eqn in jaxpr.eqns:
        before = max((depth.get(v, 0) for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)), default=0)
        depth.update(dict.fromkeys(eqn.outvars, before + eqn.primitive.name.startswith("psum")))
    return max(depth.values())


@pytest.mark.parametrize("mask", [None, 1.0])
@pytest.mark.parametrize(("fast", "expected"), [(False, 2), (True, 1)])
def test_rounds_of_reductions(fast, expected, mask):
    def step(x):
        return forward(BatchNorm(use_fast_variance=fast), x, None if mask is None else jnp.asarray(mask))

    assert rounds(jax.make_jaxpr(step, axis_env=[("batch", 4)])(jnp.ones(3)).jaxpr) == expected


@pytest.mark.parametrize(("fast", "expected"), [(False, 2), (True, 1)])
def test_collectives_on_two_devices(fast, expected):
    """What XLA makes of them for a sharded batch: two all-reduces, or one, in either variant."""
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x, mask = jax.device_put((normal(8, 3), np.ones(8)), NamedSharding(mesh, PartitionSpec("device")))
    for network in (VmapBatch(BatchNorm(use_fast_variance=fast)), BatchedBatchNorm(use_fast_variance=fast)):
        for m in (None, mask):
            step = jax.jit(partial(network.apply, train=True, mutable=["batch_stats"]))
            text = step.lower(variables(3), x, mask=m).compile().as_text()
            assert text.count(" all-reduce(") == expected


@both
def test_where_jax_refuses_to_broadcast(Layer):
    x = normal(8, 4, 3)
    with jax.numpy_rank_promotion("raise"):
        y, _ = quick_train(Layer(epsilon=2e-5), variables(3), x)
        evaluated = quick.jit(partial(Layer().apply, train=False))(variables(3), x)
    assert error(y, oracle.batch_norm(x, epsilon=2e-5).y) < 1e-6
    np.testing.assert_allclose(evaluated, x, rtol=1e-4)


# Derivatives beyond the gradient.


@both
def test_statistics_differentiate(Layer):
    """d mean / dx_i = 1 / n,  d var / dx_i = 2 (x_i - mean) / n."""
    x = 100 + normal(8, 2)

    def stats(x):
        stats = step(Layer(momentum=0.0), variables(2), x)[1]
        return stats["mean"].sum(), stats["var"].sum()

    dmean, dvar = quick.jit(jax.jacobian(stats))(x)
    assert error(dmean, np.full((8, 2), 1 / 8)) < 1e-7
    assert error(dvar, 2 * (x - oracle.batch_norm(x).mean) / 8) < 1e-6


def test_orders_of_transformations():
    """The sums in the derivative are over the named axis, whichever transformation is outermost."""
    x, cotangent, params = normal(6, 2), normal(6, 2, seed=3), parameters(2)
    want = oracle.batch_norm(x, cotangent, **params).dx
    names = {"in_axes": (0, 0), "axis_name": "batch"}

    def loss(x, cotangent):
        y, _ = BatchNorm().apply({**variables(2), "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(cotangent * y)

    def total(loss):
        return lambda x: jax.vmap(loss, **names)(x, cotangent).sum()

    @quick.jit
    def orders(x):
        return (
            jax.vmap(jax.grad(loss), **names)(x, cotangent),
            jax.vmap(jax.grad(jax.jit(loss)), **names)(x, cotangent),
            jax.vmap(jax.jit(jax.grad(jax.checkpoint(loss))), **names)(x, cotangent),
            jax.grad(total(loss))(x),
            jax.grad(jax.jit(total(jax.jit(loss))))(x),
            jax.grad(total(jax.jit(jax.checkpoint(loss))))(x),
            jax.jacfwd(total(jax.jit(loss)))(x),
        )

    for dx in orders(x):
        assert error(dx, want, relative=True) < 1e-6


def plain(x, scale, bias):
    d = x - x.mean(0)
    return d / jnp.sqrt((d * d).mean(0) + 1e-5) * scale + bias


@functools.cache
def exact_second_derivatives():
    """Of the sum of sin(y), by a float32 x and by scale and bias as `parameters` has them; in float64."""
    x, params = 100 + normal(6, 2), parameters(2)
    with jax.enable_x64(True):
        hessian = quick.jit(jax.hessian(lambda x: jnp.sum(jnp.sin(plain(x, **params)))))
        return x, params, np.asarray(hessian(np.float64(x)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_second_derivatives(dtype, tolerance):
    x, params, want = exact_second_derivatives()

    def loss(x):
        stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
        return jnp.sum(jnp.sin(step(BatchNorm(), {"params": params, "batch_stats": stats}, x)[0]))

    with jax.enable_x64(dtype == np.float64):
        forward_over_reverse, reverse_over_reverse = jax.hessian(loss), jax.jacrev(jax.grad(loss))
        for got in jax.jit(lambda x: (forward_over_reverse(x), reverse_over_reverse(x)))(x.astype(dtype)):
            assert error(got, want, relative=True) < tolerance


def test_second_derivative_of_the_variance_of_a_constant_feature():
    """d2 var / dx_i dx_j = 2/n (1[i = j] - 1/n), where the guard against a negative variance has its edge."""

    def var(x):
        return step(BatchedBatchNorm(momentum=0.0), variables(1), x[:, None])[1]["var"][0]

    assert error(quick.jit(jax.hessian(var))(jnp.ones(4)), 2 / 4 * (np.eye(4) - 1 / 4)) < 1e-6
