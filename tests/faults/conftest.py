import functools
import time
from types import SimpleNamespace

import pytest

from tests.helpers.program import CONFIG, SWEEP, Program
from vmapbn_flax.runs.checkpoints import saved_steps


@pytest.fixture(scope="session")
def program():
    program = Program()
    yield program
    program.close()


class Undisturbed:
    """A run, or a sweep, that nothing happened to: its workdir, and how many changes to files it made."""

    def __init__(self, program, config, place):
        self._command, self._program, self._place = ("train", config), program, place
        self.workdir = place / "run"
        self._finish(self.workdir, inside=str(self.workdir), count=str(place / "count"))
        self.changes = int((place / "count").read_text())

    @functools.cached_property
    def seconds(self):
        """How long such a run takes when it finds its programs compiled."""
        started = time.monotonic()
        self._finish(self._place / "again")
        return time.monotonic() - started

    def _finish(self, workdir, **fault):
        log = self._place / "log"
        assert self._program.run(*self._command, f"--workdir={workdir}", log=log, **fault) == 0, log.read_text()


@pytest.fixture(scope="session")
def undisturbed(program, tmp_path_factory):
    return Undisturbed(program, CONFIG, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def undisturbed_sweep(program, tmp_path_factory):
    return Undisturbed(program, SWEEP, tmp_path_factory.mktemp("undisturbed_sweep"))


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
    return control(program, CONFIG, tmp_path)


@pytest.fixture
def sweep(tmp_path, program):
    """The same of a sweep."""
    return control(program, SWEEP, tmp_path)


def control(program, config, place):
    workdir, log = place / "run", place / "log"
    command = ("train", config, f"--workdir={workdir}")

    def start(*flags, **fault):
        log.write_text("")
        program.start(*command, *flags, log=log, **fault)

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
