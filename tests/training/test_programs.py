import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from tests.training.test_own_network import convolved
from vmapbn_flax.data import Dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.networks import choose_network
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.steps import Batch, epoch_permutation, make_loss


def test_counts():
    programs = small.programs()
    assert (programs.steps_per_epoch, programs.total_steps) == (6, 24)  # 100 examples in batches of 16, 4 epochs
    assert small.programs(train__num_epochs=2.5).total_steps == 15


def test_config_that_does_not_fit_the_data():
    with pytest.raises(UsageError, match=r"config\.train\.batch_size: got 101"):
        Programs([small.config(train__batch_size=101)], small.dataset())


def test_template_is_the_state_s_shapes():
    programs = small.programs()
    state = programs.create()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), programs.template())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes


def test_more_memory_than_there_is():
    """An error at once, of what would keep the first step waiting for ever."""
    programs = Programs([small.config(model__hidden=(10**12,))], small.dataset())
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        programs.create()


def test_advance_uses_its_state_up():
    state = small.programs().create()
    small.programs().advance(state, 0, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_advance_over_the_end_of_an_epoch():
    """Each epoch in its own order, as a streamed data set has it too."""
    programs = small.programs()
    small.assert_same_bits(small.advanced(programs, 9), small.advanced(programs, 6, 3))


def test_gradients_are_those_of_the_step_s_batch():
    programs, train = small.programs(), small.dataset().train
    state, step = programs.create(), 9
    logits, grads = programs.gradients(state, step)
    rows = epoch_permutation(0, 1, len(train))[3 * small.BATCH : 4 * small.BATCH]
    batch = Batch(jnp.array(train.images[rows]), jnp.array(train.labels[rows]))
    expected, (expected_logits, _, _) = jax.jit(jax.grad(make_loss(small.config().model, small.CLASSES), has_aux=True))(
        state.params, state.batch_stats, programs.hyper, batch, state.step
    )
    small.assert_close((logits, grads), (expected_logits, expected))
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_vmapped_and_batched_are_one_program():
    """Not merely close: the compiler comes to the same instructions, but for their names."""
    vmapped, batched = (_instructions(small.config(model__norm=norm)) for norm in ("vmap", "batched"))
    assert vmapped == batched
    assert _instructions(small.config(model__norm="none")) != batched


def _instructions(config):
    """The compiled training steps, named in the order they appear in."""
    programs = Programs([config], small.dataset())
    programs.compile_ahead(0)
    text = programs.compiler["train"].as_text()
    text = text[text.index("\n%") :]  # after the table of source lines
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    text = re.sub(r"(?m)^(%\S+) \(.*$", r"\1", text)  # the names of parameters
    names = {}
    return re.sub(r"%[\w.-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), text).splitlines()


def test_compiled_ahead():
    """Nothing is compiled twice, and a program is waited for where it is needed before it is ready."""
    programs = Programs([small.config()], small.dataset(validation_size=20))
    state = programs.create()
    programs.compile_measure_ahead()
    ahead = dict(programs.compiler._programs)
    assert ahead.keys() == {"create", "validation", "test"}
    figures = programs.evaluate(state)
    programs.compile_measure_ahead()
    assert programs.compiler._programs == ahead
    assert figures == Programs([small.config()], small.dataset(validation_size=20)).evaluate(state)


def test_validation_split_selects():
    data = small.dataset()
    validation = small.split(21, seed=3)
    config = small.config(model__norm="none")
    programs = Programs([config], dataclasses.replace(data, validation=validation))
    state = programs.create()
    figures = programs.evaluate(state)
    assert programs.selection == "validation_accuracy"
    assert (figures["validation_count"], figures["test_count"]) == (21, 37)
    names = {f"{split}_{name}" for split in ("validation", "test") for name in ("loss", "accuracy", "count")}
    assert figures.keys() == names
    swapped = Programs([config], Dataset("swapped", small.CLASSES, data.train, validation))
    assert swapped.selection == "test_accuracy"
    for name in ("loss", "accuracy"):
        assert swapped.evaluate(state)[f"test_{name}"] == figures[f"validation_{name}"]


def test_learning_rate_of_a_step():
    config = small.config(optimizer__warmup_epochs=1.0, model__norm="none")
    programs = Programs([config], small.dataset())
    rates = [programs.learning_rates(step) for step in (0, 3, 6, 15)]
    np.testing.assert_allclose(rates, [[0], [0.005], [0.01], [0.005]], rtol=1e-6)  # cosine: half way down half way on


def test_population_statistics_by_hand():
    programs = small.programs()
    state = programs.advance(programs.create(), 0, 3)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    images = small.dataset().train.images.reshape(100, -1) / 255
    x = images @ params["dense_0"]["kernel"]
    stats = programs.population_statistics(state)
    assert stats.keys() == {"norm_0"}
    np.testing.assert_allclose(stats["norm_0"]["mean"], x.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stats["norm_0"]["var"], x.var(0), rtol=1e-5)


def test_each_program_is_compiled_once():
    programs = small.programs()
    state = programs.create()
    programs.evaluate(state)
    compiled = programs.compiler.compile_seconds
    assert compiled > 0
    for step in (0, 6):
        state = programs.advance(state, step, 6)
        programs.evaluate(state)
    assert programs.compiler.compile_seconds == compiled


@pytest.mark.parametrize("devices", [1, 2])
def test_statistics_over_positions_are_exact(devices):
    """Of 100,352 numbers a feature: as compiled for a run, against float64."""
    config, split = (
        small.config(train__batch_size=128, train__num_epochs=1.0, mesh__data=devices),
        small.mnist().train[:128],
    )
    choose_network(config, "conv")
    config.update_from_flattened_dict({"model.features": (3,), "model.batch_norm_momentum": 0.0})
    programs = Programs([config], Dataset("first", 10, split, split), mesh.solo_mesh(config.mesh))
    state = programs.create()
    x = convolved(split.images[..., np.newaxis] / 255, np.asarray(state.params["conv_0"]["kernel"], np.float64))
    stats = programs.advance(state, 0, 1).batch_stats["norm_0"]
    np.testing.assert_allclose(stats["mean"], x.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats["var"], x.var((0, 1, 2)), rtol=2e-6)
