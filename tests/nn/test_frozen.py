"""`frozen`: layers that train by their running statistics, and leave them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import quick
from tests.helpers.oracle import error, step
from vmapbn_flax import BatchedBatchNorm, BatchedBatchRenorm, BatchNorm, BatchRenorm, VmapBatch

LAYERS = [BatchNorm, BatchedBatchNorm, BatchRenorm, BatchedBatchRenorm]
every = pytest.mark.parametrize("Layer", LAYERS)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def variables(layer, features=3):
    vs = quick.jit(partial(layer.init, train=False))(jax.random.key(0), jnp.ones((2, features)))
    vs["params"] = {"scale": 1 + normal(features, seed=1), "bias": normal(features, seed=2)}
    vs["batch_stats"] |= {"mean": normal(features, seed=3), "var": 0.5 + normal(features, seed=4) ** 2}
    return vs


@every
@pytest.mark.parametrize("momentum", [0.9, None])
def test_an_affine_map_of_each_example(Layer, momentum):
    """Its output and gradients; the statistics keep their bits."""
    layer = Layer(frozen=True, momentum=momentum)
    vs, x, g = variables(layer), normal(5, 4, 3), normal(5, 4, 3, seed=5)
    params, stats = vs["params"], vs["batch_stats"]

    def loss(x, params):
        y, new = step(layer, {"params": params, "batch_stats": stats}, x)
        return jnp.sum(g * y), (y, new)

    (dx, dparams), (y, new) = quick.jit(jax.grad(loss, (0, 1), has_aux=True))(x, params)
    inverse = 1 / np.sqrt(np.float64(stats["var"]) + 1e-5)
    normalised = (np.float64(x) - stats["mean"]) * inverse
    assert error(y, normalised * params["scale"] + params["bias"], relative=True) < 1e-6
    assert error(dx, g * inverse * params["scale"], relative=True) < 1e-6
    assert error(dparams["scale"], (g * normalised).sum((0, 1)), relative=True) < 1e-6
    assert error(dparams["bias"], g.sum((0, 1)), relative=True) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, new, stats)


@every
def test_training_is_evaluation_and_needs_neither_axis_nor_batch(Layer):
    layer = Layer(frozen=True)
    vs, x = variables(layer), normal(1, 3)
    y, _ = layer.apply(vs, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, layer.apply(vs, x, train=False))


def test_a_mask_changes_nothing():
    layer = VmapBatch(BatchNorm(frozen=True))
    vs, x = variables(layer), normal(6, 3)
    masked, _ = layer.apply(vs, x, train=True, mask=jnp.arange(6) < 4, mutable=["batch_stats"])
    y, _ = layer.apply(vs, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(masked[:4], y[:4])


def test_an_axis_need_not_be_named():
    """Statistics that do not move cannot differ along it."""
    x = normal(2, 4, 3)
    for frozen in (True, False):
        layer = VmapBatch(BatchNorm(frozen=frozen), axis_name=("group", "batch"))
        vs = variables(BatchNorm())
        if frozen:
            y, _ = layer.apply(vs, x, train=True, mutable=["batch_stats"])
            np.testing.assert_array_equal(y, layer.apply(vs, x, train=False))
        else:
            with pytest.raises(ValueError, match="expected it to name 'group' too"):
                layer.apply(vs, x, train=True, mutable=["batch_stats"])


def test_one_layer_of_two():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            x = BatchNorm(frozen=True, name="frozen")(x, train=train, mask=mask)
            return BatchNorm(name="moving")(nn.relu(x), train=train, mask=mask)

    model, x = VmapBatch(Net()), normal(8, 3)
    vs = quick.jit(partial(model.init, train=True))(jax.random.key(0), x)
    _, updates = quick.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(vs, x)
    before, after = vs["batch_stats"], updates["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], before["frozen"])
    assert not np.any(after["moving"]["mean"] == before["moving"]["mean"])
