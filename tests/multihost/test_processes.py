"""One run, or sweep, in several processes, over loopback: the numbers of one process, and an end for all of them."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests.helpers.program import CONFIG, SWEEP, Program
from tests.helpers.runs import leftovers, outcome, state_bytes
from tests.multihost import changes
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.workdir import Workdir

ADVANCE = "vmapbn_flax.training.programs:Programs.advance"
LOST = "error: lost another process of this run"
# 30 steps and as many rows. Not Adam: it makes a step of whatever rounding leaves of a gradient that is zero.
FLAGS = (
    CONFIG,
    "--config.optimizer.name=sgd",
    "--config.train.num_epochs=5.0",
    "--config.train.log_every=1",
    "--config.train.eval_every=1.0",
)
SWEEP_FLAGS = (SWEEP, "--config.optimizer.name=sgd", "--config.mesh.cpu_devices=1")
SECONDS = 120  # a limit for what takes ten or less on a machine that is not this busy


@pytest.fixture(scope="session")
def servers(program):
    """One for each process of a group; started when first needed."""
    with contextlib.ExitStack() as stack:
        started = [program]

        def first(count):
            while len(started) < count:
                started.append(Program())
                stack.callback(started[-1].close)
            return started[:count]

        yield first


class Processes:
    """A run, or with other `flags` a sweep, in `count` processes: its workdir, and the output of each."""

    def __init__(self, servers, place, count, flags=FLAGS):
        self.servers, self.workdir, self.flags = servers(count), place / "run", flags
        self.logs = [place / f"log{i}" for i in range(count)]

    def start(self, *flags, faults=None, own_flags=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for i, (server, log) in enumerate(zip(self.servers, self.logs, strict=True)):
            log.write_text("")
            address = {"coordinator": f"127.0.0.1:{port}", "num_processes": len(self.servers), "process_id": i}
            distributed = [f"--config.distributed.{name}={value}" for name, value in address.items()]
            argv = (*self.flags, *flags, f"--workdir={self.workdir}", *distributed, *(own_flags or {}).get(i, ()))
            server.start("train", *argv, log=log, **(faults or {}).get(i, {}))

    def wait(self):
        """The exit statuses; None for a process that does not end. Notes the moment of the last end."""
        ended = concurrent.futures.ThreadPoolExecutor(len(self.servers))
        with ended:
            ends = list(ended.map(lambda server: (server.wait(SECONDS), time.monotonic()), self.servers))
        statuses, moments = zip(*ends, strict=True)
        self.ended = max(moments)
        statuses = list(statuses)
        for server, status in zip(self.servers, statuses, strict=True):
            if status is None:
                server.signal(signal.SIGKILL)
                server.wait()
        return statuses

    def run(self, *flags, faults=None, own_flags=None):
        self.start(*flags, faults=faults, own_flags=own_flags)
        return self.wait()

    def lines(self, i):
        """What process `i` says, without Gloo's greeting."""
        return [line for line in self.logs[i].read_text().splitlines() if not line.startswith("[Gloo]")]

    def wait_for(self, i, text):
        while text not in self.logs[i].read_text():
            assert self.servers[i].wait(0.01) is None, self.lines(i)


@pytest.fixture
def two(servers, tmp_path):
    return Processes(servers, tmp_path, 2)


@pytest.fixture(scope="session")
def alone(program, tmp_path_factory):
    """The workdir of the run in one process."""
    place = tmp_path_factory.mktemp("alone")
    status = program.run("train", *FLAGS, f"--workdir={place}/run", log=place / "log")
    assert status == 0, (place / "log").read_text()
    return place / "run"


@pytest.fixture(scope="session")
def together(servers, tmp_path_factory):
    """The run in two processes that nothing happened to."""
    processes = Processes(servers, tmp_path_factory.mktemp("together"), 2)
    assert processes.run() == [0, 0], (processes.lines(0), processes.lines(1))
    processes.outcome = outcome(processes.workdir)
    return processes


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(workdir, other):
    """The losses and evaluations, and the parameters and statistics at the end: to 1e-5."""
    assert len(rows(workdir)) == len(rows(other)) == 30 + 5
    for got, expected in zip(rows(workdir), rows(other), strict=True):
        assert got.keys() == expected.keys()
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)
    states = [state_bytes(place, 30) for place in (workdir, other)]
    for name in states[1]:
        if name.startswith((".params", ".batch_stats")):
            got, expected = (np.frombuffer(state[name][2], state[name][0]) for state in states)
            assert np.abs(got - expected).max() <= 1e-5 * max(np.abs(expected).max(), 0.1), name


def test_same_numbers_as_one_process(together, alone):
    assert_same_run(together.workdir, alone)
    assert rows(together.workdir)[-1]["test_count"] == 37
    assert "on 2 x cpu, batches split over 2 and the data set on each" in together.lines(0)[0]
    assert together.lines(1) == []
    assert together.outcome["config.json"] == outcome(alone)["config.json"]


@pytest.mark.slow
def test_streamed_data(two, alone):
    """Each process reads its share; a signal stops them in the midst of it, and both go on."""
    streamed = "--config.data.memory_limit=1e-9"
    two.start(streamed, faults={1: {"name": ADVANCE, "call": 20, "seconds": 0.5}})
    two.wait_for(1, "waiting")
    two.servers[1].signal(signal.SIGTERM)
    assert two.wait() == [128 + signal.SIGTERM] * 2
    assert two.run(streamed) == [0, 0], two.lines(0)
    assert "streamed), on 2 x cpu, batches split over 2 and a share of the data set on each" in two.lines(0)[0]
    assert_same_run(two.workdir, alone)


def test_a_process_dies(two, together):
    """A follower, then the leader, each in a call of its own: the other ends, and both together go on."""
    for victim, call in ((1, 10), (0, 15)):
        statuses = two.run(faults={victim: {"name": ADVANCE, "call": call}})
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] == 1, two.lines(1 - victim)
        assert sum(line.startswith("error: ") for line in two.lines(1 - victim)) == 1
        assert any(line.startswith(LOST) for line in two.lines(1 - victim))
    assert saved_steps(two.workdir / "checkpoints")
    shutil.copytree(two.workdir, two.workdir.with_name("copy"))
    assert two.run() == [0, 0], two.lines(0)
    assert "resuming at step" in two.lines(0)[0]
    assert outcome(two.workdir) == together.outcome
    assert leftovers(two.workdir) == []


@pytest.mark.slow
def test_the_leader_dies_while_a_follower_is_elsewhere(two):
    """No broken connection of its own tells it; jax aborts it, and it says the same and exits the same."""
    two.start(faults={0: {"name": ADVANCE, "call": 5}, 1: {"name": ADVANCE, "call": 5, "seconds": 60}})
    assert two.wait() == [-signal.SIGKILL, 1]
    assert any(line.startswith(LOST) for line in two.lines(1))


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_falls_silent(two, silent):
    """Its connections stay; the other does without it after six seconds."""
    two.start(faults={silent: {"name": ADVANCE, "call": 5, "seconds": 2}})
    two.wait_for(silent, "waiting")
    two.servers[silent].signal(signal.SIGSTOP)
    assert two.servers[1 - silent].wait(SECONDS) == 1
    assert any(line.startswith(LOST) for line in two.lines(1 - silent))
    two.servers[silent].signal(signal.SIGKILL)
    assert two.servers[silent].wait() == -signal.SIGKILL


def test_continued_in_one_process(two, program, alone, tmp_path):
    assert two.run(faults={1: {"name": ADVANCE, "call": 20}}) == [1, -signal.SIGKILL]
    (step, *_) = reversed(saved_steps(two.workdir / "checkpoints"))
    status = program.run("train", *FLAGS, f"--workdir={two.workdir}", log=tmp_path / "log")
    lines = (tmp_path / "log").read_text().splitlines()
    assert status == 0, lines
    assert f"resuming at step {step} of 30" in lines[0]
    assert_same_run(two.workdir, alone)


def test_a_signal_to_one_stops_all_at_the_same_step(two, together):
    for target in (0, 1):
        two.start(faults={target: {"name": ADVANCE, "call": 10, "seconds": 1.0}})
        two.wait_for(target, "waiting")
        two.servers[target].signal(signal.SIGTERM)
        assert two.wait() == [128 + signal.SIGTERM] * 2
        step = saved_steps(two.workdir / "checkpoints")[-1]
        assert two.lines(0)[-1] == f"note: stopped at step {step}, which is saved; the same command resumes"
        assert [line for line in two.lines(1) if line != "waiting"] == []
    assert two.run() == [0, 0], two.lines(0)
    assert outcome(two.workdir) == together.outcome


def test_errors_end_all_with_their_status(two, together):
    """Of all of them, of the one that has the lock; a finished run is finished for all."""
    assert two.run("--config.train.batch_size=101") == [2, 2]
    shutil.copytree(together.workdir, two.workdir, dirs_exist_ok=True)
    assert two.run("--config.model.hidden=(7,)") == [1, 1]
    for i in (0, 1):
        assert two.lines(i)[-1].startswith("error: got a config that differs")
    with Workdir(two.workdir).lock():
        assert two.run() == [1, 1]
    assert f"got a workdir in use by process {os.getpid()}" in two.lines(0)[-1]
    (line,) = (line for line in two.lines(1) if line.startswith("error: "))  # gRPC may say more after it
    assert line.startswith(f"error: process 0: {two.workdir}: got a workdir in use by process {os.getpid()}")
    assert two.run() == [0, 0]
    assert "finished at step 30" in two.lines(0)[-1]


# One fails while the others are somewhere else, in a collective of the devices for the most part.


def change(name, process):
    return {process: {"before": f"tests.multihost.changes:{name}"}}


STREAMED = "--config.data.memory_limit=1e-9"
NO_ROOM = "metrics.jsonl: got No space left on device"


@pytest.mark.parametrize(
    ("name", "process", "flags", "status", "message"),
    [
        ("damaged_record", 0, (STREAMED,), 2, changes.DAMAGED),
        pytest.param("damaged_record", 1, (STREAMED,), 2, changes.DAMAGED, marks=pytest.mark.slow),
        pytest.param("bug", 0, (), 1, "ZeroDivisionError: a bug", marks=pytest.mark.slow),
        ("bug", 1, (), 1, "ZeroDivisionError: a bug"),
        pytest.param("full_disk", 0, (), 1, NO_ROOM, marks=pytest.mark.slow),
        pytest.param("failing_save", 0, (), 1, "got a checkpoint that could not be saved", marks=pytest.mark.slow),
        pytest.param("failing_directory", 0, (), 1, "got a checkpoint that could not be saved", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_ends_all(two, name, process, flags, status, message):
    """With that error's own line and status, wherever the others are; the same command continues."""
    two.start(*flags, faults=change(name, process))
    assert two.wait() == [status, status], (two.lines(0), two.lines(1))
    for i in (0, 1):
        said = "\n".join(two.lines(i))
        assert message in said
        assert ("error: process" in said) == (i != process)
        assert "lost another process" not in said
    (moment,) = [float(line.removeprefix("failing at ")) for line in two.lines(process) if "failing at" in line]
    print(f"{name} in process {process}: all ended in {two.ended - moment:.2f} s")
    assert two.ended - moment < 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reversed_rows", "error: data: got "),
        ("fewer_rows", "error: data: got "),
        ("other_packages", "error: packages: got "),
    ],
)
def test_processes_that_differ_are_refused(two, name, message):
    assert two.run(faults=change(name, 1)) == [2, 2]
    for i in (0, 1):
        assert two.lines(i)[-1].startswith(message)
        assert "in process 0 and" in two.lines(i)[-1]
    assert not two.workdir.exists()


def test_configs_that_differ_are_refused(two):
    assert two.run(own_flags={1: ("--config.seed=1",)}) == [2, 2]
    for i in (0, 1):
        assert two.lines(i)[-1].startswith("error: config.seed: got 0 in process 0 and 1 in process 1; expected the")


def test_a_workdir_that_not_all_see(two):
    assert two.run(own_flags={1: (f"--workdir={two.workdir}_elsewhere",)}) == [1, 1]
    assert f"{two.workdir}_elsewhere: got another directory here than process 0 has there" in two.lines(0)[-1]
    assert "Put --workdir on a file system that they share" in two.lines(1)[-1]
    assert not (two.workdir / "config.json").exists()


def test_processes_that_cannot_meet(program, tmp_path):
    """The port is taken; srun is not there."""
    log = tmp_path / "log"
    with socket.create_server(("", 0)) as taken:
        for coordinator, status in ((f"localhost:{taken.getsockname()[1]}", 1), ("slurm", 2)):
            flags = (f"--config.distributed.coordinator={coordinator}", f"--workdir={tmp_path}/run")
            assert program.run("train", *FLAGS, *flags, log=log) == status
            assert log.read_text().splitlines()[-1].startswith("error: config.distributed")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_processes_with_two_devices_each(servers, tmp_path, alone):
    """Killed once, continued by two, and by four again."""
    four = Processes(servers, tmp_path, 4)
    flags = ("--config.mesh.data=8",)
    statuses = four.run(*flags, faults={2: {"name": ADVANCE, "call": 10}})
    assert statuses == [1, 1, -signal.SIGKILL, 1], [four.lines(i) for i in range(4)]
    two = Processes(servers, tmp_path, 2)
    assert two.run(faults={1: {"name": ADVANCE, "call": 10}}) == [1, -signal.SIGKILL]
    assert four.run(*flags) == [0] * 4, four.lines(0)
    assert_same_run(four.workdir, alone)


@pytest.fixture
def two_sweeping(servers, tmp_path):
    return Processes(servers, tmp_path, 2, SWEEP_FLAGS)


def ledger(workdir):
    return json.loads((workdir / "sweep.json").read_text())


@pytest.mark.slow
def test_a_sweep(two_sweeping, program, tmp_path):
    """Its members lie over both processes; one dies, one process continues, and then two, until a signal and again."""
    two, log = two_sweeping, tmp_path / "log"
    group = ("--config.sweep.model.hidden=((6,5),(6,5))", "--config.sweep.optimizer.learning_rate=(0.03,1e38)")
    alone = ("train", *SWEEP_FLAGS, *group)
    assert program.run(*alone, f"--workdir={tmp_path}/alone", log=log) == 0, log.read_text()
    assert two.run(*group, faults={1: {"name": ADVANCE, "call": 4}}) == [1, -signal.SIGKILL]
    assert any(line.startswith(LOST) for line in two.lines(0))
    assert "running" in {entry["status"] for entry in ledger(two.workdir)["members"].values()}
    status = program.run(*alone, f"--workdir={two.workdir}", log=log, name=ADVANCE, call=2)
    assert status == -signal.SIGKILL, log.read_text()
    two.start(*group, faults={1: {"name": ADVANCE, "call": 2, "seconds": 1.0}})
    two.wait_for(1, "waiting")
    two.servers[1].signal(signal.SIGTERM)
    assert two.wait() == [128 + signal.SIGTERM] * 2
    assert two.run(*group) == [0, 0], two.lines(0)
    assert "2 members in 1 group, a program each, on 2 x cpu" in two.lines(0)[0]
    assert two.lines(1) == []

    assert ledger(two.workdir) == ledger(tmp_path / "alone")
    assert [entry["status"] for entry in ledger(two.workdir)["members"].values()] == ["done", "diverged"]
    assert leftovers(two.workdir) == []
    for name in ledger(two.workdir)["members"]:
        for got, expected in zip(rows(two.workdir / name), rows(tmp_path / "alone" / name), strict=True):
            assert got.keys() == expected.keys()
            np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.slow
def test_a_sweep_in_batches(two_sweeping, program, tmp_path):
    """Process 0 proposes; both train; one process alone proposes the same."""
    two, log = two_sweeping, tmp_path / "log"
    rates = ("--config.sweep.model.hidden=((6,5),)", "--config.sweep.optimizer.learning_rate=('log_uniform',0.01,0.1)")
    options = [f"--config.sweep_options.{option}" for option in ("mode=optuna", "size=5", "batch=2")]
    alone = ("train", *SWEEP_FLAGS, *rates, *options, f"--workdir={tmp_path}/alone")
    assert program.run(*alone, log=log) == 0, log.read_text()
    assert two.run(*rates, *options) == [0, 0], two.lines(0)
    assert ledger(two.workdir) == ledger(tmp_path / "alone")
    assert [len(batch) for batch in ledger(two.workdir)["proposals"]] == [2, 2, 1]
    assert two.lines(1) == []


@pytest.mark.slow
def test_a_sweep_with_rungs(two_sweeping, program, tmp_path):
    """Both processes stop the same members as one does; one dies at the first ranking, and both continue."""
    two, log = two_sweeping, tmp_path / "log"
    values = (
        f"--config.sweep.model.hidden={((6, 5),) * 4}",
        "--config.sweep.optimizer.learning_rate=(0.03,0.01,0.1,0.3)",
    )
    flags = (*values, "--config.sweep_options.halving=2", "--config.sweep_options.first_rung=0.8")
    assert program.run("train", *SWEEP_FLAGS, *flags, f"--workdir={tmp_path}/alone", log=log) == 0, log.read_text()
    killed = {0: {"name": "vmapbn_flax.sweeps.ledger:Ledger.rank"}}
    assert two.run(*flags, faults=killed) == [-signal.SIGKILL, 1]
    assert {entry["status"] for entry in ledger(two.workdir)["members"].values()} == {"waiting"}
    assert two.run(*flags) == [0, 0], two.lines(0)
    assert ledger(two.workdir) == ledger(tmp_path / "alone")
    assert [len(names) for names in ledger(two.workdir)["groups"]] == [4, 2, 1]
    assert leftovers(two.workdir) == []
    for name in ledger(two.workdir)["members"]:
        for got, expected in zip(rows(two.workdir / name), rows(tmp_path / "alone" / name), strict=True):
            assert got.keys() == expected.keys()
            np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.slow
def test_members_are_saved_where_they_lie(two_sweeping, program, tmp_path):
    """Each by the process on whose devices it lies, in the form of one saved by a single process."""
    two, log = two_sweeping, tmp_path / "log"
    group = ("--config.sweep.model.hidden=((6,5),(6,5))", "--config.sweep.optimizer.learning_rate=(0.03,0.01)")
    alone = tmp_path / "alone"
    assert program.run("train", *SWEEP_FLAGS, *group, f"--workdir={alone}", log=log) == 0, log.read_text()
    assert two.run(*group, faults=change("noted_saves", 0) | change("noted_saves", 1)) == [0, 0], two.lines(0)
    for i, name in enumerate(ledger(two.workdir)["members"]):
        directory = two.workdir / name / "checkpoints"
        assert f"saving in {directory}" in two.lines(i)
        assert f"saving in {directory}" not in two.lines(1 - i)
        best = json.loads((two.workdir / name / "summary.json").read_text())["best_step"]
        assert set(saved_steps(directory)) == {best, 10}
        files = [
            sorted(path.relative_to(place) for path in (place / name / "checkpoints").rglob("*[!0-9a-f]"))
            for place in (two.workdir, alone)
        ]
        assert files[0] == files[1]
        for step in {best, 10}:
            states = [state_bytes(place / name, step) for place in (two.workdir, alone)]
            assert states[0].keys() == states[1].keys()
            for leaf, (dtype, shape, content) in states[0].items():
                assert states[1][leaf][:2] == (dtype, shape)
                got, expected = (np.frombuffer(state, dtype) for state in (content, states[1][leaf][2]))
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=leaf)


@pytest.mark.slow
def test_a_group_that_fails(two_sweeping):
    """Something else is in the place of its checkpoints; the others, of one member each, are trained."""
    two = two_sweeping
    (two.workdir / "groups").mkdir(parents=True)
    (two.workdir / "groups" / "0").write_text("")
    assert two.run("--config.sweep_options.chunk=1") == [1, 1]
    statuses = [entry["status"] for entry in ledger(two.workdir)["members"].values()]
    assert statuses == ["failed", "diverged", "done", "done"]
    assert two.lines(1) == []
