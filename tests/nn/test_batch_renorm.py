from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle, quick
from tests.helpers.oracle import correction, error, measure, quick_measure, quick_train
from vmapbn_flax import BatchedBatchNorm, BatchedBatchRenorm, BatchNorm, BatchRenorm, VmapBatch

AT_ONCE = {"warmup_steps": 0, "r_max_steps": 0, "d_max_steps": 0}
both = pytest.mark.parametrize("Layer", [partial(BatchRenorm, **AT_ONCE), partial(BatchedBatchRenorm, **AT_ONCE)])
limits = pytest.mark.parametrize("limits", [{}, {"r_max": 1.2, "d_max": 0.3}, {"r_max": 1e6, "d_max": 1e6}])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(features):
    return {"scale": jnp.asarray(1 + 0.5 * normal(features, seed=1)), "bias": jnp.asarray(normal(features, seed=2))}


def running(features, count=7):
    """Statistics that are far from those of `normal` in some features, and near in others."""
    spread = np.resize(np.float32([0.02, 0.5, 1.0, 30.0]), features)
    return {"mean": jnp.asarray(2 * normal(features, seed=4)), "var": jnp.asarray(spread), "count": jnp.int32(count)}


def variables(features, count=7):
    return {"params": parameters(features), "batch_stats": running(features, count)}


def expected(x, params, stats, cotangent=0.0, *, r_max=3.0, d_max=5.0, **kwargs):
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return oracle.batch_norm(x, cotangent, **params, **kwargs, correct=correction(stats, r_max=r_max, d_max=d_max))


def require_close(got, want, where=True, tolerance=1e-6):
    for name in want._fields:
        mask = where if name in ("y", "dx") else True
        difference = error(getattr(got, name), getattr(want, name), relative=True, where=mask)
        assert difference < tolerance, (name, difference)


# Output, gradients and statistics.


def test_by_hand():
    x = jnp.array([[1.0], [3.0], [5.0], [7.0]])  # mean 4, variance 5; with epsilon, sigma 3
    stats = {"mean": jnp.array([2.0]), "var": jnp.array([0.0]), "count": jnp.int32(0)}  # sigma 2
    layer = BatchedBatchRenorm(momentum=0.9, epsilon=4.0, use_scale=False, use_bias=False, **AT_ONCE)
    y, stats = quick_train(layer, {"batch_stats": stats}, x)
    np.testing.assert_allclose(y, (x - 2) / 2, rtol=1e-6)  # r = 3/2 and d = 1 are within the limits
    np.testing.assert_allclose(stats["mean"], [1.8 + 0.4], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.5], rtol=1e-6)
    assert stats["count"] == 1


@both
@limits
@pytest.mark.parametrize("shape", [(16, 4), (6, 3, 5, 4)])
def test_float64_oracle(Layer, limits, shape):
    x, cotangent, params, stats = 1 + normal(*shape), normal(*shape, seed=3), parameters(4), running(4)
    got = measure(Layer(**limits), params, x, cotangent, running=stats)
    require_close(got, expected(x, params, stats, cotangent, **limits))


def test_the_oracle_s_gradients_are_differences_with_r_and_d_held():
    x, g, stats = np.float64(1 + normal(6, 4)), np.float64(normal(6, 4, seed=3)), running(4)
    params = {name: np.float64(value) for name, value in parameters(4).items()}
    found = expected(x, params, stats, g)
    held = correction(stats, r_max=3.0, d_max=5.0)(found.mean, np.sqrt(found.var + 1e-5))

    def loss(x, params):
        return np.sum(g * oracle.batch_norm(x, **params, correct=lambda *_: held).y)

    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        assert abs((loss(x + step, params) - loss(x - step, params)) / 2e-6 - found.dx[index]) < 1e-7
    for name, gradient in (("scale", found.dscale), ("bias", found.dbias)):
        for i in range(4):
            step = {**params, name: params[name] + 1e-6 * np.eye(4)[i]}
            assert abs((loss(x, step) - loss(x, params)) / 1e-6 - gradient[i]) < 1e-5


@both
def test_without_limits_training_is_evaluation(Layer):
    """Ioffe, 2017, section 3: (x - mu_B) / sigma_B * r + d is (x - mu) / sigma."""
    x, vs = 1 + normal(16, 4), variables(4)
    y, _ = quick_train(Layer(r_max=1e6, d_max=1e6), vs, x)
    evaluated = quick.jit(partial(BatchedBatchNorm().apply, train=False))(vs, x)
    assert error(y, evaluated, relative=True) < 1e-6


@both
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, 1e7])
def test_far_from_zero(Layer, offset):
    """d has the digits that a float32 mean cannot hold."""
    x, cotangent, params = normal(128, 4) + np.float32(offset), normal(128, 4, seed=3), parameters(4)
    stats = {
        "mean": jnp.asarray(x.mean(0) + np.float32([0, 1, -2, 1])),
        "var": jnp.float32([1, 0.5, 2, 0.1]),
        "count": jnp.int32(1),
    }
    got, want = measure(Layer(), params, x, cotangent, running=stats), expected(x, params, stats, cotangent)
    require_close(got, want)


@both
@pytest.mark.parametrize("positions", [(8,), (8, 5)])
def test_masks(Layer, positions):
    mask = np.random.default_rng(4).integers(0, 3, positions) / 2
    present = np.broadcast_to((mask > 0).reshape(*positions, *(1,) * (3 - len(positions))), (8, 5, 4))
    x = np.where(present, normal(8, 5, 4), np.float32(np.nan))
    cotangent = np.where(present, normal(8, 5, 4, seed=3), 0)
    params, stats = parameters(4), running(4)
    got = quick_measure(Layer(), params, x, cotangent, jnp.float32(mask), running=stats)
    assert np.all(np.isfinite(got.y))
    assert np.all(got.dx[~present] == 0)
    require_close(got, expected(x, params, stats, cotangent, weights=mask), present)


@both
def test_nothing_left_leaves_the_statistics_alone(Layer):
    vs = variables(4)
    y, stats = quick_train(Layer(), vs, np.full((6, 4), np.nan, np.float32), jnp.zeros(6, bool))
    assert np.all(np.isfinite(y))
    jax.tree.map(np.testing.assert_array_equal, stats, vs["batch_stats"])


def complex_normal(*shape, seed=0):
    return (normal(*shape, seed=seed) + 1j * normal(*shape, seed=seed + 10)).astype(np.complex64)


@both
@pytest.mark.parametrize("d_max", [0.0, 0.7, 1e6])
def test_complex(Layer, d_max):
    """The modulus of d is limited, so that turning every x turns every result."""
    x, cotangent, turn = 1 - 2j + complex_normal(32, 4), complex_normal(32, 4, seed=5), np.complex64(np.exp(2j))
    params, stats = parameters(4), running(4) | {"mean": jnp.asarray(complex_normal(4, seed=4))}
    got = quick_measure(Layer(d_max=d_max), params, x, cotangent, running=stats)
    require_close(got, expected(x, params, stats, cotangent, d_max=d_max), tolerance=3e-6)
    turned = stats | {"mean": stats["mean"] * turn}
    y = quick_measure(Layer(d_max=d_max), params, x * turn, cotangent, running=turned).y
    np.testing.assert_allclose(y - params["bias"], (got.y - params["bias"]) * turn, rtol=0, atol=1e-5)


# Several axes.


def test_ghost_batches_are_each_corrected_by_the_one_set_of_statistics():
    groups, vs = normal(3, 6, 4) * [[[1.0]], [[2.0]], [[5.0]]] + 4, variables(4)
    groups = groups.astype(np.float32)
    layer = BatchRenorm(replica_axis_name="group", momentum=0.9, **AT_ONCE)
    y, stats = quick_train(layer, vs, groups)
    want = [expected(group, vs["params"], vs["batch_stats"]) for group in groups]
    assert error(y, [w.y for w in want], relative=True) < 1e-6
    old = vs["batch_stats"]
    for name in ("mean", "var"):
        batches = np.mean([getattr(w, name) for w in want], 0)
        assert error(stats[name], 0.9 * np.float64(old[name]) + 0.1 * batches, relative=True) < 1e-6
    assert stats["count"] == old["count"] + 1
    replicas = VmapBatch(BatchedBatchRenorm(replica_axis_name="group", **AT_ONCE), axis_name="group")
    twin, _ = quick.jit(partial(replicas.apply, train=True, mutable=["batch_stats"]))(vs, groups)
    np.testing.assert_allclose(twin, y, rtol=1e-5, atol=1e-5)


def test_two_axes_are_one_flat_batch():
    x, cotangent, params, stats = 7 + normal(3, 4, 5), normal(3, 4, 5, seed=3), parameters(5), running(5)
    got = quick_measure(BatchRenorm(axis_name=("inner", "outer"), **AT_ONCE), params, x, cotangent, running=stats)
    require_close(got, expected(x, params, stats, cotangent))


def test_an_axis_left_out_is_refused():
    layer = VmapBatch(BatchRenorm(axis_name="batch"), axis_name=("group", "batch"))
    with pytest.raises(ValueError, match=r"BatchRenorm .* BatchRenorm\(axis_name=\('batch', 'group'\)\)"):
        layer.apply(variables(4), jnp.ones((2, 3, 4)), train=True, mutable=["batch_stats"])


# The limits.


def test_the_limits_of_the_paper():
    """1 and 0 for 5,000 steps; r_max reaches 3 at 40,000 steps and d_max 5 at 25,000 (section 4)."""
    x = jnp.array([[-1e3], [1e3]])

    @quick.jit
    @partial(jax.vmap, out_axes=0)
    def largest(count, mean):
        stats = {"mean": mean[None], "var": jnp.zeros(1), "count": count}
        layer = BatchedBatchRenorm(use_scale=False, use_bias=False)
        return layer.apply({"batch_stats": stats}, x, train=True, mutable=["batch_stats"])[0]

    counts = jnp.array([0, 4_999, 5_000, 15_000, 22_500, 25_000, 40_000, 1_000_000])
    low, high = largest(counts, jnp.full(8, -1e9))[..., 0].T  # d is at its limit, and r too
    d_max, r_max = (low + high) / 2, (high - low) / 2
    np.testing.assert_allclose(d_max, [0, 0, 0, 2.5, 4.375, 5, 5, 5], rtol=1e-5)
    np.testing.assert_allclose(r_max, [1, 1, 1, 1 + 2 * 10 / 35, 2, 1 + 2 * 20 / 35, 3, 3], rtol=1e-5)


@pytest.mark.parametrize(("Renorm", "Norm"), [(BatchRenorm, BatchNorm), (BatchedBatchRenorm, BatchedBatchNorm)])
@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_bit_for_bit_while_the_limits_are_1_and_0(Renorm, Norm, masked):
    x, cotangent, mask = 3 + normal(16, 5, 4), normal(16, 5, 4, seed=3), jnp.arange(16) % 4 > 0 if masked else None
    variants = {"both": {}, "scale alone": {"use_bias": False}, "bias alone": {"use_scale": False}}

    def train(layer, params, stats, x):
        def loss(params, x):
            y, new = oracle.step(layer, {"params": params, "batch_stats": stats}, x, mask)
            return jnp.sum(cotangent * y), (y, new)

        params = {name: params[name] for name in ("scale", "bias") if getattr(layer, f"use_{name}")}
        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    @partial(jax.jit, static_argnums=0)  # all variants in one program, which takes hardly longer to compile
    def train_each(Layer, params, stats, x):
        return {name: train(Layer(**attributes), params, stats, x) for name, attributes in variants.items()}

    params, stats = parameters(4), running(4, count=4_999)
    got = train_each(Renorm, params, stats, x)
    assert [new.pop("count") for _, (_, new) in got.values()] == [5_000] * 3
    del stats["count"]
    jax.tree.map(np.testing.assert_array_equal, got, train_each(Norm, params, stats, x))


@both
def test_evaluation_is_batch_norm_s_bit_for_bit(Layer):
    x, vs = jnp.asarray(normal(6, 4)), variables(4)
    x = x if Layer.func is BatchedBatchRenorm else x[0]
    got = Layer().apply(vs, x, train=False)
    np.testing.assert_array_equal(got, BatchNorm().apply(vs, x, train=False))


def test_the_limits_may_be_traced():
    x, vs = jnp.asarray(1 + normal(16, 4)), variables(4)

    @quick.jit
    @jax.vmap
    def run(r_max, d_max, steps):
        layer = BatchedBatchRenorm(r_max=r_max, d_max=d_max, warmup_steps=steps, r_max_steps=steps, d_max_steps=steps)
        return layer.apply(vs, x, train=True, mutable=["batch_stats"])[0]

    found = run(jnp.array([1.5, 2.0, 2.0]), jnp.array([0.3, 4.0, 4.0]), jnp.array([7, 7, 8]))
    for y, (r_max, d_max) in zip(found, [(1.5, 0.3), (2.0, 4.0), (1.0, 0.0)], strict=True):
        want = expected(x, vs["params"], vs["batch_stats"], r_max=r_max, d_max=d_max)
        assert error(y, want.y, relative=True) < 1e-6


# Variables.


@both
@pytest.mark.parametrize("training", [False, True])
def test_variables_are_batch_norm_s_and_the_count(Layer, training):
    x = jnp.full((7, 3), 5.0)
    ours, theirs = (
        quick.jit(partial(layer.init, train=training))(jax.random.key(0), x)
        for layer in (Layer(), BatchNorm(momentum=None))
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {"float32", "int32"}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Other people's formulas.


def batches(steps):
    rng = np.random.default_rng(5)
    return [np.float32(rng.normal(size=(12, 4)) * rng.uniform(0.5, 3) + rng.normal()) for _ in range(steps)]


def steps_of(layer, data):
    """The outputs of training steps on `data`, and the statistics after them."""
    vs, outputs = {"params": parameters(4), "batch_stats": running(4, count=0)}, []
    for x in data:
        y, vs["batch_stats"] = quick_train(layer, vs, x)
        outputs.append(y)
    return outputs, vs["batch_stats"]


def test_torchrl_s_batch_renorm():
    """Its `BatchRenorm1d` before twice its warm-up, where it doubles r - 1: limits at once, variances unbiased."""
    data, scale, bias = batches(9), *map(np.float64, parameters(4).values())
    layer = BatchedBatchRenorm(
        momentum=0.99, unbiased_running_var=True, warmup_steps=5, r_max_steps=5, d_max_steps=5, r_max=2.0, d_max=1.0
    )
    outputs, stats = steps_of(layer, data)
    mean, var = np.float64(running(4)["mean"]), np.float64(running(4)["var"])
    for step, (x, y) in enumerate(zip(map(np.float64, data), outputs, strict=True)):
        std, running_std = np.sqrt(x.var(0) + 1e-5), np.sqrt(var + 1e-5)
        r, d = np.clip(std / running_std, 1 / 2, 2), np.clip((x.mean(0) - mean) / running_std, -1, 1)
        warm = step // 5
        r, d = 1 + (r - 1) * warm, d * warm
        assert error(y, scale * ((x - x.mean(0)) / std * r + d) + bias, relative=True) < 1e-6, step
        mean, var = mean + 0.01 * (x.mean(0) - mean), var + 0.01 * (x.var(0, ddof=1) - var)
    assert error(stats["mean"], mean) < 1e-6
    assert error(stats["var"], var, relative=True) < 1e-6


def test_sbx_s_batch_renorm():
    """Its `BatchRenorm` puts epsilon beside var / r^2, so that the two agree as far as epsilon is small beside it."""
    data, scale, bias, epsilon = batches(9), *map(np.float64, parameters(4).values()), 1e-9
    layer = BatchedBatchRenorm(momentum=0.9, epsilon=epsilon, warmup_steps=4, r_max_steps=4, d_max_steps=4)
    outputs, stats = steps_of(layer, data)
    mean, var = np.float64(running(4)["mean"]), np.float64(running(4)["var"])
    for step, (x, y) in enumerate(zip(map(np.float64, data), outputs, strict=True)):
        center, spread = x.mean(0), x.var(0)
        if step >= 4:
            r = np.clip(np.sqrt(spread + epsilon) / np.sqrt(var + epsilon), 1 / 3, 3)
            d = np.clip((center - mean) / np.sqrt(var + epsilon), -5, 5)
            center, spread = center - d * np.sqrt(spread) / r, spread / r**2
        want = (x - center) / np.sqrt(spread + epsilon) * scale + bias
        assert error(y, want, relative=True) < 1e-6, step
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    assert error(stats["mean"], mean) < 1e-6
    assert error(stats["var"], var, relative=True) < 1e-6
    assert stats["count"] == 9
