import functools
import shutil
import time
from types import SimpleNamespace

import pytest

from tests.helpers.program import CONFIG, EXTENDED_SWEEP, HALVING_SWEEP, SWEEP, Program
from tests.helpers.runs import outcome
from vmapbn_flax.runs.checkpoints import saved_steps


@pytest.fixture(scope="session")
def program():
    program = Program()
    yield program
    program.close()


def train(config):
    return lambda workdir: ("train", config, f"--workdir={workdir}")


def refresh(workdir):
    return ("refresh", workdir)


class Undisturbed:
    """What a command does that nothing happens to.

    Attributes:
      before: the workdir that the command finds; None for none.
      workdir: what becomes of it.
      outcome: of `workdir`.
      changes: how many changes to files the command makes.
      seconds: how long the command takes when it finds its programs compiled.
    """

    def __init__(self, program, command, place, before=None):
        self._program, self._command, self._place, self.before = program, command, place, before
        self.workdir = place / "run"
        self._finish(self.workdir, inside=str(self.workdir), count=str(place / "count"))
        self.outcome = outcome(self.workdir)
        self.changes = int((place / "count").read_text())

    @functools.cached_property
    def seconds(self):
        self.restore(self._place / "again")
        started = time.monotonic()
        self._finish(self._place / "again")
        return time.monotonic() - started

    def restore(self, workdir):
        """Makes `workdir` what the command finds."""
        shutil.rmtree(workdir, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, workdir)

    def _finish(self, workdir, **fault):
        self.restore(workdir)
        log = self._place / "log"
        assert self._program.run(*self._command(workdir), log=log, **fault) == 0, log.read_text()


@pytest.fixture(scope="session")
def undisturbed(program, tmp_path_factory):
    return Undisturbed(program, train(CONFIG), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def undisturbed_sweep(program, tmp_path_factory):
    return Undisturbed(program, train(SWEEP), tmp_path_factory.mktemp("undisturbed_sweep"))


@pytest.fixture(scope="session")
def undisturbed_extension(program, undisturbed_sweep, tmp_path_factory):
    """Of a finished sweep."""
    place = tmp_path_factory.mktemp("undisturbed_extension")
    return Undisturbed(program, train(EXTENDED_SWEEP), place, undisturbed_sweep.workdir)


@pytest.fixture(scope="session")
def undisturbed_halving(program, tmp_path_factory):
    return Undisturbed(program, train(HALVING_SWEEP), tmp_path_factory.mktemp("undisturbed_halving"))


@pytest.fixture(scope="session")
def undisturbed_refresh(program, undisturbed, tmp_path_factory):
    """Of a run that was refreshed before, from another checkpoint."""
    place = tmp_path_factory.mktemp("undisturbed_refresh")
    before = shutil.copytree(undisturbed.workdir, place / "before")
    assert program.run("refresh", before, "--step=27", log=place / "log") == 0
    return Undisturbed(program, refresh, place, before)


@pytest.fixture(scope="session")
def killed(program, tmp_path_factory):
    """The workdir of a run killed after step 26; its two newest checkpoints are of 21 and 24."""
    place = tmp_path_factory.mktemp("killed")
    program.run(
        "train",
        CONFIG,
        f"--workdir={place}/run",
        log=place / "log",
        name="vmapbn_flax.runs.checkpoints:Checkpoints.save",
        call=9,
    )
    assert saved_steps(place / "run" / "checkpoints")[-2:] == [21, 24]
    return place / "run"


@pytest.fixture
def run(tmp_path, program):
    """A run of its own: its workdir, the output of its processes, and ways to start and to wait for one."""
    return control(program, train(CONFIG), tmp_path)


@pytest.fixture
def sweep(tmp_path, program):
    """The same of a sweep."""
    return control(program, train(SWEEP), tmp_path)


@pytest.fixture
def extension(tmp_path, program):
    """The same of its extension."""
    return control(program, train(EXTENDED_SWEEP), tmp_path)


@pytest.fixture
def halving(tmp_path, program):
    """The same of a sweep with rungs."""
    return control(program, train(HALVING_SWEEP), tmp_path)


@pytest.fixture
def refreshing(tmp_path, program):
    """The same of a refresh."""
    return control(program, refresh, tmp_path)


def control(program, command, place):
    workdir, log = place / "run", place / "log"

    def start(*flags, **fault):
        log.write_text("")
        program.start(*command(workdir), *flags, log=log, **fault)

    def finish(*flags, **fault):
        start(*flags, **fault)
        return program.wait()

    def wait_for(text):
        while text not in log.read_text():
            assert program.wait(0.01) is None, log.read_text()

    return SimpleNamespace(
        workdir=workdir,
        start=start,
        finish=finish,
        wait=program.wait,
        signal=program.signal,
        wait_for=wait_for,
        lines=lambda: log.read_text().splitlines(),
    )
