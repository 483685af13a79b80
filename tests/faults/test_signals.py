"""SIGTERM and SIGINT: finish the chunk, save, say so; a second one ends it at once."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.program import ROOT
from tests.helpers.runs import leftovers, outcome
from vmapbn_flax.runs.checkpoints import saved_steps

ADVANCE = "vmapbn_flax.training.programs:Programs.advance"
EVALUATE = "vmapbn_flax.training.programs:Programs.measure"


@pytest.mark.parametrize(
    ("signum", "name", "call"),
    [
        (signal.SIGTERM, ADVANCE, 5),
        (signal.SIGINT, ADVANCE, 1),
        (signal.SIGTERM, EVALUATE, 2),
        (signal.SIGINT, EVALUATE, 10),  # the last
    ],
)
def test_stops_where_it_can_go_on(run, undisturbed, signum, name, call):
    run.start(name=name, call=call, seconds=0.5)
    run.wait_for("waiting")
    run.signal(signum)
    assert run.wait() == 128 + signum
    said = re.fullmatch(r"note: stopped at step (\d+), which is saved; the same command resumes", run.lines()[-1])
    assert said, run.lines()
    steps = saved_steps(run.workdir / "checkpoints")
    assert steps[-1] == int(said[1])
    assert leftovers(run.workdir) == []
    assert run.finish() == 0
    assert f"resuming at step {steps[-1]} of 30" in run.lines()[0]
    assert outcome(run.workdir) == undisturbed.outcome


def test_a_second_one_ends_it_at_once(run, undisturbed):
    run.start(name=EVALUATE, call=2, seconds=60)
    run.wait_for("waiting")
    run.signal(signal.SIGTERM)
    assert run.wait(0.5) is None  # the first waits for the evaluation
    started = time.monotonic()
    run.signal(signal.SIGINT)
    assert run.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM)  # on a busy machine both are handled at once
    assert time.monotonic() - started < 5
    assert run.finish() == 0
    assert outcome(run.workdir) == undisturbed.outcome


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [["train.py"], ["-m", "vmapbn_flax", "train"]], ids=["train.py", "vmapbn_flax"])
def test_while_it_imports(tmp_path, command, signum):
    (tmp_path / "jax.py").write_text(f"import os, time; os.kill(os.getpid(), {signum:d}); time.sleep(60)")
    argv = [sys.executable, *command, "--config=configs/tiny.py", f"--workdir={tmp_path}/run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (128 + signum, "")
    assert process.stderr == "note: stopped; the same command starts again\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_anything_to_save(run, signum):
    run.start(name="vmapbn_flax.runs.train:load_dataset", seconds=60)
    run.wait_for("waiting")
    run.signal(signum)
    assert run.wait() == 128 + signum
    assert run.lines()[-1] == "note: stopped; the same command starts again"
    assert not run.workdir.exists()


OTHERS = {
    "evaluate": (["{run}"], "load_dataset"),
    "refresh": (["{run}"], "load_dataset"),
    "parity": (["--config=configs/tiny.py"], "load_dataset"),
    "selftest": (["--config=configs/tiny.py"], "_train"),
    "plot": (["{run}", "-o", "{log}.png"], "plot_runs"),
    "report": (["{run}"], "report"),
}


@pytest.mark.parametrize(("command", "arguments", "function"), [(name, *rest) for name, rest in OTHERS.items()])
def test_other_commands(program, undisturbed, tmp_path, command, arguments, function):
    log = tmp_path / "log"
    argv = [argument.format(run=undisturbed.workdir, log=log) for argument in arguments]
    program.start(command, *argv, log=log, name=f"vmapbn_flax.cli.{command}:{function}", seconds=60)
    while not (log.exists() and "waiting" in log.read_text()):
        assert program.wait(0.01) is None, log.read_text()
    program.signal(signal.SIGINT)
    assert program.wait() == 128 + signal.SIGINT
    assert log.read_text().splitlines()[-1] == "note: stopped; the same command starts again"


def test_while_the_picture_is_drawn(run, undisturbed):
    """Nothing is left to stop: the run finishes."""
    run.start(name="vmapbn_flax.runs.pictures:plot_runs", seconds=0.5)
    run.wait_for("waiting")
    run.signal(signal.SIGTERM)
    assert run.wait() == 0
    assert outcome(run.workdir) == undisturbed.outcome
