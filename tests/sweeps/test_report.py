import json

import pytest

from tests.sweeps import test_sweep
from vmapbn_flax.cli.main import main
from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps import pictures
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.report import report
from vmapbn_flax.sweeps.results import SELECTION, read_settings

RATES, SEEDS = (1e-3, 1e-2, 1e-1), (0, 1)


def write_sweep(workdir, accuracies, swept=None, statuses=None, stopped=None, **changes):
    """A sweep as training leaves it, of which each member's last evaluation is given: (validation, test).

    Those in `stopped` were stopped at a rung, at a rank.
    """
    config = test_sweep.sweep_config(swept or {"optimizer__learning_rate": RATES, "seed": SEEDS}, **changes)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    ledger = Ledger(Workdir(workdir))
    ledger.add([list(accuracies)])
    for name, (validation, test) in accuracies.items():
        (workdir / name).mkdir()
        lines = [{"step": step, SELECTION: validation * step / 20, "test_accuracy": test} for step in (10, 20)]
        (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ledger.mark([name], "stopped" if name in (stopped or {}) else (statuses or {}).get(name, "done"), 20)
    for name, (rung, rank) in (stopped or {}).items():
        ledger.members[name] |= {"rung": rung, "rank": rank}
    ledger.write()
    return workdir


def by_hand(**changes):
    """Settings whose mean validation accuracies are 0.9, 0.8 and 0.7; test accuracy would rank them otherwise."""
    table = {
        "learning_rate=0.001,seed=0": (0.75, 0.99),
        "learning_rate=0.001,seed=1": (0.65, 0.99),
        "learning_rate=0.01,seed=0": (0.88, 0.60),
        "learning_rate=0.01,seed=1": (0.92, 0.70),
        "learning_rate=0.1,seed=0": (0.64, 0.90),
        "learning_rate=0.1,seed=1": (0.96, 0.90),
    }
    return table | changes


def labels(workdir):
    return [setting.label for setting in read_settings(Workdir(workdir))]


def test_ranked_by_mean_validation_accuracy(tmp_path, capsys):
    workdir = write_sweep(tmp_path / "sweep", by_hand())
    assert labels(workdir) == ["learning_rate=0.01", "learning_rate=0.1", "learning_rate=0.001"]
    best = report(Workdir(workdir))
    # The best of the best setting, not the luckiest member of all.
    assert best.name == "learning_rate=0.01,seed=1"
    lines = capsys.readouterr().err.splitlines()
    first, second, third = (
        next(line for line in lines if f"learning_rate={rate} " in line) for rate in (0.01, 0.1, 0.001)
    )
    assert "2 of 2" in first
    assert "90.00 ± 2.83 %" in first  # of 88 and 92: sqrt(8)
    assert "65.00 ± 7.07 %" in first  # of 60 and 70, on the test set
    assert "80.00 ± 22.63 %" in second
    assert "70.00 ± 7.07 %" in third
    assert lines[-1] == f"python train.py --config=configs/saved.py:{workdir}/learning_rate=0.01,seed=1"
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_test_accuracy_has_no_say(tmp_path):
    workdir = write_sweep(tmp_path / "sweep", by_hand())
    other = write_sweep(tmp_path / "other", {name: (figure, 1 - test) for name, (figure, test) in by_hand().items()})
    assert labels(other) == labels(workdir)
    assert report(Workdir(other)).name == report(Workdir(workdir)).name


def test_settings_with_members_that_are_not_done_come_last(tmp_path, capsys):
    statuses = {"learning_rate=0.01,seed=1": "diverged", "learning_rate=0.001,seed=0": "running"}
    workdir = write_sweep(tmp_path / "sweep", by_hand(), statuses=statuses)
    assert labels(workdir) == ["learning_rate=0.1", "learning_rate=0.01", "learning_rate=0.001"]
    assert report(Workdir(workdir)).name == "learning_rate=0.1,seed=1"
    printed = capsys.readouterr().err
    assert "1 diverged at step 20" in printed
    assert "1 running" in printed
    assert "88.00 %" in printed  # of one seed, without a deviation


def test_nothing_is_done(tmp_path, capsys):
    workdir = write_sweep(tmp_path / "sweep", by_hand(), statuses=dict.fromkeys(by_hand(), "pending"))
    assert report(Workdir(workdir)) is None
    assert "python train.py" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "swept",
    [
        {"seed": (0, 1, 2)},
        {"model__hidden": ((4,), (8, 8)), "model__norm": ("vmap", "none")},
        {"train__label_smoothing": (0.0, 0.1), "optimizer__learning_rate": tuple(0.01 * i for i in range(1, 8))},
    ],
)
def test_every_kind_of_sweep_has_a_picture(swept, tmp_path):
    from vmapbn_flax.sweeps.expand import expand

    members = expand(test_sweep.sweep_config(swept))
    found = {member.name: (0.5 + 0.01 * i, 0.5) for i, member in enumerate(members)}
    report(Workdir(write_sweep(tmp_path / "sweep", found, swept)))
    assert (tmp_path / "sweep" / "sweep.png").exists()


@pytest.fixture
def figure(monkeypatch):
    """The figures that are drawn."""
    drawn = []
    monkeypatch.setattr(pictures, "write_picture", lambda figure, output: drawn.append(figure))
    return drawn


def write_draws(workdir, size):
    """A sweep of three drawn fields; the last members diverged, those before were stopped by a rung."""
    swept = {
        "optimizer__learning_rate": ("log_uniform", 1e-3, 1e-1),
        "train__label_smoothing": ("uniform", 0.0, 0.2),
        "model__norm": ("vmap", "none"),
    }
    members = test_sweep.random_members(swept, size)
    rates = [member.values["optimizer.learning_rate"] for member in members]
    found = {member.name: (0.5 + rate, 0.5 + rate) for member, rate in zip(members, rates, strict=True)}
    names = list(found)
    stopped = {name: (0, size - 6 + i) for i, name in enumerate(names[-6:-3])}
    options = {"sweep_options__mode": "random", "sweep_options__size": size}
    return write_sweep(workdir, found, swept, dict.fromkeys(names[-3:], "diverged"), stopped, **options)


def test_a_picture_of_many_members_and_fields(figure, tmp_path, capsys):
    """A grid of panels; the curves of all but the best are one artist."""
    report(Workdir(write_draws(tmp_path / "sweep", 40)))
    (drawn,) = figure
    panels = {axes.get_xlabel(): axes for axes in drawn.axes}
    rate, smoothing, norm, curves = (panels[name] for name in ("learning rate", "label smoothing", "norm", "step"))
    assert (rate.get_xscale(), smoothing.get_xscale(), norm.get_xscale()) == ("log", "linear", "linear")
    assert len(curves.lines) == 8
    assert len(curves.collections) == 1 + 1 + 8  # the others, the ends of those that were stopped, bands
    for panel in (rate, smoothing, norm):
        rings, points = panel.collections
        assert (len(rings.get_offsets()), len(points.get_offsets())) == (3, 34)
        (crosses,) = panel.lines
        assert len(crosses.get_xdata()) == 3
        assert panel.get_ylim() == rate.get_ylim()


def test_a_table_of_the_best(figure, tmp_path, capsys):
    workdir = write_draws(tmp_path / "sweep", 40)
    assert main(["report", str(workdir), "--top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " of 1 " in line] == ["1", "2"]
    assert "the best 2 of 40 settings; --top=40 shows all" in lines
    assert "40 members: 34 done, 3 stopped at rung 0, 3 diverged" in lines
    fields = [line.split()[0] for line in lines if line.startswith(("  optimizer.", "  train.", "  model."))]
    assert (fields[0], len(fields)) == ("optimizer.learning_rate", 3)
    assert main(["report", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " of 1 " in line]) == 20


def test_a_small_table_is_whole(tmp_path, capsys):
    report(Workdir(write_sweep(tmp_path / "sweep", by_hand())))
    printed = capsys.readouterr().err
    assert "--top" not in printed
    assert "rank correlation" not in printed  # of six members it would say nothing


def test_what_a_member_did_alone_does_not_count(tmp_path):
    workdir = write_sweep(tmp_path / "sweep", by_hand())
    with (workdir / "learning_rate=0.001,seed=0" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, SELECTION: 1.0, "test_accuracy": 1.0}) + "\n")
    assert labels(workdir)[-1] == "learning_rate=0.001"


def test_command(tmp_path, capsys):
    workdir = write_sweep(tmp_path / "sweep", by_hand())
    assert main(["report", str(workdir)]) == 0
    assert "best: learning_rate=0.01,seed=1, validation accuracy 92.00%" in capsys.readouterr().out


def test_no_sweep(tmp_path, capsys):
    with pytest.raises(RunError, match=r"got no sweep\.json, expected the workdir of a sweep"):
        report(Workdir(tmp_path))
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
