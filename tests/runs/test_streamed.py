"""Whole runs on a prepared data set that is streamed, against the run that has it in memory."""

import json
import re
import shutil
import signal
import threading

import pytest

from tests.helpers import small
from tests.helpers.prepare import as_examples, prepare
from tests.helpers.runs import CONFIG, command, leftovers, outcome
from vmapbn_flax.cli.main import main
from vmapbn_flax.data.records import Records
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.loop import Loop
from vmapbn_flax.training.programs import Programs

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections, of itself

TOTAL = 25  # steps, 5 an epoch: 90 training examples in batches of 16, and 10 held out
BATCH_GB = 16 * (28 * 28 + 4) / 1e9
STREAMED = f"--config.data.memory_limit={4.5 * BATCH_GB}"  # windows of 2 batches
SMALLER = f"--config.data.memory_limit={1e-9}"  # of one


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmapbn_flax.runs.pictures.plot_runs", lambda workdirs, output: output.touch())
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    mnist = small.mnist()
    splits = {"train": as_examples(mnist.train[:100]), "test": as_examples(mnist.test[:37])}
    return prepare(tmp_path_factory.mktemp("tfds"), splits)


def flags(root):
    return [CONFIG, "--config.data.name=digits", f"--config.data.dir={root}", "--config.data.validation_size=10"]


@pytest.fixture(scope="module")
def finished(original, tmp_path_factory):
    """The workdirs of a run that has its data in memory, and of one that streams it."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in (("streamed", STREAMED), ("in_memory", "--config.data.memory_limit=1.0")):
            patch.setenv("XDG_CACHE_HOME", str(directory / f"{name}_cache"))
            assert main(["train", *flags(original), limit, f"--workdir={directory / name}"]) == 0
    return directory


@pytest.fixture
def root(original, tmp_path, monkeypatch):
    """A copy of the data set, on a machine without a cache of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(original, tmp_path / "tfds")


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def train(capsys, workdir, root):
    """Runs the command; returns its exit status and the lines it says."""

    def train(*more):
        result = command(capsys, "train", *flags(root), f"--workdir={workdir}", *more)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]
        return result

    return train


@pytest.fixture
def at_step(monkeypatch):
    """Has something happen once a chunk ends at exactly one step."""
    advance, next_stop = Programs.advance, Loop._next_stop

    def arrange(target, action):
        def next_stop_or_target(self):
            return min(next_stop(self), target) if self.step < target else next_stop(self)

        def advance_and_act(self, state, step, count):
            state = advance(self, state, step, count)
            if step + count == target:
                action()
            return state

        monkeypatch.setattr(Loop, "_next_stop", next_stop_or_target)
        monkeypatch.setattr(Programs, "advance", advance_and_act)

    return arrange


def numbers(workdir):
    """The outcome of a run, but for where its data was."""
    result = outcome(workdir)
    config = json.loads(result["config.json"])
    del config["data"]["memory_limit"], config["data"]["dir"]
    return {**result, "config.json": config}


def test_streamed_is_in_memory_bit_for_bit(finished):
    assert numbers(finished / "streamed") == numbers(finished / "in_memory")
    last = json.loads((finished / "streamed/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["validation_count"], last["test_count"]) == (10, 37)
    assert (finished / "in_memory_cache").exists()
    assert not (finished / "streamed_cache").exists()


@pytest.mark.slow
def test_stopped_and_resumed_with_other_limits(train, at_step, workdir, finished):
    for step, limit in ((4, STREAMED), (11, "--config.data.memory_limit=1.0")):
        at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
        status, lines = train(limit)
        assert status == 128 + signal.SIGTERM
        assert ("examples, streamed)" in "".join(lines)) == (limit == STREAMED)
        assert lines[-1] == f"note: stopped at step {step}, which is saved; the same command resumes"
    at_step(0, None)
    status, lines = train(SMALLER)
    assert status == 0
    assert lines[0] == "resuming with config.data.memory_limit: 1.0 -> 1e-09"
    assert f"resuming at step 11 of {TOTAL} steps" in lines[1]
    assert numbers(workdir) == numbers(finished / "in_memory")
    assert not leftovers(workdir)


def test_a_signal_during_a_read(train, workdir, monkeypatch):
    read, count = Records.read, 0

    def read_and_signal(self, rows):
        nonlocal count
        count += 1
        if count == 6:
            signal.raise_signal(signal.SIGTERM)
        return read(self, rows)

    monkeypatch.setattr(Records, "read", read_and_signal)
    status, lines = train(STREAMED)
    assert status == 128 + signal.SIGTERM
    (step,) = saved_steps(workdir / "checkpoints")[-1:]
    assert lines[-1] == f"note: stopped at step {step}, which is saved; the same command resumes"


def test_damage_during_the_run(train, at_step, workdir, root, finished):
    """One line, status 2, and the last checkpoint; with the file back the run ends as if nothing had been."""
    shard = root / "digits/1.0.0/digits-train.array_record-00000-of-00001"
    whole = shard.read_bytes()

    def damage():
        with shard.open("r+b") as file:  # in place, for the program has it open
            file.write(bytes(len(whole)))

    at_step(11, damage)
    status, lines = train(STREAMED)
    assert status == 2
    (error,) = [line for line in lines if not line.startswith(("step ", str(workdir)))]
    assert re.match(rf"error: {root}/digits/1\.0\.0: got .+; expected a complete data set\.", error)
    assert saved_steps(workdir / "checkpoints")[-1] == 10
    shard.write_bytes(whole)
    at_step(0, None)
    assert train(STREAMED)[0] == 0
    assert numbers(workdir) == numbers(finished / "in_memory")


def printed(capsys, *argv):
    """What a command that succeeds writes to standard output."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def test_evaluate_streams(finished, capsys):
    summary = json.loads((finished / "streamed/summary.json").read_text())
    figures = dict(line.split() for line in printed(capsys, "evaluate", finished / "streamed").splitlines())
    for split in ("validation", "test"):
        for name in ("loss", "accuracy", "count"):
            assert float(figures[f"{split}_{name}"]) == summary[f"{split}_{name}"]


def test_refresh_needs_the_whole_set(finished, capsys):
    workdir = finished / "streamed"
    status, lines = command(capsys, "refresh", workdir)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: config.data.memory_limit: got ")
    assert lines[0].endswith(f"raise it in {workdir / 'config.json'}.")
    assert not (workdir / "refreshed").exists()
