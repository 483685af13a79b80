"""Runs on meshes of up to 8 devices, into which `conftest.py` divides the CPU."""

import dataclasses
import functools
import os
import re

import jax
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax import default_config
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs.checkpoints import Checkpoints, restore
from vmapbn_flax.training import mesh
from vmapbn_flax.training.layout import InBatches
from vmapbn_flax.training.programs import Programs

pytestmark = pytest.mark.usefixtures("compiled_quickly")

STEPS = 50
HIDDEN = (6, 5)
PARAMETERS = 12 * 6 + 2 * 6 + 6 * 5 + 2 * 5 + (5 * 4 + 4)
# Adam, which shows more than SGD: it makes steps of full size even of a gradient that is rounding alone.
CHANGES = {"train__num_epochs": 20.0, "model__hidden": HIDDEN}
GHOSTS = {"train__batch_size": 24, "model__ghost_batch_size": 8}  # three groups


@functools.cache
def make(devices, **changes):
    config = small.config(**CHANGES | {"mesh__data": devices} | changes)
    return Programs([config], small.dataset(), mesh.solo_mesh(config.mesh))


@functools.cache
def first_state():
    """Of all these runs with batch norm; on the host."""
    return jax.tree.map(np.array, make(1).create())


@functools.cache
def trained(devices, **changes):
    """The losses of 50 steps, and parameters, statistics and evaluation after them."""
    programs = make(devices, **changes)
    return train_on(programs, programs.place(first_state()), 0)


def train_on(programs, state, first):
    losses = []
    for step in range(first, STEPS):
        state = programs.advance(programs.fresh_metrics(state), step, 1)
        losses.append(state.metrics.loss.total / state.metrics.loss.count)
    figures, state = programs.evaluate(state), jax.device_get(state)
    return {"losses": np.array(losses), "params": state.params, "stats": state.batch_stats, "figures": figures}


def assert_equal(got, expected, rtol):
    """Equal, relative to the largest of each array, or to 0.1 where all of it is as close to zero as rounding is."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 0.1), (jax.tree_util.keystr(path), a, b)


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_same_numbers(devices):
    assert_equal(trained(devices), trained(1), 1e-5)


@pytest.mark.slow
def test_same_numbers_with_the_default_config():
    """What README states. Some pixels are black in nearly all images, and Adam enlarges their weights' rounding."""

    def train(devices, state=None):
        config = default_config()
        config.mesh.data = devices
        programs = Programs([config], small.mnist(), mesh.solo_mesh(config.mesh))
        state = jax.device_get(programs.create()) if state is None else state
        return state, train_on(programs, programs.place(state), 0)

    state, expected = train(1)
    _, got = train(8, state)
    assert_equal(got.pop("params"), expected.pop("params"), 3e-5)
    assert_equal(got, expected, 1e-6)


@pytest.mark.parametrize(("devices", "size"), [(4, 18), pytest.param(8, 5, marks=pytest.mark.slow)])
def test_batches_that_do_not_divide(devices, size):
    assert_equal(trained(devices, train__batch_size=size), trained(1, train__batch_size=size), 1e-5)


@pytest.mark.parametrize(
    ("devices", "norm"),
    [
        (2, "vmap"),
        (3, "vmap"),
        pytest.param(8, "vmap", marks=pytest.mark.slow),
        pytest.param(3, "batched", marks=pytest.mark.slow),
    ],
)
def test_ghost_batches(devices, norm):
    """The same groups on 3 devices, which divide them, and on 2 and 8, which do not."""
    assert_equal(trained(devices, **GHOSTS, model__norm=norm), trained(1, **GHOSTS), 2e-6)


def test_data_set_of_which_each_device_holds_a_share():
    """5 devices: 12 features and 16 examples are padded to 15 and 20."""
    programs = make(5, mesh__replicate_limit=0)
    images, _ = programs._feed.whole["train"]
    assert {shard.data.shape for shard in images.addressable_shards} == {(100, 3)}
    assert_equal(trained(5, mesh__replicate_limit=0), trained(1), 1e-5)
    state, whole = programs.place(first_state()), make(1).place(first_state())
    assert_equal(programs.population_statistics(state), make(1).population_statistics(whole), 1e-6)
    logits, grads = programs.gradients(state, 3)
    assert logits.shape == (small.BATCH, small.CLASSES)
    assert_equal((logits, grads), make(1).gradients(whole, 3), 1e-5)


@pytest.mark.parametrize(
    ("devices", "changes"),
    [(4, {"train__batch_size": 18}), (2, GHOSTS), pytest.param(8, {}, marks=pytest.mark.slow)],
)
def test_streamed_data_set(devices, changes):
    """Windows of two batches, of which each device holds its share; batches and ghosts that do not divide."""
    limit = 4.1 * (changes.get("train__batch_size", small.BATCH) * (small.FEATURES + 4)) / 1e9
    config = small.config(**CHANGES | changes, mesh__data=devices, data__memory_limit=limit, train__eval_batch_size=5)
    programs = Programs([config], dataclasses.replace(small.dataset(), streamed=True), mesh.solo_mesh(config.mesh))
    assert_equal(train_on(programs, programs.place(first_state()), 0), trained(1, **changes), 1e-5)
    images, labels, _, _ = programs._feed.position(0)
    padded = programs.layout.padded(config.train.batch_size, config.model.ghost_batch_size or 1)
    assert {shard.data.shape for shard in images.addressable_shards} == {(2, padded // devices, *small.IMAGE)}
    assert {shard.data.shape for shard in labels.addressable_shards} == {(2, padded // devices)}
    counts = [] if padded == config.train.batch_size else COUNTS
    if changes is GHOSTS:
        assert collectives(programs)[1:] == counts
    else:
        assert_norm_collectives(collectives(programs), counts)
    programs.close()


def test_what_a_process_reads(monkeypatch):
    """Of four with two devices each: the second, the last and the first. Padding is nobody's to read."""
    layout = InBatches(mesh.solo_mesh(small.config(mesh__data=8).mesh))
    batches = np.arange(2 * 14).reshape(2, 14)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    np.testing.assert_array_equal(layout.share(batches), [[4, 5, 6, 7], [18, 19, 20, 21]])
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    np.testing.assert_array_equal(layout.share(batches), [[12, 13, -1, -1], [26, 27, -1, -1]])
    np.testing.assert_array_equal(layout.share(batches, group=7), np.full((2, 14), -1))
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    np.testing.assert_array_equal(layout.share(batches, group=7), batches)


def test_small_data_set_lies_whole_on_each_device():
    images, labels = make(8)._feed.whole["train"]
    assert images.sharding.is_fully_replicated
    assert labels.sharding.is_fully_replicated


def test_evaluation_counts_each_example_once():
    """37 examples, in batches of 5 and 7, which become 8 and 8."""
    expected = make(1).evaluate(make(1).place(first_state()))
    assert expected["test_count"] == 37
    for devices, size in ((8, 5), (2, 7)):
        programs = make(devices, train__eval_batch_size=size)
        figures = programs.evaluate(programs.place(first_state()))
        assert figures["test_count"] == 37
        assert_equal(figures, expected, 1e-6)


KINDS = "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def collectives(programs, name="train"):
    """Each collective in a compiled program: its kind, and the type and number of elements that it moves."""
    found = []
    for line in programs.compiler[name].as_text().splitlines():
        if match := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(size) for size in shape.split(",") if size])) for _, shape in shapes]
            found.append((match[2], shapes[0][0], sum(sizes)))
    return found


# The gradients but those of the norms' biases, which the backward pass has summed already; the loss, its sum and the
# number of right answers.
GRADIENTS = PARAMETERS - sum(HIDDEN) + 3
# Where examples are masked, the numbers of them: in the loss, its metrics, the layers.
COUNTS = [("all-reduce", "s32", 3), ("all-reduce", "f32", 2)]


def assert_norm_collectives(found, counts=()):
    """Of a layer of F features: its means, F, and then variances and corrections, 2F; in the backward pass 2F.

    One message more has the gradients. Some of them travel with the norms' sums, as the compiler likes.
    """
    forward = [("all-reduce", "f32", n) for width in HIDDEN for n in (width, 2 * width)]
    backward = found[len(forward) : len(found) - len(counts)]
    assert found[: len(forward)] == forward
    assert [message[:2] for message in backward] == [("all-reduce", "f32")] * (len(HIDDEN) + 1)
    assert sum(size for _, _, size in backward) == 2 * sum(HIDDEN) + GRADIENTS
    assert found[len(found) - len(counts) :] == list(counts)


@pytest.mark.parametrize("norm", ["vmap", pytest.param("batched", marks=pytest.mark.slow)])
def test_collectives_of_a_step(norm):
    programs = make(8, model__norm=norm)
    programs.advance(programs.place(first_state()), 0, 1)
    assert_norm_collectives(collectives(programs))


def test_the_first_state_is_made_everywhere():
    programs = make(8)
    small.assert_same_bits(programs.create(), first_state())
    assert collectives(programs, "create") == []


def test_collectives_of_a_padded_step():
    trained(4, train__batch_size=18)
    assert_norm_collectives(collectives(make(4, train__batch_size=18)), COUNTS)


def test_collectives_without_a_norm():
    programs = make(8, model__norm="none")
    programs.advance(programs.create(), 0, 1)
    assert collectives(programs) == [("all-reduce", "f32", PARAMETERS - sum(HIDDEN) + 3)]


def test_ghost_batches_are_normalised_without_a_collective():
    """One for everything: the gradients, and beside them the means and variances of the running statistics."""
    trained(3, **GHOSTS)
    assert collectives(make(3, **GHOSTS)) == [("all-reduce", "f32", PARAMETERS + 3 + 2 * sum(HIDDEN))]
    trained(2, **GHOSTS)
    assert collectives(make(2, **GHOSTS))[0] == ("all-reduce", "f32", PARAMETERS + 3 + 2 * sum(HIDDEN))
    assert collectives(make(2, **GHOSTS))[1:] == COUNTS


def test_collectives_of_a_divided_data_set():
    """One more: it moves as many bytes as a batch has, padded from 16 to 20 examples of 15 features."""
    trained(5, mesh__replicate_limit=0)
    images, *rest = collectives(make(5, mesh__replicate_limit=0))
    assert images == ("all-to-all", "u8", 20 * 15 // 5)  # of each device
    assert_norm_collectives(rest, COUNTS)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 2)])
def test_restored_on_another_count(tmp_path, before, after):
    """A checkpoint of step 20 continues with the same batches."""
    programs, state = make(before), make(before).place(first_state())
    for step in range(20):
        state = programs.advance(state, step, 1)
    saved = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(20, programs.snapshot(state), {"runs": []})
    checkpoints.close()
    metadata = (tmp_path / "20" / "state" / "_METADATA").read_text()
    assert set(re.findall(r'"value_type": "([\w.]+)"', metadata)) == {"np.ndarray"}  # nothing of the devices it is from
    restored, _ = restore(tmp_path, 20, make(after).template())
    small.assert_same_bits(restored, saved)
    result = train_on(make(after), make(after).place(restored), 20)
    assert len(result["losses"]) == STEPS - 20
    expected = trained(1)
    assert_equal(result, expected | {"losses": expected["losses"][20:]}, 1e-5)


@functools.cache
def swept(**changes):
    """The mesh of three members, and their states and evaluations after eight epochs."""
    configs = [
        small.config(**CHANGES | {"optimizer__learning_rate": rate, "seed": seed} | changes)
        for seed, rate in enumerate((0.01, 0.03, 0.05))
    ]
    devices = mesh.member_mesh(configs[0].mesh, len(configs))
    programs = Programs(configs, small.dataset(), devices)
    state = programs.create()
    for step in range(0, STEPS - 2, small.STEPS_PER_EPOCH):
        state = programs.advance(state, step, small.STEPS_PER_EPOCH)
    return devices.shape, list(zip(programs.split(state), programs.measure(state), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("member", "data", "limit"), [(2, 2, 2**30), (3, 2, 0)])
def test_sweep_over_members_and_data(member, data, limit):
    """Three members, which two devices do not divide; data of which each device holds all, or a share."""
    shape, results = swept(mesh__member=member, mesh__data=data, mesh__replicate_limit=limit)
    assert shape == {"member": member, "data": data}
    assert_equal(results, swept(mesh__member=1, mesh__data=1)[1], 1e-5)


def test_padded_members_on_two_devices():
    """Three members, which two devices do not divide, saved and placed again half way; nothing is sent."""
    found = []
    for places in (1, 2):
        changes = {"optimizer__name": "sgd", "data__validation_size": 20, "mesh__member": places}
        configs = [small.config(seed=seed, **changes) for seed in range(3)]
        devices = mesh.member_mesh(configs[0].mesh, 3)
        assert devices.size == places
        programs = Programs(configs, small.dataset(20), devices)
        state = programs.advance(programs.create(), 0, 5)
        state = programs.advance(programs.place(programs.snapshot(state)), 5, 5)
        assert collectives(programs) == []
        found.append(programs.snapshot(state))
    small.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert {array.shape[0] for array in jax.tree.leaves(found[1])} == {3}


DIVIDED = [  # cores; processes; mesh.member and mesh.data of a sweep; CPU devices
    (1, 1, 0, 0, 1),
    (6, 1, 0, 0, 6),
    (1, 1, 4, 2, 8),  # README's command on one core
    (1, 1, 0, 2, 2),
    (6, 1, 1, 2, 6),
    (1, 2, 4, 2, 4),
]


@pytest.mark.parametrize("affinity", [True, False], ids=["Linux", "macOS"])
@pytest.mark.parametrize(("cores", "processes", "member", "data", "devices"), DIVIDED)
def test_cpu_devices_of_a_sweep(monkeypatch, affinity, cores, processes, member, data, devices):
    """One a core, or as many as the config asks for."""
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
    divided = []
    monkeypatch.setattr(jax.config, "update", lambda name, number: divided.append((name, number)))
    config = small.config(mesh__member=member, mesh__data=data)
    mesh.divide_cpu(config.mesh, sweep=True, processes=processes)
    assert divided == [("jax_num_cpu_devices", devices)]


def test_more_devices_than_there_are():
    with pytest.raises(UsageError, match=r"config\.mesh\.data: got 9, expected at most the 8 devices there are"):
        mesh.solo_mesh(small.config(mesh__data=9).mesh)
    with pytest.raises(UsageError, match=r"config\.mesh\.data: got 9"):
        mesh.member_mesh(small.config(mesh__data=9).mesh, 3)


def test_automatic():
    """One CPU device for a run; all of them for the members of a sweep."""
    assert mesh.solo_mesh(small.config().mesh).shape == {"member": 1, "data": 1}
    assert mesh.member_mesh(small.config().mesh, 20).shape == {"member": 8, "data": 1}
    assert mesh.member_mesh(small.config(mesh__data=3).mesh, 20).shape == {"member": 2, "data": 3}
