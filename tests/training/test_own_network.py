"""A network of one's own, `configs/own_network.py`, wherever and however it trains: the numbers of the plain run."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import own_network
from tests.helpers import small
from tests.helpers.quick import jit
from vmapbn_flax.networks import choose_network
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm
from vmapbn_flax.training import mesh
from vmapbn_flax.training.members import member_bytes
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.steps import make_loss

quick = pytest.mark.usefixtures("compiled_quickly")

NAME = f"{__name__}:Net"
SGD = {"optimizer__name": "sgd", "optimizer__warmup_epochs": 0.0}


class Net(own_network.Net):
    """For the images of 3 x 4 pixels, whose halves are 1 x 2."""

    width: int = 3

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = self.norm(name="first")(nn.Conv(self.width, (3, 3), use_bias=False)(x), train=train, mask=mask)
        x = self.norm(name="a_second")(nn.Conv(4, (2, 2))(nn.relu(x)), train=train, mask=mask)
        x = nn.Dropout(0.5 if self.width == 2 else 0.0, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="logits")(nn.relu(x).mean((-3, -2)))


class BatchedNet(Net):
    norm: type[nn.Module] = BatchedBatchNorm


def config(**changes):
    found = small.config()
    choose_network(found, NAME)
    fields = SGD | {"model__width": 3} | changes
    found.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return found


def make(*configs, devices=None, streamed=False):
    return Programs(list(configs), dataclasses.replace(small.dataset(), streamed=streamed), devices)


def trained(programs, steps=((0, 6), (6, 4))):
    state = programs.create()
    for step, count in steps:
        state = programs.advance(state, step, count)
    return programs.split(state)


@functools.cache
def plain():
    return make(config())


@pytest.mark.slow
def test_the_same_bits_in_parts_and_streamed():
    in_memory = make(config())
    (whole,), (parts,) = trained(in_memory), trained(in_memory, [(0, 5), (5, 1), (6, 3), (9, 1)])
    small.assert_same_bits(parts, whole)
    streamed = make(config(data__memory_limit=4.1 * small.BATCH * (small.FEATURES + 4) / 1e9), streamed=True)
    (read,) = trained(streamed)
    small.assert_same_bits(read, whole)
    assert streamed.evaluate(jax.device_put(read)) == in_memory.evaluate(jax.device_put(whole))
    streamed.close()


@quick
@pytest.mark.parametrize("limit", [0, pytest.param(2**30, marks=pytest.mark.slow)])
def test_on_many_devices(limit):
    """A batch of 16 over 3 devices, which hold all images or a share of each."""
    split = config(mesh__data=3, mesh__replicate_limit=limit)
    programs = make(split, devices=mesh.solo_mesh(split.mesh))
    (whole,), (got,) = trained(plain()), trained(programs)
    small.assert_close(got, whole)
    statistics = programs.population_statistics(programs.place(whole))
    small.assert_close(statistics, plain().population_statistics(jax.device_put(whole)))


@quick
def test_members_of_a_sweep():
    configs = [config(seed=seed, optimizer__learning_rate=rate) for seed, rate in ((0, 1e-2), (1, 1e-2), (0, 1e-1))]
    for member, alone in zip(trained(make(*configs)), configs, strict=True):
        small.assert_close(member, trained(make(alone))[0])


@quick
def test_the_batched_twin():
    small.assert_close(trained(make(config(model__norm="batched")))[0], trained(plain())[0])


@quick
def test_ghost_batches_are_groups_of_their_own():
    ghost, state = config(model__ghost_batch_size=4), plain().create()
    losses = [jit(make_loss(each.model, small.CLASSES)) for each in (ghost, config())]
    batch, hyper = small.batch(), small.hyper(ghost)
    arguments = (state.params, state.batch_stats, hyper)
    got, (logits, _, stats) = losses[0](*arguments, batch, state.step)
    groups = [jax.tree.map(lambda leaf: leaf[i : i + 4], batch) for i in range(0, 16, 4)]  # noqa: B023
    each = [losses[1](*arguments, group, state.step) for group in groups]
    np.testing.assert_allclose(got, np.mean([loss for loss, _ in each]), rtol=1e-6)
    small.assert_close(logits, jnp.concatenate([logits for _, (logits, _, _) in each]))
    small.assert_close(stats, small.mean([stats for _, (_, _, stats) in each]))


def test_dropout_has_the_same_bits_in_parts():
    dropping = make(config(model__width=2))
    (whole,), (parts,) = trained(dropping), trained(dropping, [(0, 5), (5, 1), (6, 4)])
    small.assert_same_bits(parts, whole)


@quick
def test_dropout_differs_from_step_to_step():
    dropping = make(config(model__width=2))
    state = dropping.create()
    first, second = (dropping.gradients(state.replace(step=jnp.int32(step)), 0)[0] for step in (0, 1))
    assert not np.allclose(first, second)


@quick
def test_population_statistics_by_hand():
    """Layer by layer, in the order of calls, which is not that of names: over spatial positions too, in float64."""
    (state,) = trained(plain())
    stats = plain().population_statistics(jax.device_put(state))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    x = small.dataset().train.images[..., np.newaxis] / 255
    for conv, norm in (("Conv_0", "first"), ("Conv_1", "a_second")):
        x = convolved(x, params[conv]["kernel"]) + params[conv].get("bias", 0)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        np.testing.assert_allclose(stats[norm]["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats[norm]["var"], var, rtol=1e-5)
        x = (x - mean) / np.sqrt(var + np.float64(np.float32(1e-5))) * params[norm]["scale"] + params[norm]["bias"]
        x = np.maximum(x, 0)


def convolved(x, kernel):
    """A convolution with zeros around, `(batch, height, width, in)` with `(rows, columns, in, out)`."""
    rows, columns = kernel.shape[:2]
    padded = np.pad(x, ((0, 0), ((rows - 1) // 2, rows // 2), ((columns - 1) // 2, columns // 2), (0, 0)))
    height, width = x.shape[1:3]
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(rows) for j in range(columns))


@pytest.mark.slow
def test_computation_in_bfloat16():
    """Parameters, statistics and the optimizer's state stay in float32; logits are off by rounding to 8 bits."""
    half = make(config(model__dtype="bfloat16"))
    state = half.create()
    small.assert_same_bits(state, plain().create())
    logits, grads = half.gradients(state, 0)
    expected, expected_grads = plain().gradients(state, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, grads))} == {np.dtype(np.float32)}
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 3e-2
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.abs(a - b).max() < 0.1 * max(np.abs(b).max(), 0.05)
    (after,) = trained(half)
    floats = [leaf.dtype for leaf in jax.tree.leaves(after) if np.issubdtype(leaf.dtype, np.floating)]
    assert set(floats) == {np.dtype(np.float32)}
    assert 0 < half.evaluate(jax.device_put(after))["test_loss"] < 2


def test_the_memory_of_a_member_grows_with_its_activations():
    narrow, wide = (
        member_bytes(config(model__width=width, train__batch_size=64), small.dataset()) for width in (3, 30)
    )
    assert 3 < wide.activations / narrow.activations < 30
