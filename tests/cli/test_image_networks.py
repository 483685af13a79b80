"""Networks of images, the package's and one's own, by the real command line: killed, on two devices, in two processes.

On the first images of MNIST: python -m pytest -n0 -m slow -s tests/cli/test_image_networks.py
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import small
from tests.helpers.program import ROOT, environment
from tests.helpers.runs import leftovers, outcome, state_bytes
from vmapbn_flax.runs.checkpoints import saved_steps

pytestmark = pytest.mark.slow

# 64 steps and as many rows, 8 evaluations. Not Adam: it makes a step of whatever rounding leaves of a gradient of zero.
SHORT = (
    "--config.data.name=npz",
    "--config.optimizer.name=sgd",
    "--config.optimizer.warmup_epochs=0.0",
    "--config.train.batch_size=64",
    "--config.train.num_epochs=2.0",
    "--config.train.log_every=1",
    "--config.train.eval_every=0.25",
)
CONV = ("--config=configs/conv.py", "--config.model.features=(2,3)", *SHORT)
RESNET = ("--config=configs/conv.py", "--config.model.name=resnet", "--config.model.blocks=(1,1)", *SHORT)
OWN = ("--config=configs/own_network.py", "--config.model.width=2", *SHORT)
WITH_TWIN = ("--config=configs/own_network.py", "--config.model.name=tests.training.test_own_network:Net", *SHORT)
NETWORKS = {"conv": CONV, "own": OWN}
SWEEP = (
    "--config=configs/sweep_conv.py",
    "--config.model.features=(2,3)",
    *SHORT,
    "--config.data.validation_size=256",
    "--config.sweep.optimizer.learning_rate=(0.002,0.005,0.01,0.02,0.03,0.05)",
)
SECONDS = 500  # a limit for what takes a minute on a machine that is not this busy


class Command:
    """A process of the program, and what it says.

    Attributes:
      data: the flag that says where the data set is.
    """

    data = ""

    def __init__(self, log, *argv):
        self.log = log
        data = [self.data] if any("--config=" in str(argument) for argument in argv) else []
        command = [sys.executable, "-m", "vmapbn_flax", *map(str, argv), *data]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=own_devices())

    def end(self):
        """The exit status."""
        return self.process.wait(SECONDS)

    def kill_after_a_save(self, checkpoints):
        """Kills the process when the first checkpoint is whole."""
        while not (checkpoints.exists() and saved_steps(checkpoints)):
            assert self.process.poll() is None, self.said
            time.sleep(0.01)
        self.process.kill()

    @property
    def said(self):
        return self.log.read_text()


def own_devices():
    """The environment of a process that divides its CPU itself."""
    return {name: value for name, value in environment().items() if name != "JAX_NUM_CPU_DEVICES"}


@pytest.fixture(scope="module", autouse=True)
def first_images(tmp_path_factory):
    """A data set that evaluates in no time, where the commands look for it."""
    mnist, directory = small.mnist(), tmp_path_factory.mktemp("data")
    splits = {"train": mnist.train[:2048], "test": mnist.test[:500]}
    images = {f"{name}_images": split.images for name, split in splits.items()}
    labels = {f"{name}_labels": split.labels for name, split in splits.items()}
    np.savez(directory / "first.npz", **images, **labels)
    Command.data = f"--config.data.dir={directory}"


def run(place, *argv):
    """What a command that succeeds says."""
    command = Command(place / "log", *argv)
    assert command.end() == 0, command.said
    return command.said


@pytest.fixture(scope="module", params=NETWORKS)
def alone(request, tmp_path_factory):
    """The flags of a run, and its workdir, of one process on one device."""
    place, flags = tmp_path_factory.mktemp(request.param), NETWORKS[request.param]
    run(place, "train", *flags, f"--workdir={place}/run")
    return flags, place / "run"


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(workdir, other):
    """Rows, and parameters and statistics at the end, to 1e-5; returns how far they are apart."""
    apart = {"rows": 0.0, "arrays": 0.0}
    assert len(rows(workdir)) == len(rows(other)) == 64 + 8
    for got, expected in zip(rows(workdir), rows(other), strict=True):
        assert got.keys() == expected.keys()
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)
        pairs = zip(got.values(), expected.values(), strict=True)
        apart["rows"] = max(apart["rows"], *(abs(a - b) / abs(b or 1) for a, b in pairs))
    states = [state_bytes(place, 64) for place in (workdir, other)]
    for name in states[1]:
        if name.startswith((".params", ".batch_stats")):
            got, expected = (np.frombuffer(state[name][2], state[name][0]) for state in states)
            difference = np.abs(got - expected).max() / max(np.abs(expected).max(), 0.1)
            assert difference <= 1e-5, name
            apart["arrays"] = max(apart["arrays"], difference)
    print(f"\n{workdir}: rows within {apart['rows']:.1e}, arrays within {apart['arrays']:.1e}")


def test_a_sweep_of_six_is_killed(tmp_path):
    """The same ledger, rows, report, and checkpoints to the bit, as undisturbed."""
    undisturbed, killed = tmp_path / "undisturbed" / "run", tmp_path / "killed" / "run"
    assert "6 members in 1 group" in run(tmp_path, "train", *SWEEP, f"--workdir={undisturbed}")
    command = Command(tmp_path / "log", "train", *SWEEP, f"--workdir={killed}")
    command.kill_after_a_save(killed / "groups" / "0" / "checkpoints")
    assert command.end() == -signal.SIGKILL
    members = json.loads((killed / "sweep.json").read_text())["members"]
    assert {member["status"] for member in members.values()} == {"running"}
    (step, *_) = reversed(saved_steps(killed / "groups" / "0" / "checkpoints"))
    steps = re.findall(r"step (\d+) of 56", run(tmp_path, "train", *SWEEP, f"--workdir={killed}"))
    assert min(map(int, steps)) > step
    assert outcome(killed) == outcome(undisturbed)
    assert leftovers(killed) == []
    print(f"\nkilled, and resumed at step {step} of 56")


def distributed(place, workdir, flags):
    """A run in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = (f"--workdir={workdir}", f"--config.distributed.coordinator={address}")
    count = "--config.distributed.num_processes=2"
    return [
        Command(place / f"log{i}", "train", *flags, *common, count, f"--config.distributed.process_id={i}")
        for i in range(2)
    ]


def test_two_processes(alone, tmp_path):
    """The numbers of one process."""
    flags, expected = alone
    both = distributed(tmp_path, tmp_path / "run", flags)
    assert [command.end() for command in both] == [0, 0], (both[0].said, both[1].said)
    assert "on 2 x cpu, batches split over 2 and the data set on each" in both[0].said
    assert_same_run(tmp_path / "run", expected)
    assert outcome(tmp_path / "run")["config.json"] == outcome(expected)["config.json"]


def test_two_processes_are_continued_by_one(alone, tmp_path):
    """One of them is killed, and the other ends."""
    flags, expected = alone
    both = distributed(tmp_path, tmp_path / "run", flags)
    both[1].kill_after_a_save(tmp_path / "run" / "checkpoints")
    assert [command.end() for command in both] == [1, -signal.SIGKILL], both[0].said
    step = saved_steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"resuming at step {step} of 64" in run(tmp_path, "train", *flags, f"--workdir={tmp_path}/run")
    assert step < 64
    assert_same_run(tmp_path / "run", expected)


def test_two_devices(alone, tmp_path):
    flags, expected = alone
    said = run(tmp_path, "train", *flags, "--config.mesh.data=2", f"--workdir={tmp_path}/run")
    assert "on 2 x cpu, batches split over 2 and the data set on each" in said
    assert_same_run(tmp_path / "run", expected)
    more = ("--config.train.num_epochs=2.25", f"--workdir={tmp_path}/run")
    assert "resuming at step 64 of 72" in run(tmp_path, "train", *flags, *more)


@pytest.mark.parametrize("flags", [CONV, RESNET, WITH_TWIN, OWN], ids=["conv", "resnet", "with_twin", "own"])
def test_selftest(tmp_path, flags):
    """Stopped and resumed; and, but for the one without a batched twin, parity; and refresh."""
    said = run(tmp_path, "selftest", *flags)
    assert ("has no batched twin" in said) == (flags is OWN)
    assert said.count(" yes ") == 4 + (flags is not OWN)
    assert " NO" not in said


@pytest.mark.parametrize("flags", [CONV, RESNET, WITH_TWIN], ids=["conv", "resnet", "with_twin"])
def test_parity(tmp_path, flags):
    said = run(tmp_path, "parity", *flags)
    print(said)
    assert said.count(" yes ") == 7


@pytest.mark.parametrize("flags", [CONV, RESNET, OWN], ids=["conv", "resnet", "own"])
def test_refresh(tmp_path, flags):
    """After training with a momentum that leaves the statistics behind: accuracy and loss as the logs have them."""
    workdir = tmp_path / "run"
    run(tmp_path, "train", *flags, f"--workdir={workdir}")
    network = ("--network=configs.own_network:Net",) if flags is OWN else ()
    run(tmp_path, "refresh", workdir, *network)
    figures = json.loads((workdir / "refreshed" / "refresh.json").read_text())
    assert {name: figures["before"][name] for name in ("test_loss", "test_accuracy")} == {
        name: rows(workdir)[-1][name] for name in ("test_loss", "test_accuracy")
    }
    printed = dict(line.split() for line in run(tmp_path, "evaluate", workdir / "refreshed", *network).splitlines())
    assert float(printed["test_loss"]) == figures["after"]["test_loss"] != figures["before"]["test_loss"]
