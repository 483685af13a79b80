"""SIGKILL at any moment: the same command continues, and what it ends with is what was never disturbed.

The long suite, with its figures: python -m pytest -n0 -m slow -s tests/faults/test_kills.py
"""

import collections
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import Undisturbed, control, train
from tests.helpers.program import ROOT, environment
from tests.helpers.runs import leftovers, mirrored, outcome
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.ledger import Ledger

SEED = 20250711
SLOW_KILLS, SLOW_SWEEP_KILLS, SLOW_EXTENSION_KILLS, SLOW_REFRESH_KILLS = 140, 60, 60, 60
SLOW_HALVING_KILLS, SLOW_PROPOSAL_KILLS = 10, 10
TOTAL = 30

# In the order of a run's life.
PHASES = {
    "data": "vmapbn_flax.runs.train:load_dataset",
    "restore": "vmapbn_flax.runs.restoring:restore_latest",
    "log": "vmapbn_flax.runs.record:MetricWriter",
    "config": "vmapbn_flax.runs.workdir:write_json",
    "compile": "vmapbn_flax.training.compiler:Compiler.start",
    "train": "vmapbn_flax.training.programs:Programs.advance",
    "evaluate": "vmapbn_flax.training.programs:Programs.measure",
    "row": "vmapbn_flax.files:AppendLog.append",
    "save": "vmapbn_flax.runs.checkpoints:Checkpoints.save",
    "commit": "vmapbn_flax.runs.checkpoints:Checkpoints._write_sums",
    "retire": "vmapbn_flax.runs.checkpoints:shutil.rmtree",
    "hparams": "vmapbn_flax.runs.metric_writer:MetricWriter.write_hparams",
    "picture": "vmapbn_flax.runs.pictures:write_whole",
    "summary": "vmapbn_flax.runs.train:table",
}

# The same of a sweep: a function, and which of its calls.
SWEEP_PHASES = {
    "ledger": ("vmapbn_flax.sweeps.ledger:Ledger.write", 1),
    "config": ("vmapbn_flax.runs.workdir:write_json", 2),
    "config of a member": ("vmapbn_flax.runs.workdir:write_json", 4),
    "a step in the ledger": ("vmapbn_flax.sweeps.ledger:Ledger.write", 3),
    "divergence in the ledger": ("vmapbn_flax.sweeps.ledger:Ledger.mark", 2),
    "checkpoint of a member": ("vmapbn_flax.sweeps.train:save_members", 1),
    "end of a group in the ledger": ("vmapbn_flax.sweeps.ledger:Ledger.mark", 2),
    "between members of the second group": ("vmapbn_flax.runs.record:Record.finish", 2),
    "removal of a group's checkpoints": ("vmapbn_flax.files:shutil.rmtree", 2),
    "report": ("vmapbn_flax.sweeps.report:report", 1),
    "picture": ("vmapbn_flax.runs.pictures:write_whole", 1),
}

# Of an extension of that sweep. Of the plan, each write is in tests/sweeps/test_plan.py.
EXTENSION_PHASES = {
    "config of a member": ("vmapbn_flax.runs.workdir:write_json", 2),
    "config": ("vmapbn_flax.runs.workdir:write_json", 4),
    "ledger": ("vmapbn_flax.runs.workdir:write_json", 5),
    "checkpoint of a member": ("vmapbn_flax.sweeps.train:save_members", 1),
    "removal of a group's checkpoints": ("vmapbn_flax.sweeps.train:remove_directory", 3),
}

# Of a sweep with rungs.
HALVING_PHASES = {
    "checkpoint of a member at the first rung": ("vmapbn_flax.sweeps.train:save_members", 1),
    "removal of a group's checkpoints there": ("vmapbn_flax.sweeps.train:remove_directory", 1),
    "ranking": ("vmapbn_flax.sweeps.ledger:Ledger.rank", 1),
    "the ledger with the ranks": ("vmapbn_flax.sweeps.train:SweepProgress.start", 1),
    "first start from the members' own checkpoints": ("vmapbn_flax.runs.restoring:_restore_own", 1),
    "first save after the rung": ("vmapbn_flax.runs.checkpoints:Checkpoints.save", 1),
    "a removal after the first rung": ("vmapbn_flax.runs.checkpoints:shutil.rmtree", 2),
    "end of the second rung": ("vmapbn_flax.sweeps.ledger:Ledger.mark", 2),
    "second ranking": ("vmapbn_flax.sweeps.ledger:Ledger.rank", 1),
    "summary": ("vmapbn_flax.runs.record:Record.finish", 1),
}

REFRESH_PHASES = {
    "removal of the one before": ("vmapbn_flax.files:shutil.rmtree", 2),
    "config": ("vmapbn_flax.runs.workdir:write_json", 2),
    "commit": ("vmapbn_flax.runs.checkpoints:Checkpoints._write_sums", 1),
}


def check(run, undisturbed):
    assert outcome(run.workdir) == undisturbed.outcome
    assert leftovers(run.workdir) == []
    assert not list(run.workdir.rglob("damaged"))
    assert len(saved_steps(run.workdir / "checkpoints")) <= 3
    assert not list(run.workdir.glob("groups/*"))


def test_killed_once_in_each_phase(run, undisturbed):
    """One run, killed again and again on its way."""
    for phase, name in PHASES.items():
        status = run.finish(name=name)
        assert status == -signal.SIGKILL, (phase, run.lines())
    assert run.finish() == 0, run.lines()
    check(run, undisturbed)


@pytest.mark.slow
def test_sweep_killed_once_in_each_phase(sweep, undisturbed_sweep):
    kill_in_each(SWEEP_PHASES, sweep)
    check(sweep, undisturbed_sweep)


@pytest.mark.slow
def test_extension_killed_once_in_each_phase(sweep, extension, undisturbed_extension):
    """Of a sweep that was killed itself."""
    assert sweep.finish(name="vmapbn_flax.runs.record:Record.finish", call=2) == -signal.SIGKILL
    kill_in_each(EXTENSION_PHASES, extension)
    check(extension, undisturbed_extension)
    assert sweep.finish() == 1
    assert "got a sweep without its member hidden=4,learning_rate=0.02" in "".join(sweep.lines())


@pytest.mark.slow
def test_halving_killed_once_in_each_phase(halving, undisturbed_halving):
    statuses = [entry["status"] for entry in Ledger(Workdir(undisturbed_halving.workdir)).members.values()]
    assert collections.Counter(statuses) == {"stopped": 4, "diverged": 1, "done": 1}
    kill_in_each(HALVING_PHASES, halving)
    check(halving, undisturbed_halving)


def test_refresh_killed_once_in_each_phase(refreshing, undisturbed_refresh):
    undisturbed_refresh.restore(refreshing.workdir)
    kill_in_each(REFRESH_PHASES, refreshing)
    check(refreshing, undisturbed_refresh)


def kill_in_each(phases, run):
    for phase, (name, call) in phases.items():
        status = run.finish(name=name, call=call)
        assert status == -signal.SIGKILL, (phase, run.lines())
        require_marked(run.workdir)
    assert run.finish() == 0, run.lines()


def require_marked(workdir):
    """Refreshed statistics, or a part of them, that training would take for a run."""
    refreshed = Workdir(workdir).refreshed
    assert refreshed.is_refreshed or not (refreshed.config.exists() or refreshed.checkpoints.exists())


def torment(run, undisturbed, rng, kills):
    """Kills runs at random, half the time by the clock and half by the file operation; returns what they were at."""
    phases, seconds = collections.Counter(), undisturbed.seconds
    while phases.total() < kills:
        undisturbed.restore(run.workdir)
        status = None
        while status != 0:
            if rng.random() < 0.5:
                run.start()
                status = run.wait(rng.uniform(0, seconds))
                if status is None:
                    run.signal(signal.SIGKILL)
                    status = run.wait()
            else:
                status = run.finish(inside=str(run.workdir), change=rng.randint(1, undisturbed.changes))
            assert status in (0, -signal.SIGKILL), run.lines()
            if status:
                phases[phase(run)] += 1
                require_marked(run.workdir)
        check(run, undisturbed)
    return phases


def phase(run):
    """What a killed process was at, as far as files and output tell."""
    last = run.lines()[-1] if run.lines() else ""
    if last.startswith("killed before "):
        places = {"/checkpoints": "a checkpoint", "sweep.json": "the ledger", "": "another file"}
        return "writing " + next(place for part, place in places.items() if part in last)
    if not run.lines():
        return "start-up"
    if is_trained(run.workdir):
        return "picture and summary"
    if "step" not in "".join(run.lines()[1:]):
        return "compilation and first steps"
    return "steps, evaluations and saves"


def is_trained(workdir):
    ledger = Ledger(Workdir(workdir))
    if ledger.members:
        return all(ledger.is_over(name) for name in ledger.members)
    return TOTAL in saved_steps(workdir / "checkpoints")


@pytest.mark.slow
def test_killed_at_random(run, undisturbed):
    phases = torment(run, undisturbed, random.Random(SEED), kills=6)
    assert phases.total() >= 6


@pytest.mark.slow
def test_killed_at_random_at_length(run, undisturbed):
    at_length(run, undisturbed, SLOW_KILLS)


@pytest.mark.slow
def test_sweep_killed_at_random_at_length(sweep, undisturbed_sweep):
    at_length(sweep, undisturbed_sweep, SLOW_SWEEP_KILLS)


@pytest.mark.slow
def test_extension_killed_at_random_at_length(extension, undisturbed_extension):
    at_length(extension, undisturbed_extension, SLOW_EXTENSION_KILLS)


@pytest.mark.slow
def test_halving_killed_at_random_at_length(halving, undisturbed_halving):
    at_length(halving, undisturbed_halving, SLOW_HALVING_KILLS)


@pytest.mark.slow
def test_refresh_killed_at_random_at_length(refreshing, undisturbed_refresh):
    at_length(refreshing, undisturbed_refresh, SLOW_REFRESH_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("rungs", ["", ":halving"])
def test_proposals_killed_at_random(rungs, program, tmp_path):
    """What is proposed after a kill is what an undisturbed sweep proposes, with or without rungs."""
    command = train(f"--config=tests/helpers/fault_optuna_config.py{rungs}")
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Undisturbed(program, command, tmp_path / "undisturbed")
    run = control(program, command, tmp_path)
    started = time.monotonic()
    phases = torment(run, undisturbed, random.Random(SEED + 2), SLOW_PROPOSAL_KILLS)
    print(f"\n{phases.total()} kills, seed {SEED + 2}, {time.monotonic() - started:.0f} s: {dict(phases)}")
    found = mirrored(run.workdir)
    assert found == mirrored(undisturbed.workdir)
    assert len(found) == len(Ledger(Workdir(run.workdir)).members) == 14


def at_length(run, undisturbed, kills):
    started = time.monotonic()
    phases = torment(run, undisturbed, random.Random(SEED + 1), kills)
    print(f"\n{phases.total()} kills, seed {SEED + 1}, {time.monotonic() - started:.0f} s: {dict(phases)}")


@pytest.mark.slow
def test_train_py(tmp_path):
    """The real program on the real data: killed at its first words, interrupted later, killed while it imports."""
    command = [sys.executable, "train.py", "--config=configs/tiny.py"]

    def run(workdir, last_words=None, signum=0):
        argv = [*command, f"--workdir={workdir}"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as process:
            if last_words == "":
                time.sleep(0.5)
            while last_words and last_words not in process.stderr.readline():
                assert process.poll() is None
            if signum:
                process.send_signal(signum)
            said = process.stderr.read()
        return process.returncode, said

    disturbed, undisturbed = tmp_path / "disturbed" / "run", tmp_path / "undisturbed" / "run"
    assert run(disturbed, "starting of 47 steps", signal.SIGKILL)[0] == -signal.SIGKILL
    status, said = run(disturbed, "step 23 of 47", signal.SIGINT)
    assert status == 128 + signal.SIGINT
    assert re.search(r"^note: stopped at step \d+, which is saved; the same command resumes$", said, re.MULTILINE)
    assert run(disturbed, "", signal.SIGKILL)[0] == -signal.SIGKILL
    assert run(disturbed)[0] == run(undisturbed)[0] == 0
    assert outcome(disturbed) == outcome(undisturbed)
    assert leftovers(disturbed) == []
