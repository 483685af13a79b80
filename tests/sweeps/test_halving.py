"""Successive halving: who is stopped and who trains on, with the bits of the sweep without rungs."""

import shutil
import signal

import pytest

from configs import saved
from tests.helpers import small
from tests.helpers.runs import command, outcome
from tests.sweeps.test_sweep import figures, ledger_of, rows, sweep_config
from vmapbn_flax.errors import Interrupted
from vmapbn_flax.runs import train as run
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.sweeps import plan
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.sweeps.expand import expand
from vmapbn_flax.training.programs import Programs

HALVING = {"sweep_options__halving": 3}
RUNG = {"sweep_options__first_rung": 0.8, "train__eval_every": 0.8}
RUNGS, END = (4, 12), 20  # steps: after 0.8 and 2.4 epochs, and of 4


def config(swept=None, **changes):
    """A sweep of small runs, 5 steps to an epoch, which are evaluated every 4 steps."""
    return sweep_config(swept, data__name="small", **RUNG, **changes)


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch:
        for module in (plan, run):
            patch.setattr(module, "load_dataset", small.load)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished sweep of eight members without rungs."""
    workdir = tmp_path_factory.mktemp("plain") / "sweep"
    sweep.train_sweep(config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The same sweep with two rungs."""
    workdir = tmp_path_factory.mktemp("halved") / "sweep"
    sweep.train_sweep(config(**HALVING), workdir)
    return workdir


@pytest.fixture
def copy_of_halved(halved, tmp_path):
    return shutil.copytree(halved, tmp_path / "sweep")


def accuracy(workdir, step):
    (found,) = (row["validation_accuracy"] for row in rows(workdir) if row["step"] == step and "test_loss" in row)
    return found


def expected_ledger(plain, names):
    """What two rungs make of the members `names`, from their rows in the sweep without rungs."""
    members = {}
    for rung, (step, epochs) in enumerate(zip(RUNGS, ("0.8", "2.4"), strict=True)):
        ranked = sorted(names, key=lambda name: -accuracy(plain / name, step))  # equals stay in the order of the sweep
        kept = max(1, len(ranked) // 3)
        for rank, name in enumerate(ranked[kept:], start=kept + 1):
            go = "goes" if kept == 1 else "go"
            reason = f"rung {rung}, after {epochs} epochs: rank {rank} of {len(ranked)}, of which {kept} {go} on"
            members[name] = {"status": "stopped", "step": step, "reason": reason, "rung": rung, "rank": rank}
        names = [name for name in names if name in ranked[:kept]]
    return members | {name: {"status": "done", "step": END, "reason": ""} for name in names}


def require_members_of_the_plain_sweep(halved, plain):
    """Bit for bit, as far as each was trained, on however many devices."""
    for name, entry in ledger_of(halved)["members"].items():
        files = {path.name for path in (halved / name).iterdir() if "tfevents" not in path.name}
        if entry["status"] == "done":
            got, expected = outcome(halved / name), outcome(plain / name)
            for found in (got, expected):
                del found["summary"]["device"]
            assert got == expected
            assert saved_steps(halved / name / "checkpoints") == saved_steps(plain / name / "checkpoints")
            assert files == {"config.json", "metrics.jsonl", "summary.json", "checkpoints"}
        else:
            assert (halved / name / "config.json").read_text() == (plain / name / "config.json").read_text()
            assert rows(halved / name) == [row for row in rows(plain / name) if row["step"] <= entry["step"]]
            assert files == {"config.json", "metrics.jsonl", "checkpoints"}


def test_the_best_of_each_rung_train_on(halved, plain):
    """Over the devices of the tests, some of which have no member in the smaller groups."""
    names = [member.name for member in expand(config())]
    ledger = ledger_of(halved)
    assert ledger["members"] == expected_ledger(plain, names)
    assert [len(group) for group in ledger["groups"]] == [8, 2, 1]
    assert not any((halved / "groups").glob("*"))
    require_members_of_the_plain_sweep(halved, plain)


def test_a_stopped_member_continues_alone(copy_of_halved, plain, capsys):
    """To its full length, and with the bits that the sweep without rungs gave it."""
    before = ledger_of(copy_of_halved)
    for rung in (0, 1):
        name = next(name for name, entry in before["members"].items() if entry.get("rung") == rung)
        assert max(saved_steps(copy_of_halved / name / "checkpoints")) == RUNGS[rung]
        status, lines = command(capsys, "train", f"--config={saved.__file__}:{copy_of_halved / name}")
        assert status == 0, lines
        got, expected = outcome(copy_of_halved / name), outcome(plain / name)
        # Its best checkpoint among them: all that it needs was kept at the rung.
        assert got["states"] == expected["states"]
        assert got["metrics.jsonl"] == expected["metrics.jsonl"]
    sweep.train_sweep(config(**HALVING), copy_of_halved)
    assert ledger_of(copy_of_halved) == before


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_after_a_rung(call, halved, tmp_path, monkeypatch):
    """Before the first save of the second group, which then starts again from the members' own checkpoints, and after."""
    advance, calls = Programs.advance, []

    def advance_and_signal(programs, *arguments):
        calls.append(programs.count)
        if calls.count(2) == call and programs.count == 2:
            signal.raise_signal(signal.SIGTERM)
        return advance(programs, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "advance", advance_and_signal)
        with pytest.raises(Interrupted):
            sweep.train_sweep(config(**HALVING), tmp_path / "sweep")
    statuses = [entry["status"] for entry in ledger_of(tmp_path / "sweep")["members"].values()]
    assert (statuses.count("stopped"), statuses.count("running")) == (6, 2)
    sweep.train_sweep(config(**HALVING), tmp_path / "sweep")
    assert ledger_of(tmp_path / "sweep") == ledger_of(halved)
    assert figures(tmp_path / "sweep") == figures(halved)
