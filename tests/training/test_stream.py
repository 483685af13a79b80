"""Windows of streamed data, and the programs that train on them, against the same data in memory."""

import dataclasses
import functools
import threading
import weakref

import jax
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax.errors import UsageError
from vmapbn_flax.training.layout import Layout
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.steps import epoch_permutation
from vmapbn_flax.training.stream import read_ahead

BATCH_GB = small.BATCH * (small.FEATURES + 4) / 1e9
LIMITS = {1: 0.1 * BATCH_GB, 2: 4.1 * BATCH_GB, 4: 9.5 * BATCH_GB, 6: 100 * BATCH_GB}  # by the most steps in a window


def dataset():
    return dataclasses.replace(small.dataset(), validation=small.split(21, seed=3), streamed=True)


def streamed(window_steps, data=None, **changes):
    config = small.config(data__memory_limit=LIMITS[window_steps], train__eval_batch_size=16, **changes)
    return Programs([config], data or dataset())


@functools.cache
def in_memory():
    """A run's first two epochs: the state after each step, and the metrics at the end."""
    config = small.config(train__eval_batch_size=16)
    programs = Programs([config], dataclasses.replace(dataset(), streamed=False))
    states = [programs.snapshot(programs.create())]
    for step in range(2 * small.STEPS_PER_EPOCH):
        states.append(programs.snapshot(programs.advance(programs.place(states[-1]), step, 1)))
    return states, programs.evaluate(programs.place(states[-1]))


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


class Witness:
    """Notes how many of the windows that are put on the device are alive at a time, and what they hold."""

    def __init__(self, monkeypatch):
        self.windows, self.most_alive, self._references = [], 0, []
        put = Layout.put

        def on_device(layout, split):
            arrays = put(layout, split)
            self.windows.append(jax.device_get(arrays))
            self._references.append(weakref.ref(arrays[0]))
            self.most_alive = max(self.most_alive, self.alive())
            return arrays

        monkeypatch.setattr(Layout, "put", on_device)

    def alive(self):
        return sum(reference() is not None for reference in self._references)


# The same numbers.


@pytest.mark.parametrize("window_steps", [1, 4, 6])
def test_bits_are_those_of_data_in_memory(window_steps):
    """However an epoch of 6 steps is cut into windows."""
    states, figures = in_memory()
    programs = streamed(window_steps)
    state = programs.create()
    for epoch in range(2):
        state = programs.advance(state, epoch * small.STEPS_PER_EPOCH, small.STEPS_PER_EPOCH)
        small.assert_same_bits(jax.device_get(state), states[(epoch + 1) * small.STEPS_PER_EPOCH])
    assert programs.evaluate(state) == figures
    assert (figures["validation_count"], figures["test_count"]) == (21, 37)
    programs.close()
    assert not readers()


def test_any_cut_from_any_step_gives_the_same_bits():
    states, _ = in_memory()
    programs = streamed(2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, last = sorted(rng.choice(2 * small.STEPS_PER_EPOCH + 1, 2, replace=False))
        state, step = programs.place(states[first]), int(first)
        while step < last:
            end = min(last, (step // small.STEPS_PER_EPOCH + 1) * small.STEPS_PER_EPOCH)
            count = int(rng.integers(1, end - step + 1))
            state, step = programs.advance(state, step, count), step + count
        small.assert_same_bits(jax.device_get(state), states[last])
    compiled = programs.compiler.compile_seconds
    programs.advance(programs.place(states[0]), 0, 5)
    assert programs.compiler.compile_seconds == compiled
    programs.close()


def test_gradients_are_those_of_the_step_s_batch():
    programs, resident = streamed(4), small.programs()
    for step in (0, 4, 9):
        got, expected = (jax.device_get(p.gradients(p.create(), step)) for p in (programs, resident))
        small.assert_same_bits(got, expected)
    programs.close()


@pytest.mark.parametrize("eval_batch_size", [1, 20, 1000])
def test_every_example_counts_once(eval_batch_size):
    changes = {"train__eval_batch_size": eval_batch_size, "data__memory_limit": LIMITS[6]}
    programs = Programs([small.config(**changes)], dataset())
    resident = Programs([small.config(**changes)], dataclasses.replace(dataset(), streamed=False))
    state = programs.create()
    assert programs.evaluate(state) == resident.evaluate(state)
    assert programs.evaluate(state)["test_count"] == 37
    assert not readers()


# The windows.


def test_windows_are_the_epoch_s_batches_in_order(monkeypatch):
    witness, programs = Witness(monkeypatch), streamed(4)
    state = programs.create()
    for epoch in range(2):
        state = programs.advance(state, epoch * small.STEPS_PER_EPOCH, small.STEPS_PER_EPOCH)
    programs.close()
    train, size = small.dataset().train, small.BATCH
    for number, (images, labels) in enumerate(witness.windows[:4]):
        epoch, part = divmod(number, 2)
        rows = epoch_permutation(0, epoch, len(train))[: 6 * size][part * 3 * size : (part + 1) * 3 * size]
        np.testing.assert_array_equal(images, train.images[rows])
        np.testing.assert_array_equal(labels, train.labels[rows])


def test_the_end_of_an_epoch_s_last_window_is_blank(monkeypatch):
    """7 batches in windows of 4: the last has one of zeros, which nothing reads."""
    witness = Witness(monkeypatch)
    programs = streamed(4, dataclasses.replace(dataset(), train=small.split(7 * small.BATCH + 3, seed=1)))
    programs.advance(programs.create(), 0, 7)
    programs.close()
    (first, _), (last, labels) = witness.windows[:2]
    assert first.shape == last.shape == (4 * small.BATCH, *small.IMAGE)
    assert last[: 3 * small.BATCH].any(axis=1).all()
    assert not last[3 * small.BATCH :].any()
    assert not labels[3 * small.BATCH :].any()


def test_two_windows_are_alive_at_most(monkeypatch):
    witness, programs = Witness(monkeypatch), streamed(1)
    state = programs.create()
    for epoch in range(4):
        state = programs.advance(state, epoch * small.STEPS_PER_EPOCH, small.STEPS_PER_EPOCH)
    assert [images.nbytes for images, _ in witness.windows] == 24 * [small.BATCH * small.FEATURES]
    assert witness.most_alive == 2
    programs.close()
    assert witness.alive() == 0
    programs.measure(state)
    assert len(witness.windows) == 24 + 2 + 3  # 21 and 37 examples, 16 at a time
    assert witness.most_alive == 2
    assert witness.alive() == 0


def test_nothing_is_read_beyond_the_run(monkeypatch):
    witness, programs = Witness(monkeypatch), streamed(2, train__num_epochs=1.5)
    state = programs.advance(programs.create(), 0, 6)
    programs.advance(state, 6, 3)
    programs.close()
    assert len(witness.windows) == 5  # of the second epoch's three windows two


# What the thread raises.


class Faulty(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Rotten(type(small.dataset().train)):
    """A split with one example that cannot be read while `bad` has its number."""

    bad: set = dataclasses.field(default_factory=set)

    def read(self, rows):
        if self.bad & set(rows.tolist()):
            raise UsageError("got a rotten example")
        return super().read(rows)


def test_an_unreadable_example_is_raised_when_it_is_due():
    states, _ = in_memory()
    row = int(epoch_permutation(0, 0, 100)[4 * small.BATCH])  # of the fifth batch, in the third window of 2
    train = Rotten(small.dataset().train.images, small.dataset().train.labels, {row})
    programs = streamed(2, dataclasses.replace(dataset(), train=train))
    state = programs.advance(programs.create(), 0, 4)
    small.assert_same_bits(jax.device_get(state), states[4])
    for _ in range(2):
        with pytest.raises(UsageError, match="rotten"):
            programs.advance(state, 4, 1)
    train.bad.clear()
    small.assert_same_bits(jax.device_get(programs.advance(state, 4, 2)), states[6])
    programs.close()
    assert not readers()


def test_an_unreadable_test_example_ends_the_thread():
    test = Rotten(small.dataset().test.images, small.dataset().test.labels, {20})
    programs = streamed(2, dataclasses.replace(dataset(), test=test))
    state = programs.create()
    with pytest.raises(UsageError, match="rotten"):
        programs.measure(state)
    assert not readers()


# Reading ahead, by itself.


def test_results_come_in_order_one_read_ahead():
    started = [threading.Event() for _ in range(4)]

    def read(number, stopped):
        started[number].set()
        return number * number

    results = read_ahead(read, range(4))
    assert not readers()  # nothing happens before it is asked
    for number in range(4):
        assert next(results) == number * number
        if number < 3:
            assert started[number + 1].wait(timeout=60)
        assert not any(event.is_set() for event in started[number + 2 :])
    assert list(results) == []
    assert not readers()


def test_closing_stops_a_read_at_work():
    reading, seen = threading.Event(), []

    def read(number, stopped):
        if number == 1:
            reading.set()
            while not stopped():  # as long as it takes
                pass
            seen.append(number)

    results = read_ahead(read, range(3))
    next(results)
    assert reading.wait(timeout=60)
    results.close()
    assert seen == [1]  # and 2 was never begun
    assert not readers()


def test_an_error_of_the_first_read_and_of_a_later_one():
    def read(number, stopped):
        if number == 2:
            raise Faulty
        return number

    results = read_ahead(read, range(1, 3))
    assert next(results) == 1
    with pytest.raises(Faulty):
        next(results)
    with pytest.raises(Faulty):
        next(read_ahead(read, range(2, 3)))
    assert not readers()
