"""Successive halving: who is stopped and who trains on, with the bits of the sweep without rungs."""

import itertools
import json
import shutil
import signal
from operator import itemgetter

import pytest

from configs import saved
from tests.helpers import shared, small
from tests.helpers.runs import command, outcome
from tests.runs.test_metrics import hparams_of
from tests.sweeps.test_sweep import figures, ledger_of, rows, sweep_config
from vmapbn_flax import load_sweep
from vmapbn_flax.errors import Interrupted, RunError, UsageError
from vmapbn_flax.runs import train as run
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps import plan, rungs
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.sweeps.expand import expand
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.training.programs import Programs

# Those that pass the first rung are at their best there.
RATES, SEEDS = (0.1, 0.3, 1.0, 3.0), (1, 3)
HALVING = {"sweep_options__halving": 3}
RUNG = {"sweep_options__first_rung": 0.8, "train__eval_every": 0.8}
SWEPT = {"optimizer__learning_rate": RATES, "seed": SEEDS}
RUNGS, END = (4, 12), 20  # steps: after 0.8 and 2.4 epochs, and of 4


def config(swept=None, **changes):
    """A sweep of small runs, 5 steps to an epoch, which are evaluated every 4 steps."""
    return sweep_config(swept or SWEPT, data__name="small", mesh__member=2, **RUNG, **changes)


@pytest.fixture(scope="module", autouse=True)
def small_data_and_compiled_once():
    """Groups of eight share what is compiled, those of two, and members alone."""
    with shared.programs(), pytest.MonkeyPatch.context() as patch:
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
        assert hparams_of(halved / name)["session_end_info"].session_end_info.status == 1  # a success
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
    """The last of them keeps its best checkpoint, which it had before the first rung."""
    names = [member.name for member in expand(config())]
    ledger = ledger_of(halved)
    assert ledger["members"] == expected_ledger(plain, names)
    assert [len(group) for group in ledger["groups"]] == [8, 2, 1]
    assert not any((halved / "groups").glob("*"))
    require_members_of_the_plain_sweep(halved, plain)
    (done,) = (name for name, entry in ledger["members"].items() if entry["status"] == "done")
    assert saved_steps(halved / done / "checkpoints") == [RUNGS[0], END]


def test_a_table_of_the_members(halved):
    """The seeds of each rate: those that trained longer first; of one rung, as it ranked them."""
    best, *others = load_sweep(halved)
    assert (best["status"], best["step"], best["rung"]) == ("done", END, None)
    assert {record["status"] for record in others} == {"stopped"}
    for rate in RATES:
        places = [(-record["rung"], record["rank"]) for record in others if record["optimizer.learning_rate"] == rate]
        assert places == sorted(places)


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


@pytest.mark.parametrize("call", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_after_a_rung(call, halved, tmp_path, monkeypatch):
    """Before the first step of the second group, which its members' own checkpoints are the start of, and later."""
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


SHORT = {"sweep_options__halving": 2, "train__num_epochs": 1.6}  # one rung, at half of the steps


def test_a_member_diverges_at_the_rung(tmp_path):
    """In its last step before the rung. It is not ranked; of the others, fewer than the divisor, one trains on."""
    swept = {"optimizer__learning_rate": (0.01, 1e38, *(0.1 * i for i in range(1, 7)))}
    members = sweep.train_sweep(config(swept, **SHORT | {"sweep_options__halving": 8}), tmp_path / "sweep").members
    diverged = members["learning_rate=1e+38"]
    assert diverged == {"status": "diverged", "step": 4, "reason": "3 steps in a row not finite, up to step 4"}
    assert sorted(entry["status"] for entry in members.values()) == ["diverged", "done", *["stopped"] * 6]
    stopped = sorted((entry for entry in members.values() if entry["status"] == "stopped"), key=itemgetter("rank"))
    assert [entry["reason"] for entry in stopped] == [
        f"rung 0, after 0.8 epochs: rank {rank} of 7, of which 1 goes on" for rank in range(2, 8)
    ]


@pytest.mark.slow
def test_all_members_diverge_before_the_rung(tmp_path):
    swept = {"optimizer__learning_rate": (1e38, 2e38)}
    ledger = sweep.train_sweep(config(swept, **SHORT), tmp_path / "sweep")
    assert (ledger.count("diverged"), len(ledger.groups)) == (2, 1)


def test_a_group_that_fails_is_waited_for(tmp_path, monkeypatch):
    """No member of the rung is ranked before all are there: two of four are stopped, as without the failure."""
    failing = config({"optimizer__learning_rate": RATES[:2], "seed": SEEDS}, sweep_options__chunk=2, **SHORT)
    create, calls = Programs.create, itertools.count()

    def fail_first(programs):
        if next(calls) == 0:
            raise RunError("out of luck")
        return create(programs)

    monkeypatch.setattr(Programs, "create", fail_first)
    ledger = sweep.train_sweep(failing, tmp_path / "sweep")
    assert [entry["status"] for entry in ledger.members.values()] == ["failed"] * 2 + ["waiting"] * 2
    members = sweep.train_sweep(failing, tmp_path / "sweep").members
    ranked = sorted(members, key=lambda name: -accuracy(tmp_path / "sweep" / name, 4))
    assert [members[name]["status"] for name in ranked] == ["done"] * 2 + ["stopped"] * 2
    assert [members[name]["rank"] for name in ranked[2:]] == [3, 4]


def test_new_values_are_ranked_among_themselves(copy_of_halved):
    before, found = ledger_of(copy_of_halved), figures(copy_of_halved)
    more = config({"optimizer__learning_rate": RATES, "seed": (*SEEDS, 2, 4)}, **HALVING)
    ledger = sweep.train_sweep(more, copy_of_halved)
    assert [len(group) for group in ledger.groups] == [8, 2, 1, 8, 2, 1]
    assert {name: entry for name, entry in ledger.members.items() if name in before["members"]} == before["members"]
    assert {name: rows for name, rows in figures(copy_of_halved).items() if name in found} == found
    new = [entry for name, entry in ledger.members.items() if name not in before["members"]]
    assert sorted(entry.get("rank", 1) for entry in new) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {entry["reason"].partition(" of ")[2] for entry in new if entry["status"] == "stopped"} == {
        "8, of which 2 go on",
        "2, of which 1 goes on",
    }


@pytest.mark.slow
def test_norms_that_freeze_between_two_rungs(tmp_path):
    changes = {"model__freeze_norm_after": 1.4}
    for name, halving in (("plain", {}), ("halved", HALVING)):
        sweep.train_sweep(config({"seed": tuple(range(6))}, **changes, **halving), tmp_path / name)
    require_members_of_the_plain_sweep(tmp_path / "halved", tmp_path / "plain")


# Without training.


def write_rows(workdir, accuracies, step=4):
    for name, accuracy in accuracies.items():
        (workdir / name).mkdir()
        lines = [{"step": step, "train_loss": 1.0}, {"step": step, "validation_accuracy": accuracy}]
        (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_of_equals_the_first_is_the_best(tmp_path):
    """In the order of the sweep; an accuracy that is not finite comes last."""
    write_rows(tmp_path, {"a": 0.5, "b": 0.7, "c": None, "d": 0.7, "e": 0.0, "f": 0.5})
    assert rungs.rank(Workdir(tmp_path), dict.fromkeys("fedcba", 4)) == ["d", "b", "f", "a", "e", "c"]
    with pytest.raises(RunError, match=r"a/metrics\.jsonl: got no validation_accuracy at step 8, expected that of the"):
        rungs.rank(Workdir(tmp_path), {"a": 8})


@pytest.mark.parametrize(
    ("halving", "first_rung", "eval_every", "steps"),
    [
        (0, 1.0, 1.0, [20]),
        (2, 1.0, 1.0, [5, 10, 20]),
        (3, 2.0, 1.0, [10, 20]),
        (3, 0.5, 0.25, [2, 6, 18, 20]),  # an evaluation is every step, though an epoch has 5
        (2, 3.0, 0.5, [12, 20]),
        (10, 1.2, 0.3, [8, 20]),
    ],
)
def test_steps_of_the_rungs(halving, first_rung, eval_every, steps):
    """Of members of 4 epochs of 5 steps: evaluations, up to the last step."""
    changes = {"train__eval_every": eval_every, "data__validation_size": 20}
    member = small.config(sweep_options__halving=halving, sweep_options__first_rung=first_rung, **changes)
    programs = Programs([member], small.dataset(20))
    found = [rungs.rung_step(member.sweep_options, rung, member.train, programs) for rung in range(len(steps))]
    assert found == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep_options__halving": 1}, r"halving: got 1, expected 0 for no rungs, or a factor of 2 or more"),
        (
            {"sweep_options__first_rung": 1.0},
            r"first_rung: got 1\.0, expected .* a multiple of train\.eval_every=0\.8",
        ),
        ({"sweep_options__first_rung": 4.0}, r"first_rung: got 4\.0, expected .* below train\.num_epochs=4\.0"),
        ({"sweep_options__first_rung": 0.0}, r"first_rung: got 0\.0, expected a positive number"),
        ({"train__eval_every": 5.0}, r"first_rung: got 0\.8, expected"),
        (
            {"swept": {"train__eval_every": (0.8, 0.5)}},
            r"member eval_every=0\.5: .*first_rung: got 0\.8",
        ),
        ({"swept": {"train__num_epochs": (3.0, 4.0)}}, r"config\.sweep\.train\.num_epochs: got .*, expected none"),
    ],
)
def test_bad_rungs(changes, message, tmp_path):
    fields = RUNG | HALVING | {name: value for name, value in changes.items() if name != "swept"}
    with pytest.raises(UsageError, match=message) as error:
        sweep.train_sweep(sweep_config(changes.get("swept"), **fields), tmp_path / "sweep")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_a_single_run_has_no_rungs(capsys, tmp_path):
    argv = ("train", "--config=configs/vmap_bn.py", "--config.sweep_options.halving=3", f"--workdir={tmp_path}/run")
    status, lines = command(capsys, *argv)
    assert (status, len(lines)) == (2, 1)
    assert "config.sweep_options.halving: got 3 without values in config.sweep, expected 0" in lines[0]


def make_plan(workdir, swept=None, **changes):
    planned = config(swept, **changes)
    return plan.make_plan(planned, Workdir(workdir), {m.name: m for m in expand(planned)}, plan.Datasets())


def test_other_rungs_are_refused(tmp_path):
    make_plan(tmp_path, **HALVING)
    for changes, message in (
        ({}, r"config\.sweep_options\.halving: 3 -> 0"),
        ({"sweep_options__halving": 2}, r"config\.sweep_options\.halving: 3 -> 2"),
        (HALVING | {"train__eval_every": 0.4, "sweep_options__first_rung": 1.6}, r"first_rung: 0\.8 -> 1\.6"),
    ):
        with pytest.raises(RunError, match=message):
            sweep.train_sweep(sweep_config(SWEPT, data__name="small", mesh__member=2, **RUNG | changes), tmp_path)
    make_plan(tmp_path, **HALVING)


def test_new_values_before_the_end_are_refused(tmp_path):
    ledger = make_plan(tmp_path, {"seed": (0, 1)}, **HALVING)
    ledger.mark(["seed=0"], "done", END)
    before = ledger_of(tmp_path)
    with pytest.raises(RunError, match=r"got the new member seed=2 in a sweep with rungs that is not finished"):
        make_plan(tmp_path, {"seed": (0, 1, 2)}, **HALVING)
    assert ledger_of(tmp_path) == before
    ledger.mark(["seed=1"], "diverged", 3)
    assert len(make_plan(tmp_path, {"seed": (0, 1, 2)}, **HALVING).members) == 3


A, B = ({"status": "pending", "step": 0, "reason": ""} for _ in "AB")


@pytest.mark.parametrize(
    ("members", "groups"),
    [
        ({"a": A, "b": B}, [["a", "b"], ["a"], ["a", "b"]]),  # whose members are not at one rung
        ({"a": A, "b": B}, [["a", "b", "a"]]),
        ({"a": A, "b": B}, [["a"]]),
        ({"a": A}, [["a"], ["b"]]),
        ({"a": A}, [["a"], []]),
        ({"a": A | {"status": "stopped"}}, [["a"]]),
        ({"a": A | {"status": "stopped", "rung": 0, "rank": "1"}}, [["a"]]),
        ({"a": A | {"status": "stopped", "rung": 10**400, "rank": 1}}, [["a"]]),
    ],
)
def test_damaged_ledger(members, groups, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members, "groups": groups}))
    with pytest.raises(RunError, match=r"sweep\.json: got no ledger of a sweep"):
        Ledger(Workdir(tmp_path))
