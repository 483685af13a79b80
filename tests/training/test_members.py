"""Many runs in one program, and one of them alone."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax.training import mesh
from vmapbn_flax.training.members import MemberBytes
from vmapbn_flax.training.metrics import compute, figures
from vmapbn_flax.training.programs import Programs

RATES = (0.01, 0.03, 0.1)
SGD = {"optimizer__name": "sgd", "optimizer__warmup_epochs": 1.0}


def configs(**changes):
    return [small.config(**SGD, seed=seed, optimizer__learning_rate=rate, **changes) for seed, rate in enumerate(RATES)]


def make(members):
    """Of members over as many devices as there are, up to two: three of them are padded to four."""
    for config in members:
        config.mesh.member = 2
    return Programs(members, small.dataset(), mesh.member_mesh(members[0].mesh, len(members)))


@functools.cache
def three():
    return make(configs())


@functools.cache
def alone(number):
    return Programs([configs()[number]], small.dataset())


def trained(programs, steps=5):
    return programs.advance(programs.create(), 0, steps)


def test_each_member_is_its_run():
    programs = three()
    assert programs.count == 3
    state = trained(programs)
    members, measured = programs.split(state), programs.measure(state)
    assert len(members) == 3
    for number, member in enumerate(members):
        run = alone(number)
        expected = trained(run)
        small.assert_same_bits(member, expected)  # a CPU computes one member after the other
        np.testing.assert_allclose(figures(measured[number])["test_loss"], run.evaluate(expected)["test_loss"], 1e-5)
        assert programs.learning_rates(4)[number] == run.learning_rates(4)[0]


def test_states_are_replaced_in_place():
    """The program has the states of all members once; what it needs beside them is of one member."""
    programs = make([config for config in configs() for _ in range(20)])
    programs.compile_ahead(0)
    memory = programs.compiler["train"].memory_analysis()  # of one device
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 2


def test_gradients_and_population_statistics_are_each_member_s():
    programs = three()
    state = trained(programs)
    found = programs.split((programs.gradients(state, 5), programs.population_statistics(state)))
    for number, member in enumerate(found):
        run, own = alone(number), programs.split(state)[number]
        small.assert_close(member, (run.gradients(own, 5), run.population_statistics(own)))


def test_a_group_of_one_is_a_run():
    """Its arrays have no axis of members, and its bits are the run's."""
    config = configs()[1]
    programs, run = Programs([config], small.dataset(), mesh.member_mesh(config.mesh, 1)), alone(1)
    assert programs.count == 1
    assert programs.template() == run.template()
    state = trained(programs)
    small.assert_same_bits(programs.snapshot(state), trained(run))
    small.assert_same_bits(programs.split(state), [trained(run)])
    assert programs.measure(state) == [run.measure(trained(run))[0]]


def test_saved_form():
    """That of the template, without padding, and what `place` makes a state of; rows beyond are ignored."""
    programs = three()
    state = trained(programs)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {4}
    saved = programs.snapshot(state)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), programs.template())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), saved) == shapes
    assert {leaf.shape[0] for leaf in jax.tree.leaves(saved)} == {3}
    for again in (saved, jax.tree.map(lambda leaf: np.append(leaf, leaf[:2] + 1, axis=0), saved)):
        small.assert_same_bits(programs.place(again), state)
    for number, member in enumerate(programs.split(state)):
        small.assert_same_bits(member, small.member(number, saved))


@pytest.mark.parametrize("programs", [three, functools.partial(alone, 0)])
def test_what_is_read_stays_when_training_goes_on(programs):
    programs = programs()
    state = trained(programs)
    read = programs.snapshot(state), programs.split(state), programs.split(state.batch_stats)
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(read))
    before = jax.tree.map(np.array, read)
    programs.advance(state, 5, 1)
    small.assert_same_bits(read, before)


def test_split_is_each_member_s():
    programs = three()
    state = programs.fresh_metrics(trained(programs))
    state = programs.advance(state, 5, 1)
    counters = programs.split((state.step, state.skipped_steps, state.skipped_in_a_row))
    assert counters == 3 * [(6, 0, 0)]
    losses = [compute(metrics)["loss"] for metrics in programs.split(state.metrics)]
    assert len(set(losses)) == 3
    assert [metrics.loss.count for metrics in programs.split(state.metrics)] == 3 * [small.BATCH]


def test_other_members_of_the_same_programs():
    """Compiled once; each set of members trains as if the other had not been."""
    others = [config.copy_and_resolve_references() for config in configs()]
    for config in others:
        config.seed += 10
    programs = three()
    first = programs.snapshot(trained(programs))
    programs.set_members(others)
    state = trained(programs)
    assert programs.compiler.compile_seconds == 0
    small.assert_same_bits(programs.snapshot(state), make(others).snapshot(trained(make(others))))
    programs.set_members(configs())
    small.assert_same_bits(programs.snapshot(trained(programs)), first)


@pytest.mark.parametrize(("data", "at_once"), [(1, 2), (2, 6)])
def test_the_memory_of_a_group(data, at_once):
    """Of six members on two places: a CPU device computes its members in turn, unless their batches are divided."""
    config = small.config(mesh__member=2, mesh__data=data)
    devices = mesh.member_mesh(config.mesh, 6)
    assert MemberBytes(state=10, activations=1000).of_group(6, devices) == 6 * 10 + at_once * 1000
