import time
from types import SimpleNamespace

import pytest
from program import CONFIG, Program

from vmapbn_flax.checkpoint import saved_steps


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where processes keep their compiled programs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def program(cache):
    program = Program(cache)
    yield program
    program.close()


@pytest.fixture(scope="session")
def undisturbed(program, tmp_path_factory):
    """A run that nothing happened to: its workdir, its seconds, and how many changes to files it made."""
    place = tmp_path_factory.mktemp("undisturbed")
    for workdir in (place / "cold", place / "run"):  # the first one fills the cache
        started = time.monotonic()
        faults = {"inside": str(workdir), "count": str(place / "count")}
        status = program.run("train", CONFIG, f"--workdir={workdir}", log=place / "log", **faults)
        assert status == 0, (place / "log").read_text()
    seconds = time.monotonic() - started
    return SimpleNamespace(workdir=workdir, seconds=seconds, changes=int((place / "count").read_text()))


@pytest.fixture(scope="session")
def killed(program, tmp_path_factory):
    """The workdir of a run killed after step 26; its two newest checkpoints are of 21 and 24."""
    place = tmp_path_factory.mktemp("killed")
    program.run(
        "train",
        CONFIG,
        f"--workdir={place}/run",
        log=place / "log",
        name="vmapbn_flax.checkpoint:Checkpoints.save",
        call=9,
    )
    assert saved_steps(place / "run" / "checkpoints")[-2:] == [21, 24]
    return place / "run"


@pytest.fixture
def run(tmp_path, program):
    """A run of its own: its workdir, the output of its processes, and ways to start and to wait for one."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    command = ("train", CONFIG, f"--workdir={workdir}")

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
