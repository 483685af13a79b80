"""The layers against the float64 oracle, for whatever shapes, data, masks and nestings hypothesis finds.

Shapes, dtypes and nestings come from short lists, since each combination is a compilation; what fills them
is drawn freely.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import oracle
from tests.helpers.oracle import measure
from vmapbn_flax import BatchedBatchNorm, BatchedBatchRenorm, BatchNorm, BatchRenorm

SHAPES = [(12, 2), (9, 4, 1), (5, 3, 2, 3)]  # (batch, *spatial, features)
both = st.sampled_from([BatchNorm, BatchedBatchNorm])
offsets = st.one_of(st.floats(-1e7, 1e7), st.sampled_from([0.0, 1.0, -1e3, 1e6, 1e7]))
scales = st.floats(1e-3, 1e3)


@st.composite
def data(draw, shape, dtype=np.float32):
    """x, parameters and a cotangent: each feature with an offset and a spread of its own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = shape[-1:]
    offset = np.array([draw(offsets) for _ in range(*features)])
    x = (draw(scales) * rng.normal(size=shape) + offset).astype(dtype)
    params = {"scale": rng.normal(size=features), "bias": rng.normal(size=features)}
    return x, {k: v.astype(np.float32) for k, v in params.items()}, rng.normal(size=shape).astype(np.float32)


@st.composite
def masks(draw, shape):
    """Weights of examples or of positions, two of them at least present."""
    values = draw(st.sampled_from([[0.0, 1.0], [0.0, 0.25, 1.0, 3.0]]))
    size = int(np.prod(shape))
    weights = draw(st.lists(st.sampled_from(values), min_size=size, max_size=size).filter(lambda w: np.sum(w) >= 2))
    mask = np.array(weights, np.float32).reshape(shape)
    return mask.astype(bool) if values == [0.0, 1.0] else mask


def resolution(largest):
    """The spacing of float32 there: the first mean is no better, and a spread below it is rounding."""
    return np.spacing(np.float32(largest)) + 1e-6


def check(got, want, x, params, cotangent, present=True, tolerance=1e-6):
    """Each figure to `tolerance` of its natural size: of the terms it sums, where those may cancel."""
    largest = np.max(np.abs(x), where=present, initial=0)
    deviation = np.sqrt(np.min(want.var) + 1e-5)
    # var is known to tolerance * resolution^2, whose share of var + epsilon is felt downstream: by a feature
    # that is constant but for rounding, far from zero, and by no other.
    inverse = 1 + (resolution(largest) / deviation) ** 2
    size = {
        "y": (1 + np.max(np.abs(want.y))) * inverse,
        "mean": largest + 1e-3,
        "var": np.max(want.var) + resolution(largest) ** 2,
        "dx": np.max(np.abs(params["scale"])) / deviation * np.max(np.abs(cotangent)) * inverse,
        "dscale": np.sum(np.abs(cotangent)) * inverse,
        "dbias": np.sum(np.abs(cotangent)),
    }
    for name, unit in size.items():
        where = present if name in ("y", "dx") else True
        assert oracle.error(getattr(got, name), getattr(want, name), where=where) < tolerance * unit, name
    assert np.all(np.asarray(got.var) >= 0)
    assert all(np.all(np.isfinite(figure)) for figure in got)


@settings(max_examples=150)
@given(st.data(), both, st.sampled_from(SHAPES))
def test_shapes_and_offsets(draw, Layer, shape):
    x, params, cotangent = draw.draw(data(shape))
    got = measure(Layer(), params, x, cotangent)
    check(got, oracle.batch_norm(x, cotangent, **params), x, params, cotangent)


@settings(max_examples=60)
@given(st.data(), both, st.booleans())
def test_masks(draw, Layer, per_position):
    shape = SHAPES[2]
    x, params, cotangent = draw.draw(data(shape))
    mask = draw.draw(masks(shape[:-1] if per_position else shape[:1]))
    present = np.broadcast_to((mask > 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), shape)
    junk = draw.draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 0.0]))
    x, cotangent = np.where(present, x, np.float32(junk)), np.where(present, cotangent, np.float32(0))
    got = measure(Layer(), params, x, cotangent, jnp.asarray(mask))
    check(got, oracle.batch_norm(x, cotangent, **params, weights=mask), x, params, cotangent, present)
    assert np.all(np.asarray(got.dx)[~present] == 0)


@settings(max_examples=60)
@given(st.data(), both, st.booleans())
def test_complex(draw, Layer, masked):
    shape = SHAPES[2]
    real, params, cotangent = draw.draw(data(shape))
    imaginary, _, other = draw.draw(data(shape))
    x, cotangent = real + 1j * imaginary, cotangent + 1j * other
    mask = draw.draw(masks(shape[:1])) if masked else np.ones(shape[0], np.float32)
    present = np.broadcast_to((mask > 0).reshape(-1, *(1,) * (x.ndim - 1)), shape)
    x, cotangent = np.where(present, x, np.complex64(np.nan)), np.where(present, cotangent, np.complex64(0))
    got = measure(Layer(), params, x, cotangent, jnp.asarray(mask) if masked else None)
    check(got, oracle.batch_norm(x, cotangent, **params, weights=mask), x, params, cotangent, present, 2e-6)


@settings(max_examples=150)
@given(st.data(), st.sampled_from([BatchNorm, BatchedBatchNorm, BatchRenorm]), st.sampled_from([None, bool, float]))
def test_every_order_of_magnitude(draw, Layer, masked):
    """Of inputs, gradients and weights, as far as float32 has numbers for the results. Renorm is in its warm-up."""
    shape = SHAPES[0]
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32 - 1)))
    spread = 10.0 ** np.array([draw.draw(st.floats(-30, 18)) for _ in range(2)])
    offset = spread * draw.draw(st.sampled_from([0.0, 1.0, -100.0])) * rng.normal(size=2)
    x = np.float32(spread * rng.uniform(-1, 1, shape) + offset)
    cotangent = np.float32(rng.normal(size=shape) * 10.0 ** draw.draw(st.floats(-18, 3)))
    params = {"scale": np.float32(rng.normal(size=2)), "bias": np.float32(rng.normal(size=2))}
    mask = None if masked is None else rng.random(shape[0]) < 0.7
    if masked is float:
        sizes = draw.draw(st.sampled_from([st.just(draw.draw(st.floats(-37, 19))), st.floats(-37, 19)]))
        mask = np.float32(mask * rng.uniform(0.5, 1, 12) * 10.0 ** np.array([draw.draw(sizes) for _ in range(12)]))
    present = np.ones(shape[:1], bool) if mask is None else mask > 0
    if present.sum() < 2:
        return
    cotangent[~present] = 0
    got = measure(Layer(), params, x, cotangent, None if mask is None else jnp.asarray(mask), RUNNING.get(Layer))
    want = oracle.batch_norm(x, cotangent, **params, weights=mask)
    inverse = 1 / np.sqrt(want.var + 1e-5)
    largest = np.abs(x[present]).max(0)
    normalised = 1 + np.abs(x[present] - want.mean).max(0) * inverse
    size = {
        "y": normalised * (1 + np.abs(params["scale"])),
        "mean": largest,
        "var": want.var + (1e-7 * largest) ** 2 + 1e-30,
        "dx": np.abs(cotangent).max() * np.abs(params["scale"]) * inverse * normalised + 1e-31,
        "dscale": np.abs(cotangent).sum() * normalised,
        "dbias": np.abs(cotangent).sum(),
    }
    for name, unit in size.items():
        where = present[:, None] if name in ("y", "dx") else True
        difference = np.abs(np.float64(getattr(got, name)) - getattr(want, name)) / unit
        assert np.max(difference, where=where, initial=0) < 2e-6, name


RUNNING = {BatchRenorm: {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32), "count": np.int32(0)}}


@settings(max_examples=60)
@given(st.data(), st.sampled_from([jnp.bfloat16, jnp.float16]), st.sampled_from(SHAPES[1:]))
def test_narrow_dtypes(draw, dtype, shape):
    """Exact statistics of what was rounded on the way in, one rounding on the way out."""
    x, params, _ = draw.draw(data(shape))
    x = np.asarray(np.clip(x, -6e4, 6e4) if dtype == jnp.float16 else x, dtype)
    got = measure(BatchNorm(dtype=dtype), params, x, np.ones(shape, np.float32))
    want = oracle.batch_norm(x, **params)
    assert got.y.dtype == dtype
    assert got.mean.dtype == got.var.dtype == jnp.float32
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(want.y) + float(jnp.finfo(dtype).smallest_subnormal)
    assert np.all(np.abs(np.asarray(got.y, np.float64) - want.y) <= rounding + 1e-6 * (1 + np.max(np.abs(want.y))))
    assert oracle.error(got.mean, want.mean) < 1e-6 * (1 + np.max(np.abs(np.asarray(x, np.float64))))
    assert oracle.error(got.var, want.var) < 1e-6 * (1e-6 + np.max(want.var))


NESTINGS = {  # leading axes: how many of them are replicas, and their names beside those of the batch
    (3, 4): [(0, (), ("a", "b")), (1, "a", "b"), (1, "b", "a")],
    (2, 3, 4): [(2, ("a", "b"), "c")],
}


@partial(jax.jit, static_argnums=0)
def train_each(layers, variables, x, mask):
    return [oracle.step(layer, variables, x, mask) for layer in layers]


@settings(max_examples=60)
@given(st.data(), st.sampled_from(list(NESTINGS)), st.booleans())
def test_nestings(draw, leading, masked):
    """Leading axes split between `axis_name` and `replica_axis_name`: every replica is a batch of its own."""
    x, params, _ = draw.draw(data((*leading, 2)))
    mask = draw.draw(masks(leading)) if masked else None
    variables = {"params": params, "batch_stats": {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}}
    layers = tuple(
        BatchNorm(axis_name=names, replica_axis_name=replicas, momentum=0.0) for _, replicas, names in NESTINGS[leading]
    )
    found = train_each(layers, variables, x, None if mask is None else jnp.asarray(mask))
    for (count, _, _), (y, stats) in zip(NESTINGS[leading], found, strict=True):
        groups = math.prod(leading[:count])
        flat = x.reshape(groups, -1, 2)
        weights = np.ones(flat.shape[:2]) if mask is None else mask.reshape(groups, -1)
        y = np.asarray(y).reshape(flat.shape)
        wanted = [
            (y[i], weights[i], oracle.batch_norm(flat[i], **params, weights=weights[i]))
            for i in range(groups)
            if weights[i].any()
        ]
        for got, w, want in wanted:
            assert oracle.error(got, want.y, where=w[:, None] > 0) < 1e-6 * (1 + np.max(np.abs(want.y)))
        largest = np.max(np.abs(x))
        spread = max(np.max(want.var) for _, _, want in wanted)
        for name, unit in (("mean", largest + 1e-3), ("var", spread + resolution(largest) ** 2)):
            average = np.mean([getattr(want, name) for _, _, want in wanted], 0)
            assert oracle.error(stats[name], average) < 1e-6 * unit, name


@settings(max_examples=60)
@given(st.data(), st.sampled_from([BatchRenorm, BatchedBatchRenorm]), st.booleans())
def test_renorm(draw, Layer, masked):
    """With running statistics that are within a few deviations of the batch's, and limits that some features reach."""
    shape = SHAPES[2]
    x, params, cotangent = draw.draw(data(shape))
    mask = draw.draw(masks(shape[:-1])) if masked else np.ones(shape[:-1], bool)
    present = np.broadcast_to((mask > 0)[..., None], shape)
    x, cotangent = np.where(present, x, np.float32(np.nan)), np.where(present, cotangent, np.float32(0))
    plain = oracle.batch_norm(x, weights=mask)
    apart = np.array([draw.draw(st.floats(-4, 4)) for _ in range(3)])
    ratio = np.array([draw.draw(st.floats(0.1, 10)) for _ in range(3)])
    running = {
        "mean": np.float32(plain.mean + apart * np.sqrt(plain.var)),
        "var": np.float32(plain.var * ratio),
        "count": np.int32(3),
    }
    layer = Layer(r_max=2.0, d_max=2.0, warmup_steps=0, r_max_steps=0, d_max_steps=0)
    got = measure(layer, params, x, cotangent, jnp.asarray(mask) if masked else None, running)
    correct = oracle.correction(running, r_max=2.0, d_max=2.0)
    want = oracle.batch_norm(x, cotangent, **params, weights=mask, correct=correct)
    check(got, want, x, params, cotangent, present, tolerance=3e-6)
