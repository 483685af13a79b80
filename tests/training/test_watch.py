"""`train.watch`: percentiles of what layers give, against numpy's of activations computed apart."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax import MLP, BatchedMLP, BatchNorm, VmapBatch
from vmapbn_flax.errors import UsageError
from vmapbn_flax.networks import choose_network
from vmapbn_flax.nn import BatchedBatchNorm
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.watch import percentile_figures

WATCH = ("pre_activation_0", "dense_0[4]", "norm_0[0]")
OWN = "tests.training.test_watch:Tower"


def config(**changes):
    changes = {"train__watch": WATCH, "train__eval_batch_size": 20} | changes
    return small.config(**changes)


def started(programs):
    """A state before the first step, whose statistics are not those that normalise nothing."""
    state = programs.create()
    return state.replace(batch_stats=jax.tree.map(lambda x: x + 0.3, state.batch_stats))


def first_images(count):
    return small.dataset().test.images[:count].astype(np.float32) / 255


def by_numpy(state, norm, count=20):
    """The percentiles of the MLP's layers over the first test images."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    network = MLP((6,), small.CLASSES, norm=BatchNorm)
    model = {"vmap": VmapBatch(network), "batched": BatchedMLP((6,), small.CLASSES, norm=BatchedBatchNorm)}[norm]
    _, kept = model.apply(
        jax.device_get(variables),
        jnp.asarray(first_images(count).reshape(count, -1)),
        train=False,
        capture_intermediates=True,
    )
    kept = kept["intermediates"]
    outputs = (kept["norm_0"]["__call__"][0], kept["dense_0"]["__call__"][0][:, 4], kept["norm_0"]["__call__"][0][:, 0])
    return {name: np.percentile(x, np.arange(101)) for name, x in zip(WATCH, outputs, strict=True)}


def assert_close(got, expected):
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("norm", ["vmap", "batched"])
def test_percentiles_are_numpys(norm):
    programs = Programs([config(model__norm=norm)], small.dataset())
    state = started(programs)
    (got,) = programs.watch(state)
    assert_close(got, by_numpy(state, norm))
    figures = percentile_figures(got)
    assert figures["dense_0[4]_p85"] == pytest.approx(by_numpy(state, norm)["dense_0[4]"][85], rel=1e-5)
    assert len(figures) == 9


def test_all_test_examples_where_there_are_fewer():
    programs = Programs([config(train__eval_batch_size=50)], small.dataset())
    state = started(programs)
    assert_close(programs.watch(state)[0], by_numpy(state, "vmap", count=37))


def test_streamed():
    dataset = dataclasses.replace(small.dataset(), streamed=True)
    programs = Programs([config()], dataset)
    state = started(programs)
    assert_close(programs.watch(state)[0], by_numpy(state, "vmap"))
    programs.close()


def test_examples_over_devices():
    """20 examples on 3 devices are padded."""
    settings = config(mesh__data=3)
    programs = Programs([settings], small.dataset(), mesh.solo_mesh(settings.mesh))
    state = started(programs)
    assert_close(programs.watch(state)[0], by_numpy(jax.device_get(state), "vmap"))


def test_members_over_devices():
    """Three members on two devices."""
    configs = [config(seed=seed) for seed in range(3)]
    configs[0].mesh.member = 2
    programs = Programs(configs, small.dataset(), mesh.member_mesh(configs[0].mesh, 3))
    state = started(programs)
    for got, own in zip(programs.watch(state), programs.split(state), strict=True):
        assert_close(got, by_numpy(own, "vmap"))


class Cell(nn.Module):
    """Called twice, with positions."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="inner")(x)


class Tower(nn.Module):
    """A network of one's own: a nested layer that is called twice, and one that gives no array."""

    num_classes: int
    norm: type | None = BatchNorm

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        cell = Cell(name="cell")
        x = cell(cell(nn.Dense(3, name="first")(x)))
        self.sow("intermediates", "total", x.sum((0, 1)))
        return nn.Dense(self.num_classes, name="last")(x.reshape(-1))


def test_layers_of_ones_own():
    """By path; both calls and all positions count."""
    watch = ("cell/inner[1]", "total")
    settings = config(model__norm="none", train__watch=watch)
    choose_network(settings, OWN)
    programs = Programs([settings], small.dataset())
    state = programs.create()
    (got,) = programs.watch(state)
    params = jax.device_get(state.params)
    x, calls = first_images(20)[..., np.newaxis] @ params["first"]["kernel"] + params["first"]["bias"], []
    for _ in range(2):
        x = x @ params["cell"]["inner"]["kernel"] + params["cell"]["inner"]["bias"]
        calls.append(x[..., 1])
    expected = (np.concatenate(calls), x.sum((1, 2)))
    assert_close(got, {name: np.percentile(y, np.arange(101)) for name, y in zip(watch, expected, strict=True)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dense_1", "got 'dense_1', which the network does not have; expected one of .*dense_0.*pre_activation_0"),
        ("dense_0[6]", r"got 'dense_0\[6\]', expected a unit from 0 to 5, the last axis of dense_0"),
    ],
)
def test_what_the_network_does_not_have(name, message):
    with pytest.raises(UsageError, match=rf"^config\.train\.watch: {message}.*--config\.train\.watch=\.\.\.$"):
        Programs([config(train__watch=(name,))], small.dataset())


def test_nothing_is_compiled_where_nothing_is_watched(monkeypatch):
    programs = Programs([config(train__watch=())], small.dataset())
    state = programs.create()
    monkeypatch.setattr(programs.compiler, "call", None)
    assert programs.watch(state) == [{}]
