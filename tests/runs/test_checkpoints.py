import contextlib
import errno
import json
import os
import random
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.checkpoints import Checkpoints, restore, restore_latest, saved_steps, versions

CONFIG = {"seed": 0, "model": {"hidden": [3, 4]}, "optimizer": {"learning_rate": 1e-3}}


def run(**changes):
    return {"name": "", "config": CONFIG, "rows": 0} | changes


META = {"runs": [run()]}


class State(struct.PyTreeNode):
    step: object
    params: dict
    moments: tuple


def state(step, width=3):
    kernel = np.random.default_rng(step).normal(size=(2, width)).astype(np.float32)
    return State(jnp.int32(step), {"dense_0": {"kernel": jnp.array(kernel)}}, (jnp.zeros(()), jnp.arange(width)))


def bits(tree):
    return [(leaf.dtype.name, leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, _leaves(tree))]


def _leaves(tree):
    return [tree.step, tree.params["dense_0"]["kernel"], *tree.moments]


def save(directory, *steps, best_steps=()):
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"runs": [run(rows=step)]}, best_steps)


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


# What comes back.


def test_bit_for_bit(directory):
    odd = jnp.array([np.nan, -np.nan, -0.0, np.inf, 1e-45, 0.1], jnp.float32)
    saved = State(jnp.int32(7), {"a": {"b": odd}, "c": jnp.array([True, False])}, (jnp.uint32(2**32 - 1), {}, None))
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(7, saved, META)
    got, _ = restore(directory, 7, saved)
    assert np.asarray(got.params["a"]["b"]).tobytes() == np.asarray(odd).tobytes()
    assert got.params["c"].tolist() == [True, False]
    assert got.moments == (np.uint32(2**32 - 1), {}, None)


def test_newest_with_what_was_saved_beside_it(directory):
    assert restore_latest(directory, state(0)) is None
    save(directory, 0, 9, 10)
    got, meta = restore_latest(directory, state(0))
    assert bits(got) == bits(state(10))
    assert meta == {"step": 10, "runs": [run(rows=10)], "versions": versions()}


def test_padding_is_left_out(directory):
    """Of runs that train together: devices may have rows for more."""
    together = {"kernel": np.arange(12.0).reshape(4, 3), "step": np.full(4, 5)}
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(5, together, {"runs": [run(name="a"), run(name="b"), run(name="c")]})
    template = {name: array[:3] for name, array in together.items()}
    for got, meta in (restore(directory, 5, template), restore_latest(directory, template)):
        np.testing.assert_equal(got, template)
        assert [described["name"] for described in meta["runs"]] == ["a", "b", "c"]


def test_one_saved_in_another_form_is_a_line(directory):
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(1, state(1), {"config": CONFIG, "rows": 0})
    for attempt in (lambda: restore(directory, 1, state(0)), lambda: restore_latest(directory, state(0))):
        with pytest.raises(RunError, match=r"1: got a damaged checkpoint \(ValueError: it was saved by an earlier"):
            attempt()


def test_a_save_is_of_its_moment(directory):
    """The next step writes to the same buffers while the save is in flight."""
    buffer = np.zeros(1000, np.float32)
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(1, {"buffer": buffer}, META)
        buffer[:] = 1
    assert not restore(directory, 1, {"buffer": buffer})[0]["buffer"].any()


def test_a_step_is_saved_once(directory):
    save(directory, 3)
    before = [path.stat().st_mtime_ns for path in directory.rglob("*")]
    save(directory, 3)
    assert [path.stat().st_mtime_ns for path in directory.rglob("*")] == before


def test_another_model(directory):
    save(directory, 1, 2)
    before = listing(directory)
    with pytest.raises(RunError, match=r"2: .*kernel: got float32\[2, 3\], expected float32\[2, 5\]: a checkpoint of"):
        restore_latest(directory, state(0, width=5))
    with pytest.raises(RunError, match=r"params/w: got nothing, expected float32\[\]: a checkpoint of"):
        restore(directory, 1, {"params": {"w": jnp.zeros(())}})
    assert listing(directory) == before


def test_an_earlier_version(directory):
    """The line says so, of the state of `optax.flatten(optax.scale_by_adam())` in a chain."""
    params = {"dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    moments = optax.ScaleByAdamState(jnp.int32(1), mu=jnp.zeros(9), nu=jnp.zeros(9))
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(1, {"params": params, "opt_state": (optax.EmptyState(), moments, optax.EmptyState())}, META)
    template = {"params": params, "opt_state": moments._replace(mu=params, nu=params)}
    for attempt in (lambda: restore(directory, 1, template), lambda: restore_latest(directory, template)):
        with pytest.raises(RunError, match=r"1: got the optimizer's moments in one vector, .* Continue with"):
            attempt()


# What is kept.


@pytest.mark.parametrize(
    ("best_steps", "kept"),
    [
        ([[1]] * 5, [1, 4, 5]),
        ([[1], [2], [2], [2], [2]], [2, 4, 5]),
        ([[1], [2], [3], [4], [5]], [4, 5]),
        ([[1], [1], [1], [1], [5]], [4, 5]),
        ([[]] * 5, [4, 5]),
        ([[9]] * 5, [4, 5]),
        ([[1], [1, 2], [1, 2], [1, 2], [2, 5]], [2, 4, 5]),  # of runs that train together
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
def test_the_latest_two_and_the_best(directory, best_steps, kept, restarts):
    with contextlib.ExitStack() as stack:
        for step, best in enumerate(best_steps, start=1):
            if restarts:
                save(directory, step, best_steps=best)
            else:
                if step == 1:
                    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory)))
                checkpoints.save(step, state(step), META, best)
                assert set(checkpoints.steps()) >= {*best, step} - {9}
    assert saved_steps(directory) == kept


def test_an_older_step_that_turns_out_best_is_kept(directory):
    """Its evaluation may come after its save, when a resumed run evaluates more often."""
    save(directory, 1, 2)
    save(directory, 2, best_steps=[1])
    save(directory, 3, 4, best_steps=[1])
    assert saved_steps(directory) == [1, 3, 4]


def test_only_its_own_are_removed(directory):
    names = ["notes.txt", "damaged/3/state", "007", "12.bak", "x/1"]
    save(directory, 1)
    for name in names:
        (directory / name).mkdir(parents=True)
    (directory / "5.orbax-checkpoint-tmp").mkdir()  # what a kill leaves of a save
    before = set(listing(directory))
    save(directory, 2, 3, 4)
    assert saved_steps(directory) == [3, 4]
    assert before - set(listing(directory)) >= {"1", "5.orbax-checkpoint-tmp"}
    assert set(names) <= set(listing(directory))
    assert bits(restore_latest(directory, state(0))[0]) == bits(state(4))


# Damage.


def truncate(path):
    """The largest file of arrays, by half."""
    file = max((path / "state").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_files(path):
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def half_delete(path):
    for file in sorted(file for file in path.rglob("*") if file.is_file())[::2]:
        file.unlink()


def flip_a_bit_of_an_array(path):
    for file in (path / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def edit_meta(path, **changes):
    file = path / "meta" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def replace_by_a_file(path):
    shutil.rmtree(path)
    path.write_text("not a checkpoint")


def swap_with_an_older_one(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("1"), path)


DAMAGE = {
    "truncated": truncate,
    "emptied files": empty_files,
    "emptied": empty,
    "half-deleted": half_delete,
    "no arrays": lambda path: shutil.rmtree(path / "state"),
    "no meta": lambda path: shutil.rmtree(path / "meta"),
    "bit flipped": flip_a_bit_of_an_array,
    "torn meta": lambda path: (path / "meta" / "metadata").write_text('{"step": '),
    "meta of another type": lambda path: (path / "meta" / "metadata").write_text("[1]"),
    "other config": lambda path: edit_meta(path, runs=[run(config=CONFIG | {"seed": 1})]),
    "other rows": lambda path: edit_meta(path, runs=[run(rows=0)]),
    "no runs": lambda path: edit_meta(path, runs=None),
    "no sums": lambda path: (path / "SHA256").unlink(),
    "file": replace_by_a_file,
    "copy of another step": swap_with_an_older_one,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_falls_back_and_keeps_the_damaged_one_aside(directory, capsys, damage):
    save(directory, 1, 2)
    damage(directory / "2")
    remains = listing(directory / "2")
    got, meta = restore_latest(directory, state(0))
    assert bits(got) == bits(state(1))
    assert meta["step"] == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {directory / '2'}: got a damaged checkpoint (")
    assert warning.endswith(f"It is kept as {directory / 'damaged' / '2'}.")
    assert saved_steps(directory) == [1]
    assert listing(directory / "damaged" / "2") == remains
    save(directory, 2)  # which the run comes by again
    assert bits(restore_latest(directory, state(0))[0]) == bits(state(2))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_an_older_damaged_one_does_not_count(directory, capsys, damage):
    save(directory, 1, 2, best_steps=[1])
    save(directory, 3, best_steps=[1])
    damage(directory / "2")
    assert bits(restore_latest(directory, state(0))[0]) == bits(state(3))
    assert f"kept as {directory / 'damaged' / '2'}" in capsys.readouterr().err
    save(directory, 4, best_steps=[1])
    assert saved_steps(directory) == [1, 3, 4]


@pytest.mark.parametrize("damage", [truncate, empty, half_delete, replace_by_a_file])
def test_none_good(directory, damage):
    save(directory, 1, 2)
    for step in (1, 2):
        damage(directory / str(step))
    before = listing(directory)
    with pytest.raises(RunError, match=r"got no checkpoint that is whole, the newest because of: .*2: got a damaged"):
        restore_latest(directory, state(0))
    with pytest.raises(RunError, match="1: got a damaged checkpoint"):
        restore(directory, 1, state(0))
    assert listing(directory) == before


def test_damaged_ones_do_not_replace_one_another(directory):
    for _ in range(3):
        save(directory, 1, 2)
        truncate(directory / "2")
        restore_latest(directory, state(0))
    assert sorted(path.name for path in (directory / "damaged").iterdir()) == ["2", "2.1", "2.2"]


def test_strays_are_no_checkpoints(directory, capsys):
    save(directory, 1)
    for name in ("007", "-3", "3.5", "٣", "1e3", "x" * 200, "9" * 200):
        (directory / name).mkdir()
    assert saved_steps(directory) == [1]
    assert bits(restore_latest(directory, state(0))[0]) == bits(state(1))
    (directory / "99").mkdir()
    assert bits(restore_latest(directory, state(0))[0]) == bits(state(1))
    assert "99: got a damaged checkpoint" in capsys.readouterr().err


def test_no_flipped_bit_goes_unnoticed(directory, tmp_path):
    """Any bit of any file: what is restored is what was saved, or nothing is."""
    save(directory, 5)
    rng = random.Random(20)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    refused = 0
    for _ in range(100):
        file = rng.choice(files)
        good = file.read_bytes()
        position = rng.randrange(8 * len(good))
        content = bytearray(good)
        content[position // 8] ^= 1 << position % 8
        file.write_bytes(content)
        try:
            assert bits(restore(directory, 5, state(0))[0]) == bits(state(5)), (file, position)
        except RunError:
            refused += 1
        file.write_bytes(good)
    assert refused > 50  # what matters less: orbax's times and marks of success
    assert bits(restore(directory, 5, state(0))[0]) == bits(state(5))


# Failures to save.


def test_a_save_that_fails(directory, monkeypatch):
    save(directory, 1)
    checkpoints = Checkpoints(directory)
    with monkeypatch.context() as patch:
        patch.setattr("vmapbn_flax.runs.sums.write_whole", full)
        checkpoints.save(2, state(2), META)
        with pytest.raises(RunError, match=r"could not be saved \(OSError.*No space left.*That of step 1 is whole;"):
            checkpoints.wait()
    checkpoints.save(3, state(3), META, best_steps=[1])  # there is room again
    checkpoints.close()
    assert saved_steps(directory) == [1, 3]
    assert bits(restore_latest(directory, state(0))[0]) == bits(state(3))


def test_no_thread_waits_for_a_directory_that_cannot_be_made(directory, monkeypatch):
    """Of orbax's: it would keep the process from its end for five minutes."""
    checkpoints, first, threads = Checkpoints(directory), state(1), set(threading.enumerate())
    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(RunError, match=r"could not be saved .*No space left"), contextlib.closing(checkpoints):
        checkpoints.save(1, first, META)
    for thread in set(threading.enumerate()) - threads:
        thread.join(2)
        assert not thread.is_alive(), thread


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunError, match="checkpoints: got a checkpoint that could not be saved"):
        Checkpoints(tmp_path / "checkpoints")
