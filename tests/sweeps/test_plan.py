"""The plan of a sweep in its workdir: cut short anywhere, changed, or with a file lost. Nothing is trained."""

import itertools
import json
import re
import shutil

import pytest

from tests.helpers import small
from tests.sweeps.test_sweep import sweep_config
from vmapbn_flax.errors import RunError
from vmapbn_flax.runs import workdir as workdir_module
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps import plan
from vmapbn_flax.sweeps.expand import expand
from vmapbn_flax.sweeps.ledger import Ledger, refuse_unfinished_member

TWO, THREE = ({"optimizer__learning_rate": rates} for rates in ((0.01, 0.03), (0.01, 0.03, 0.1)))
FIRST = "learning_rate=0.01"


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(plan, "load_dataset", lambda data: small.dataset(data.validation_size))


def make(workdir, swept, **changes):
    config = sweep_config(swept, **changes)
    members = {member.name: member for member in expand(config)}
    return plan.make_plan(config, Workdir(workdir), members, plan.Datasets())


@pytest.fixture
def done(tmp_path):
    """A sweep of two whose members are done, as far as the plan looks."""
    workdir = tmp_path / "done"
    ledger = make(workdir, TWO)
    for name in ledger.members:
        Workdir(workdir).member(name).metrics.touch()
    ledger.mark(ledger.members, "done", 20)
    return workdir


def files(workdir):
    return {path.relative_to(workdir): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


# Cut short.


@pytest.mark.parametrize("extended", [False, True])
def test_cut_short_before_each_write(done, extended, tmp_path, monkeypatch):
    """The same command goes on, and so does that of the sweep before, or it is refused in one line."""
    before = done if extended else tmp_path / "new"
    before.mkdir(exist_ok=True)
    whole = shutil.copytree(before, tmp_path / "whole")
    make(whole, THREE)
    write, cuts = workdir_module.write_json, 0
    for cut in itertools.count():
        workdir = shutil.copytree(before, tmp_path / f"cut_{cut}")
        writes = itertools.count()

        def killed(path, content, cut=cut, writes=writes):
            if next(writes) == cut:
                raise KeyboardInterrupt
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(workdir_module, "write_json", killed)
            try:
                make(workdir, THREE)
                break
            except KeyboardInterrupt:
                cuts += 1
        old = shutil.copytree(workdir, tmp_path / f"old_{cut}")
        assert list(make(old, TWO).members) == ["learning_rate=0.01", "learning_rate=0.03"]
        for again in (workdir, old):
            make(again, THREE)
        assert files(workdir) == files(whole)
    assert cuts == (3 if extended else 5)  # configs of new members, the sweep's, the ledger
    assert files(workdir) == files(whole)
    with pytest.raises(RunError, match=r"got a sweep without its member learning_rate=0\.1, expected all that it has"):
        make(workdir, TWO)


def test_a_ledger_ahead_of_the_config(done):
    """What a kill in an extension left, when the ledger was written first."""
    ledger = Ledger(Workdir(done))
    ledger.add([["learning_rate=0.1"]])
    assert list(make(done, THREE).members) == [FIRST, "learning_rate=0.03", "learning_rate=0.1"]


def test_what_another_start_left_is_written_anew(tmp_path, monkeypatch):
    """Killed before the ledger, and then started with another config: nothing has trained."""

    def killed(ledger):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, TWO)
    make(tmp_path, TWO, train__batch_size=8)
    for directory in (tmp_path, tmp_path / FIRST):
        assert json.loads((directory / "config.json").read_text())["train"]["batch_size"] == 8


# Of many members.


def test_an_unchanged_member_is_not_checked_again(done, monkeypatch):
    """Of thousands, that would take most of a resume."""
    monkeypatch.setattr(plan, "load_config", None)
    make(done, TWO)


def test_a_table_of_many_groups(tmp_path, capsys):
    """Those that train come first; the memory of equal ones is estimated once."""
    many = {"seed": tuple(range(25))}
    ledger = make(tmp_path, many, sweep_options__chunk=1)
    ledger.mark([f"seed={seed}" for seed in range(10)], "done", 20)
    capsys.readouterr()
    make(tmp_path, many, sweep_options__chunk=1)
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split()[0] for line in lines if "seed=" in line]
    assert shown == [*map(str, range(10, 25)), *map(str, range(5))]
    assert lines[-1] == "and 5 more groups"


# Changed, with or without the file that would say so.

LOST = [[], ["config.json"], [f"{FIRST}/config.json"]]


@pytest.mark.parametrize("lost", LOST, ids=lambda names: "+".join(names) or "nothing")
def test_a_changed_config_is_refused_whatever_is_lost(done, lost):
    for name in lost:
        (done / name).unlink()
    before = files(done)
    for changes, message in (
        ({"train__batch_size": 8}, r"config\.train\.batch_size: 16 -> 8"),
        ({"train__num_epochs": 5.0}, r"got another train\.num_epochs, expected that of the sweep"),
        ({"train__num_epochs": 3.0}, r"config\.train\.num_epochs: 4\.0 -> 3\.0"),
    ):
        with pytest.raises(RunError, match=message):
            make(done, THREE, **changes)
    assert files(done) == before
    make(done, TWO)
    assert {*files(done)} == {*before, *map(type(done), lost)}


def test_a_config_that_is_lost_altogether(done):
    for directory in (done, done / FIRST):
        (directory / "config.json").unlink()
    with pytest.raises(
        RunError, match=rf"{FIRST}/config\.json: got no such file, nor one of the sweep; expected .*copy"
    ):
        make(done, TWO)
    content = json.loads((done / "sweep.json").read_text())
    content["members"][FIRST]["status"] = "running"  # its checkpoint, if there is one, has its config
    (done / "sweep.json").write_text(json.dumps(content))
    make(done, TWO)


def test_a_member_continued_alone_is_the_same(done):
    config = json.loads((done / FIRST / "config.json").read_text())
    config["train"] |= {"num_epochs": 8.0, "log_every": 7}
    (done / FIRST / "config.json").write_text(json.dumps(config))
    for lost in ("", "config.json"):
        if lost:
            (done / lost).unlink()
        make(done, TWO)
        with pytest.raises(RunError, match=r"got another train\.num_epochs, expected that of the sweep"):
            make(done, TWO, train__num_epochs=5.0)
    assert json.loads((done / FIRST / "config.json").read_text()) == config


@pytest.mark.parametrize("lost", [["sweep.json"], ["sweep.json", "config.json"]], ids="+".join)
def test_a_lost_ledger(done, lost):
    for name in lost:
        (done / name).unlink()
    before = files(done)
    message = r"sweep\.json: got no such file, nor an entry of the member learning_rate=0\.01.*copy"
    with pytest.raises(RunError, match=message):
        make(done, THREE)
    if "config.json" not in lost:
        with pytest.raises(RunError, match=message):
            make(done, {"seed": (5, 6)})
    assert files(done) == before


def test_a_ledger_of_an_earlier_day(done):
    earlier = (done / "sweep.json").read_bytes()
    make(done, THREE)
    (done / "learning_rate=0.1" / "metrics.jsonl").touch()
    (done / "sweep.json").write_bytes(earlier)
    with pytest.raises(
        RunError, match=r"sweep\.json: got no entry of the member learning_rate=0\.1, which has trained"
    ):
        make(done, THREE)


def test_a_member_is_its_sweeps_until_its_group_is_removed(done):
    """Killed before that, the sweep finishes the group again, and would cut off what the member did alone."""
    refuse_unfinished_member(Workdir(done / FIRST))
    Workdir(done).group_checkpoints(0).mkdir(parents=True)
    with pytest.raises(RunError, match=re.escape("got a member that its sweep is not done with (done)")):
        refuse_unfinished_member(Workdir(done / FIRST))
