"""The NNX layers: the numbers of the Linen ones, in the places where flax.nnx has them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import vmapbn_flax
from tests.helpers import oracle, quick
from tests.nn.test_batch_norm_properties import SHAPES, check, data, masks
from vmapbn_flax import MLP, VmapBatch
from vmapbn_flax.nn.nnx import (
    BatchedBatchNorm,
    BatchedBatchRenorm,
    BatchNorm,
    BatchRenorm,
    from_nnx,
    to_nnx,
)

both = pytest.mark.parametrize("Layer", [BatchNorm, BatchedBatchNorm])


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def lift(call, *names):
    """`call(model, x, mask)` over leading axes, the last name being that of the outermost."""
    for name in names:
        call = nnx.vmap(call, in_axes=(None, 0, 0), axis_name=name)
    return call


@nnx.jit
def forward(layer, x, mask=None):
    """`BatchNorm` under `nnx.vmap`, `BatchedBatchNorm` as it is."""

    def call(layer, x, mask):
        return layer(x, mask=mask)

    if isinstance(layer, BatchedBatchNorm):
        return call(layer, x, mask)
    return lift(call, layer.axis_name, *([layer.replica_axis_name] if layer.replica_axis_name else []))(layer, x, mask)


def numbers(layer):
    """Variables of no special value, put into `layer`."""
    variables = jax.tree.map(lambda leaf: (1.5 + 0.1 * normal(*leaf.shape)).astype(leaf.dtype), from_nnx(layer))
    to_nnx(variables, layer)
    return variables


# The numbers.


CORRECTING = {"warmup_steps": 0, "r_max_steps": 0, "d_max_steps": 0, "r_max": 1.1, "d_max": 0.2}
CASES = {
    "one": (BatchNorm, {}),
    "batch": (BatchedBatchNorm, {}),
    "cumulative": (BatchNorm, {"momentum": None, "unbiased_running_var": True}),
    "bare": (BatchedBatchNorm, {"use_scale": False, "use_bias": False, "momentum": 0.5}),
    "frozen": (BatchedBatchNorm, {"frozen": True}),
    "renorm": (BatchRenorm, CORRECTING),
    "batched renorm": (BatchedBatchRenorm, CORRECTING),
}


@pytest.mark.parametrize("mask", [None, [1, 1, 0, 0.5, 0, 1]], ids=["whole", "masked"])
@pytest.mark.parametrize(("Layer", "attributes"), CASES.values(), ids=CASES)
def test_the_numbers_of_the_linen_layer(Layer, attributes, mask):
    x, mask = 3 + normal(6, 4, 3), None if mask is None else jnp.array(mask)
    layer = Layer(3, rngs=nnx.Rngs(0), **attributes)
    variables = numbers(layer)
    linen = getattr(vmapbn_flax, Layer.__name__)(**attributes)
    if not attributes.get("use_scale", True):
        variables["params"] = {}

    def nnx_step(layer, x):
        def loss(layer, x):
            y = forward(layer, x, mask)
            return jnp.sum(jnp.sin(y)), y

        (dlayer, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, dx, nnx.to_pure_dict(dlayer), from_nnx(layer)["batch_stats"]

    def linen_step(variables, x):
        def loss(params, x):
            y, stats = oracle.step(linen, {**variables, "params": params}, x, mask)
            return jnp.sum(jnp.sin(y)), (y, stats)

        (dparams, dx), (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
        return y, dx, dparams, stats

    graph, state = nnx.split(layer)

    @quick.jit
    def both(state, variables, x):
        """What training leaves, and the evaluation after it."""
        layer, example = nnx.merge(graph, state), x if issubclass(Layer, BatchedBatchNorm) else x[0]
        got, want = nnx_step(layer, x), linen_step(variables, x)
        evaluated = linen.apply({**variables, "batch_stats": want[3]}, example, train=False)
        return (*got, layer(example, use_running_average=True)), (*want, evaluated)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *both(state, variables, x))


@settings(max_examples=40)
@given(st.data(), st.sampled_from([BatchNorm, BatchedBatchNorm]), st.booleans())
def test_float64_oracle(draw, Layer, masked):
    shape = SHAPES[2]
    x, params, cotangent = draw.draw(data(shape))
    mask = draw.draw(masks(shape[:1])) if masked else np.ones(shape[0], np.float32)
    present = np.broadcast_to((mask > 0).reshape(-1, *(1,) * (x.ndim - 1)), shape)
    x, cotangent = np.where(present, x, np.float32(np.nan)), np.where(present, cotangent, np.float32(0))
    got = measure(Layer, params, x, cotangent, jnp.asarray(mask) if masked else None)
    check(got, oracle.batch_norm(x, cotangent, **params, weights=mask), x, params, cotangent, present, 2e-6)


@partial(quick.jit, static_argnums=0)
def measure(Layer, params, x, cotangent, mask):
    def loss(x, params):
        layer = Layer(x.shape[-1], momentum=0.0, rngs=nnx.Rngs(0))
        to_nnx({"params": params, "batch_stats": from_nnx(layer)["batch_stats"]}, layer)
        y = forward(layer, x, mask)
        return jnp.sum(cotangent * y), (y, layer.mean[...], layer.var[...])

    (dx, dparams), (y, mean, var) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return oracle.Result(y, mean, var, dx, dparams["scale"], dparams["bias"])


def test_masked_examples_and_ghost_batches_which_flax_does_not_have():
    x, mask = normal(2, 4, 3), jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    poisoned = jnp.where(mask[..., None], x, jnp.nan)

    ours = BatchNorm(3, replica_axis_name="group", rngs=nnx.Rngs(0), momentum=0.0)
    y = forward(ours, poisoned, mask)
    want = [oracle.batch_norm(x[i], weights=mask[i]) for i in range(2)]
    assert ours.mean.shape == (3,)
    assert oracle.error(y, np.stack([w.y for w in want]), where=mask[..., None]) < 1e-6
    assert oracle.error(ours.mean[...], np.mean([w.mean for w in want], 0)) < 1e-6

    theirs = nnx.BatchNorm(3, axis_name="batch", rngs=nnx.Rngs(0), momentum=0.0)
    nnx.jit(lift(lambda layer, x, mask: layer(x, mask=mask), "batch"))(theirs, poisoned[0], mask[0])
    assert jnp.all(jnp.isnan(theirs.mean[...]))
    with pytest.raises(ValueError, match="out_axes is None"):
        lift(lambda layer, x, mask: layer(x), "batch", "group")(theirs, x, mask)


def test_only_the_running_statistics_of_complex_numbers_are_complex():
    x = normal(8, 3) + 1j * normal(8, 3, seed=1)
    layer = BatchedBatchNorm(3, dtype=jnp.complex64, momentum=0.0, rngs=nnx.Rngs(0))
    assert jax.tree.map(lambda leaf: str(leaf.dtype), from_nnx(layer)) == {
        "params": {"scale": "float32", "bias": "float32"},
        "batch_stats": {"mean": "complex64", "var": "float32"},
    }
    y = forward(layer, x)
    want = oracle.batch_norm(x)
    for got, exact in ((y, want.y), (layer.mean[...], want.mean), (layer.var[...], want.var)):
        assert oracle.error(got, exact) < 1e-6


# As flax.nnx.


@pytest.mark.parametrize("attributes", [{}, {"use_bias": False}, {"use_scale": False}])
def test_the_variables_and_attributes_of_flax(attributes):
    random = {"scale_init": nnx.initializers.uniform(), "bias_init": nnx.initializers.uniform()}
    ours = BatchedBatchNorm(5, rngs=nnx.Rngs(3), **random, **attributes)
    theirs = nnx.BatchNorm(5, rngs=nnx.Rngs(3), **random, **attributes)
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))
    for name in ("num_features", "use_running_average", "momentum", "epsilon", "dtype", "param_dtype"):
        assert getattr(ours, name) == getattr(theirs, name), name
    x = normal(16, 5)
    for model in (ours, theirs):
        model(x)
        model.eval()
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), nnx.state(ours), nnx.state(theirs))


def test_train_eval_and_view():
    layer, x = BatchedBatchNorm(3, rngs=nnx.Rngs(0)), normal(8, 3)
    layer.eval()
    layer(x)
    assert jnp.all(layer.mean[...] == 0)
    nnx.view(layer, use_running_average=False)(x)
    moved = layer.mean[...]
    assert layer.use_running_average
    assert jnp.all(moved != 0)
    layer(x, use_running_average=False)  # the argument wins
    assert jnp.all(layer.mean[...] != moved)
    layer.train()
    assert not layer.use_running_average


@both
@pytest.mark.parametrize("wrong", [None, "False", 1])
def test_use_running_average_is_a_bool(unchecked, Layer, wrong):
    layer = Layer(3, use_running_average=wrong, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=f"{Layer.__name__}: got use_running_average={wrong!r}; expected True or False"):
        layer(jnp.ones((2, 3)))


def test_errors_are_those_of_the_linen_layer():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(NameError, match="no axis is named 'batch'"):
        layer(jnp.ones(3))
    with pytest.raises(ValueError, match="one value per feature"):
        forward(layer, jnp.ones((1, 3)))


def test_metadata_of_the_parameters():
    layer = BatchNorm(3, scale_metadata={"note": "a"}, bias_metadata={"note": "b"}, rngs=nnx.Rngs(0))
    assert (layer.scale.get_metadata("note"), layer.bias.get_metadata("note")) == ("a", "b")


# Between the libraries.


class Network(nnx.Module):
    """`MLP(hidden=(6, 5), num_classes=3)` in NNX, with any norm, and kernels to be filled."""

    def __init__(self, norm, rngs):
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.dense_0 = linear(4, 6, use_bias=False)
        self.norm_0 = norm(6, rngs=rngs)
        self.dense_1 = linear(6, 5, use_bias=False)
        self.norm_1 = norm(5, rngs=rngs)
        self.logits = linear(5, 3)

    def __call__(self, x):
        x = nnx.sigmoid(self.norm_0(self.dense_0(x)))
        return self.logits(nnx.sigmoid(self.norm_1(self.dense_1(x))))


class Linen(nn.Module):
    """The same with flax.linen's norm."""

    @nn.compact
    def __call__(self, x, train):
        for i, width in enumerate((6, 5)):
            x = nn.Dense(width, use_bias=False, name=f"dense_{i}")(x)
            x = nn.sigmoid(nn.BatchNorm(use_running_average=not train, name=f"norm_{i}")(x))
        return nn.Dense(3, name="logits")(x)


@pytest.mark.parametrize("norm", [BatchNorm, BatchedBatchNorm, nnx.BatchNorm], ids=["ours", "batched", "flax"])
def test_weights_between_all_spellings(norm):
    """Linen ours and flax's, NNX ours and flax's: to NNX, one step, and back; a round trip is exact."""
    x = normal(8, 4)
    network = VmapBatch(MLP(hidden=(6, 5), num_classes=3))
    shapes = jax.eval_shape(partial(Linen().init, train=False), jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(shapes)
    variables = jax.tree.unflatten(tree, [1.5 + 0.1 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])
    model = Network(norm, nnx.Rngs(0))
    to_nnx(variables, model)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(model), variables)

    def call(model, x):
        return model(x)

    if norm is BatchNorm:
        call = nnx.vmap(call, in_axes=(None, 0), axis_name="batch")
    y = nnx.jit(call)(model, x)
    linen = Linen() if norm is nnx.BatchNorm else network
    want, updates = quick.jit(partial(linen.apply, train=True, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    after = from_nnx(model)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6), after["batch_stats"], updates["batch_stats"])
    model.eval()
    for linen in (network, Linen()):
        want = quick.jit(partial(linen.apply, train=False))(after, x)
        np.testing.assert_allclose(nnx.jit(call)(model, x), want, rtol=1e-5, atol=1e-5)
    other = Network(nnx.BatchNorm, nnx.Rngs(1))  # NNX to NNX needs no conversion
    nnx.update(other, nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, from_nnx(other), after)


def test_lists_have_the_names_of_linen():
    class Lists(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), BatchedBatchNorm(3, rngs=rngs)])

    model = Lists(nnx.Rngs(0))
    linen = nn.Sequential((nn.Dense(3), vmapbn_flax.BatchedBatchNorm(train=False)))
    variables = linen.init(jax.random.key(7), jnp.ones((2, 3)))
    to_nnx(variables, model)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(model), variables)


def test_variables_that_do_not_fit_are_named():
    model = Network(BatchNorm, nnx.Rngs(0))
    variables = from_nnx(model)
    wrong = {**variables, "batch_stats": {**variables["batch_stats"], "norm_0": {"mean": jnp.ones(4)}}}
    with pytest.raises(ValueError, match=r"got \(4,\) for batch_stats/norm_0/mean in the variables; the model has \(6"):
        to_nnx(wrong, model)
    del wrong["batch_stats"]["norm_0"]
    with pytest.raises(ValueError, match="got nothing for batch_stats/norm_0/mean"):
        to_nnx(wrong, model)
    del variables["params"]["logits"]
    with pytest.raises(ValueError, match="got nothing for params/logits/"):
        to_nnx(variables, model)


@pytest.mark.slow
def test_the_linen_network_in_nnx():
    """`ToNNX(VmapBatch(...))`: its state is that of the native network."""
    x, network = normal(8, 4), VmapBatch(MLP(hidden=(6, 5), num_classes=3))
    model = nnx.bridge.ToNNX(network, rngs=nnx.Rngs(0)).lazy_init(x, train=False)
    native = Network(BatchNorm, nnx.Rngs(1))
    variables = from_nnx(model)
    to_nnx(variables, native)

    @nnx.jit
    def step(model, x):
        def loss(model):
            y = model(x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), y

        gradients, y = nnx.grad(loss, has_aux=True)(model)
        return y, gradients

    y, gradients = step(model, x)

    def loss(params):
        y, updates = network.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, updates["batch_stats"])

    want, (want_y, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    got = (nnx.to_pure_dict(gradients), y, from_nnx(model)["batch_stats"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, (want, want_y, stats))
    native = nnx.jit(nnx.vmap(lambda model, x: model(x), in_axes=(None, 0), axis_name="batch"))(native, x)
    np.testing.assert_allclose(native, y, rtol=1e-5, atol=1e-5)


def test_the_nnx_layer_in_linen():
    """`ToLinen`: the variables and numbers of the Linen layer."""
    x = 3 + normal(8, 3)
    layer, ours = nnx.bridge.ToLinen(BatchedBatchNorm, args=(3,)), vmapbn_flax.BatchedBatchNorm()
    variables = quick.jit(layer.init)(jax.random.key(0), x)
    jax.tree.map(
        np.testing.assert_array_equal, variables, quick.jit(partial(ours.init, train=False))(jax.random.key(0), x)
    )
    train = quick.jit(partial(ours.apply, train=True, mutable=["batch_stats"]))
    got = quick.jit(partial(layer.apply, mutable=["batch_stats"]))(variables, x)
    want = train(variables, x)
    jax.tree.map(np.testing.assert_array_equal, got, want)

    lifted, mask = VmapBatch(nnx.bridge.ToLinen(BatchNorm, args=(3,))), jnp.arange(8) < 5
    got = quick.jit(partial(lifted.apply, mutable=["batch_stats"]))(variables, x, mask=mask)
    want = train(variables, x, mask=mask)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)
