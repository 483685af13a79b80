"""The members of a sweep as a ranked table: settings, and records for Python."""

import json

import pytest

from tests.sweeps.test_report import by_hand, labels, write_sweep
from vmapbn_flax import load_sweep
from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.report import report
from vmapbn_flax.sweeps.results import read_settings

RATES = tuple(round(0.01 * i, 2) for i in range(1, 7))


def write_halved(workdir):
    """Six members: two are done, two were stopped by each of two rungs. Those stopped first were the best by then."""
    figures = {0.01: 0.7, 0.02: 0.8, 0.03: 0.9, 0.04: 0.85, 0.05: 0.99, 0.06: 0.95}
    stopped = {0.03: (1, 3), 0.04: (1, 4), 0.05: (0, 5), 0.06: (0, 6)}
    accuracies = {f"learning_rate={rate}": (figure, figure - 0.05) for rate, figure in figures.items()}
    halted = {f"learning_rate={rate}": place for rate, place in stopped.items()}
    return write_sweep(workdir, accuracies, {"optimizer__learning_rate": RATES}, stopped=halted)


def test_who_trained_longer_comes_first(tmp_path, capsys):
    """By rung, then by accuracy. Stopping is no failure: it has figures, and is counted as what it is."""
    workdir = write_halved(tmp_path / "sweep")
    order = (0.02, 0.01, 0.03, 0.04, 0.05, 0.06)
    assert labels(workdir) == [f"learning_rate={rate}" for rate in order]
    assert report(Workdir(workdir)).name == "learning_rate=0.02"
    lines = capsys.readouterr().err.splitlines()
    (third,) = (line.split() for line in lines if "learning_rate=0.03" in line)
    assert third == [
        "3",
        "learning_rate=0.03",
        "0",
        "of",
        "1",
        "90.00",
        "%",
        "85.00",
        "%",
        "1",
        "stopped",
        "at",
        "rung",
        "1",
    ]


def test_a_setting_counts_by_its_seeds_that_trained_longest(tmp_path):
    """Of equally long ones the setting with more such seeds comes first; then accuracy counts, of these seeds."""
    stopped = {
        "learning_rate=0.001,seed=1": (1, 3),
        "learning_rate=0.01,seed=0": (0, 6),
        "learning_rate=0.01,seed=1": (1, 4),
        "learning_rate=0.1,seed=0": (0, 5),
    }
    workdir = write_sweep(tmp_path / "sweep", by_hand(), stopped=stopped)
    settings = read_settings(Workdir(workdir))
    assert [setting.label for setting in settings] == ["learning_rate=0.1", "learning_rate=0.001", "learning_rate=0.01"]
    assert [setting.figures("test_accuracy") for setting in settings] == [[0.9], [0.99], [0.7]]
    del stopped["learning_rate=0.001,seed=1"]  # both of its seeds are done
    both = write_sweep(tmp_path / "both", by_hand(), stopped=stopped)
    assert labels(both) == ["learning_rate=0.001", "learning_rate=0.1", "learning_rate=0.01"]


def test_a_member_that_was_stopped_is_not_the_best(tmp_path):
    """While others still train, they are better than it."""
    accuracies = {"learning_rate=0.1": (0.9, 0.9), "learning_rate=0.2": (0.8, 0.8)}
    workdir = write_sweep(
        tmp_path / "sweep",
        accuracies,
        {"optimizer__learning_rate": (0.1, 0.2)},
        {"learning_rate=0.2": "running"},
        stopped={"learning_rate=0.1": (0, 2)},
    )
    assert report(Workdir(workdir)) is None


# Records.


def test_records_of_a_sweep(tmp_path):
    workdir = write_halved(tmp_path / "sweep")
    records = load_sweep(workdir)
    assert [record["name"] for record in records] == labels(workdir)
    assert [record["status"] for record in records] == ["done"] * 2 + ["stopped"] * 4
    name = "learning_rate=0.03"
    assert records[2] == {
        "name": name,
        "optimizer.learning_rate": 0.03,
        "status": "stopped",
        "step": 20,
        "rung": 1,
        "rank": 3,
        "validation_accuracy": 0.9,
        "validation_loss": None,
        "test_accuracy": pytest.approx(0.85),
        "test_loss": None,
        "best_step": 20,
        "best_validation_accuracy": 0.9,
        "best_validation_loss": None,
        "best_test_accuracy": pytest.approx(0.85),
        "best_test_loss": None,
        "workdir": str(workdir / name),
    }


def test_the_first_record_is_the_best_of_the_report(tmp_path):
    """Its best evaluation is not its last one; nothing counts that a member did alone."""
    workdir = write_sweep(tmp_path / "sweep", by_hand())
    best = workdir / "learning_rate=0.01,seed=1" / "metrics.jsonl"
    lines = [
        {"step": 15, "validation_accuracy": 0.95, "test_accuracy": 0.5},
        {"step": 20, "validation_accuracy": 0.92, "test_accuracy": 0.7},
        {"step": 30, "validation_accuracy": 1.0, "test_accuracy": 1.0},
    ]
    best.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, *others = load_sweep(str(workdir))
    assert first["workdir"] == str(best.parent)
    assert (first["step"], first["validation_accuracy"], first["test_accuracy"]) == (20, 0.92, 0.7)
    assert (first["best_step"], first["best_validation_accuracy"], first["best_test_accuracy"]) == (15, 0.95, 0.5)
    assert (second["optimizer.learning_rate"], second["seed"], second["status"]) == (0.01, 0, "done")
    assert {tuple(record) for record in others} == {tuple(first)}


def test_nothing_of_a_member_yet(tmp_path):
    workdir = write_sweep(tmp_path / "sweep", by_hand(), statuses=dict.fromkeys(by_hand(), "running"))
    (workdir / "learning_rate=0.1,seed=1" / "metrics.jsonl").unlink()
    records = {record["name"]: record for record in load_sweep(workdir)}
    assert records["learning_rate=0.1,seed=0"]["validation_accuracy"] == 0.64
    missing = records["learning_rate=0.1,seed=1"]
    assert {missing[name] for name in ("validation_accuracy", "test_loss", "best_step", "rung")} == {None}


def test_no_sweep(tmp_path):
    with pytest.raises(RunError, match=r"got no sweep\.json, expected the workdir of a sweep"):
        load_sweep(tmp_path)


def test_pandas_takes_them(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(load_sweep(write_halved(tmp_path / "sweep")))
    assert table["optimizer.learning_rate"].dtype == table["validation_accuracy"].dtype == float
    assert table.groupby("status")["validation_accuracy"].max().to_dict() == {"done": 0.8, "stopped": 0.99}
