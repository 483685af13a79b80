"""Ours against flax, PyTorch, Equinox and haiku on the same numbers: outputs, gradients, statistics.

Every layer trains for five steps on the same batches, and is differentiated at each. Where a peer has
another convention, the test that is named after it states the formula that joins the two.
"""

import inspect
import runpy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import quick
from vmapbn_flax import BatchNorm, VmapBatch

STEPS, FEATURES, MOMENTUM = 5, 3, 0.9
SHAPES = {"1d": (16, FEATURES), "2d": (8, 5, 4, FEATURES)}
EPSILON = 1e-5  # everyone's default
SCALE, BIAS = np.float32([0.5, -1.5, 2.0]), np.float32([0.3, 0.0, -0.7])


class Run(NamedTuple):
    """What five training steps give; the first axis of each array is the step."""

    y: np.ndarray
    x_grad: np.ndarray
    scale_grad: np.ndarray
    bias_grad: np.ndarray
    mean: np.ndarray  # running, after the step
    var: np.ndarray


@pytest.fixture(params=SHAPES, scope="module")
def data(request):
    """Batches and cotangents, `(step, batch, *spatial, features)`."""
    rng = np.random.default_rng(0)
    shape = SHAPES[request.param]
    batches = [rng.normal(loc=step, scale=2, size=shape) for step in range(1, STEPS + 1)]
    return np.float32(batches), np.float32(rng.normal(size=(STEPS, *shape)))


INITIAL = {"mean": np.zeros(FEATURES, np.float32), "var": np.ones(FEATURES, np.float32)}


@pytest.fixture(scope="module")
def expected(data):
    """Ours on the same data."""
    return ours(data)


def run(forward, state, statistics, data) -> Run:
    """Trains `forward(scale, bias, state, x) -> (y, state)`; `statistics(state)` are the running ones."""

    def step(state, batch):
        x, cotangent = batch
        y, pullback, state = jax.vjp(
            lambda scale, bias, x: forward(scale, bias, state, x), SCALE, BIAS, x, has_aux=True
        )
        scale_grad, bias_grad, x_grad = pullback(cotangent)
        return state, (y, x_grad, scale_grad, bias_grad, *statistics(state))

    _, history = quick.jit(lambda state, data: jax.lax.scan(step, state, data))(state, data)
    return Run(*map(np.asarray, history))


def linen_run(layer, data, stats, **train) -> Run:
    """Ours and flax.linen's, which share a variable tree."""

    def forward(scale, bias, stats, x):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, updates = layer.apply(variables, x, **train, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return run(forward, stats, lambda stats: (stats["mean"], stats["var"]), data)


def ours(data, momentum=MOMENTUM, **attributes) -> Run:
    layer = VmapBatch(BatchNorm(momentum=momentum, **attributes))
    return linen_run(layer, data, INITIAL if momentum is not None else {**INITIAL, "count": 0}, train=True)


def equinox_run(data, mode) -> Run:
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(FEATURES, "batch", momentum=MOMENTUM, mode=mode)

    def forward(scale, bias, state, x):
        affine = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (scale, bias))
        x = jnp.moveaxis(x, -1, 1)  # Equinox has the channels first
        y, state = jax.vmap(affine, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
        return jnp.moveaxis(y, 1, -1), state

    index = layer.batch_state_index if mode == "batch" else layer.ema_state_index
    return run(forward, state, lambda state: state.get(index), data)


def haiku_run(data) -> Run:
    layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, decay_rate=MOMENTUM)(x, is_training=True))
    _, state = quick.jit(layer.init)(None, data[0][0])

    def forward(scale, bias, state, x):
        ones = (1,) * (x.ndim - 1)
        params = {"scale": scale.reshape(*ones, -1), "offset": bias.reshape(*ones, -1)}
        return layer.apply({"batch_norm": params}, state, None, x)

    def statistics(state):
        return [state[f"batch_norm/~/{name}_ema"]["average"].reshape(FEATURES) for name in ("mean", "var")]

    return run(forward, state, statistics, data)


def torch_run(data, torch, momentum) -> Run:
    batches, cotangents = (torch.from_numpy(np.moveaxis(array, -1, 2).copy()) for array in data)
    kind = torch.nn.BatchNorm1d if batches.ndim == 3 else torch.nn.BatchNorm2d
    layer = kind(FEATURES, momentum=momentum)
    layer.load_state_dict({"weight": torch.from_numpy(SCALE), "bias": torch.from_numpy(BIAS)}, strict=False)
    history = []
    for x, cotangent in zip(batches, cotangents, strict=True):
        x.requires_grad_(True)
        y = layer(x)
        layer.zero_grad()
        y.backward(cotangent)
        step = (y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
        history.append([tensor.detach().clone().numpy() for tensor in step])
    y, x_grad, *rest = map(np.stack, zip(*history, strict=True))
    return Run(np.moveaxis(y, 2, -1), np.moveaxis(x_grad, 2, -1), *rest)


def assert_same(got: Run, expected: Run, fields=Run._fields, tolerance=1e-6) -> None:
    """`tolerance` is a fraction of the largest entry of each field."""
    for field in fields:
        a, b = getattr(got, field), getattr(expected, field)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=field)


TRAINING = ("y", "x_grad", "scale_grad", "bias_grad")
STATISTICS = ("mean", "var")


def test_flax_is_the_same_layer(data, expected):
    layer = nn.BatchNorm(momentum=MOMENTUM, use_fast_variance=False)
    assert_same(linen_run(layer, data, INITIAL, use_running_average=False), expected)


def test_flax_default_differs_by_the_rounding_of_its_fast_variance(data, expected):
    """E[x^2] - E[x]^2 multiplies errors by 1 + (mean / deviation)^2, which is up to 7 on these data."""
    layer = nn.BatchNorm(momentum=MOMENTUM)
    assert_same(linen_run(layer, data, INITIAL, use_running_average=False), expected, tolerance=6e-6)


def test_torch_momentum_is_one_minus_ours_and_its_running_variance_unbiased(data):
    torch = pytest.importorskip("torch")
    assert_same(torch_run(data, torch, momentum=1 - MOMENTUM), ours(data, unbiased_running_var=True))


def test_torch_momentum_none_is_ours_the_cumulative_average(data):
    torch = pytest.importorskip("torch")
    assert_same(torch_run(data, torch, momentum=None), ours(data, momentum=None, unbiased_running_var=True))


def test_equinox_batch_mode_trains_as_ours(data, expected):
    assert_same(equinox_run(data, "batch"), expected)


def test_equinox_batch_mode_debiases_at_inference_a_variance_that_started_at_one():
    """After n steps on data of variance v it normalises by v + momentum**n / (1 - momentum**n).

    It divides by 1 - momentum**n, as if the average had started at zero. The mean did, the variance did not.
    """
    x = np.float32([[-2.0], [2.0]])  # mean 0, variance 4
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", momentum=MOMENTUM, mode="batch")
    batched = quick.jit(jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch"))
    evaluate = quick.jit(partial(layer, inference=True))
    for n in (1, 2):
        _, state = batched(x, state)
        y, _ = evaluate(x[1], state)
        np.testing.assert_allclose(y, 2 / np.sqrt(4 + MOMENTUM**n / (1 - MOMENTUM**n)), rtol=1e-5)


def test_equinox_ema_mode_normalises_by_running_statistics_in_training_too(data, expected):
    """The first batch becomes the running statistics and is normalised as by ours.

    From then on a batch is normalised by the running statistics, of which it is a share of 1 - momentum,
    and the gradient goes through that share only.
    """
    got = equinox_run(data, "ema")
    first = [Run(*(field[:1] for field in history)) for history in (got, expected)]
    assert_same(*first, fields=TRAINING)

    batches, cotangents = np.float64(data)
    axes = tuple(range(batches.ndim - 2))
    mean, var = batches[0].mean(axes), batches[0].var(axes)
    for step, (x, g) in enumerate(zip(batches[1:], cotangents[1:], strict=True), start=1):
        mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(axes)
        var = MOMENTUM * var + (1 - MOMENTUM) * x.var(axes)
        deviation = np.sqrt(var + EPSILON)
        y = (x - mean) / deviation
        through_mean, through_var = g.mean(axes), (x - x.mean(axes)) / deviation * (g * y).mean(axes)
        x_grad = SCALE / deviation * (g - (1 - MOMENTUM) * (through_mean + through_var))
        for a, b in ((got.mean, mean), (got.var, var), (got.y, y * SCALE + BIAS), (got.x_grad, x_grad)):
            np.testing.assert_allclose(a[step], b, rtol=0, atol=1e-6 * np.abs(b).max())


def test_haiku_trains_as_ours_up_to_the_rounding_of_its_fast_variance(data, expected):
    assert_same(haiku_run(data), expected, fields=TRAINING, tolerance=6e-6)


def test_haiku_running_statistics_are_ours_without_their_first_values(data, expected):
    """Its ExponentialMovingAverage starts at zero and is divided by 1 - decay_rate**n after n steps.

    Ours, which start at mean 0 and variance 1, still hold decay_rate**n of those.
    """
    got = haiku_run(data)
    remains = MOMENTUM ** np.arange(1, STEPS + 1)[:, None]
    got = got._replace(mean=(1 - remains) * got.mean, var=(1 - remains) * got.var + remains)
    assert_same(got, expected, fields=STATISTICS, tolerance=6e-6)


@pytest.mark.parametrize(
    ("layer", "epsilon", "momentum"),
    [
        (nn.BatchNorm, "epsilon", "momentum"),
        (eqx.nn.BatchNorm, "eps", "momentum"),
        (hk.BatchNorm, "eps", None),
    ],
)
def test_defaults_are_ours(layer, epsilon, momentum):
    """But haiku has no default for `decay_rate`, our `momentum`."""
    assert default(layer, epsilon) == default(BatchNorm, "epsilon") == EPSILON
    assert momentum is None or default(layer, momentum) == default(BatchNorm, "momentum") == 0.99
    assert default(hk.BatchNorm, "decay_rate") is inspect.Parameter.empty


def test_torch_default_momentum_would_be_0_9_here():
    torch = pytest.importorskip("torch")
    for layer in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d):
        assert (default(layer, "eps"), default(layer, "momentum")) == (EPSILON, 0.1)


def test_only_ours_is_exact_far_from_zero():
    """What docs/exactness.md tabulates, at one offset."""
    script = Path(__file__).parents[1] / "benchmarks" / "exactness.py"
    for name, [(y_error, x_grad_error)] in runpy.run_path(str(script))["measure"]([10_000]).items():
        if name.startswith("ours"):
            assert max(y_error, x_grad_error) < 1e-6
        else:
            assert not min(y_error, x_grad_error) < 1e-5, name  # NaN included


def default(layer, name):
    return inspect.signature(layer).parameters[name].default
