"""`evaluate`: what it prints and writes, and where it cannot write."""

import csv
import json

import matplotlib.image
import pytest

from tests.helpers import quick, small
from tests.helpers.runs import CONFIG, command
from vmapbn_flax.cli import evaluate
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.cli.main import main
from vmapbn_flax.files import write_whole
from vmapbn_flax.runs import train as run

VALIDATION = "--config.data.validation_size=20"


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch, quick.programs():
        patch.setattr(run, "load_dataset", small.load)
        patch.setattr(evaluate, "load_dataset", small.load)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data):
    """The workdir of a run of an epoch, with a validation split, of which most classes are confused."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run.train(parse_config([CONFIG, VALIDATION, "--config.train.num_epochs=1"])[0], workdir)
    return workdir


def printed(capsys, *argv):
    capsys.readouterr()
    assert main(["evaluate", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_classes(capsys, finished):
    """The figures as ever, and below them one line a class, as wide as it has to be where there is no terminal."""
    figures = printed(capsys, finished)
    lines = printed(capsys, finished, "--classes")
    assert lines[: len(figures)] == figures
    assert dict(line.split() for line in figures).keys() == {
        *("step", "validation_loss", "validation_accuracy", "validation_count"),
        *("test_loss", "test_accuracy", "test_count"),
    }
    rows = [line.split() for line in lines[len(figures) :]]
    start = rows.index(["test", "images", "examples", "precision", "recall", "F1"]) + 2
    classes = rows[start : start + small.CLASSES]
    test = small.dataset().test
    assert [int(row[1]) for row in classes] == [(test.labels == label).sum() for label in range(small.CLASSES)]
    right = sum(round(float(row[3]) * int(row[1])) for row in classes)
    assert right / 37 == pytest.approx(float(dict(line.split() for line in figures)["test_accuracy"]))
    start = rows.index(["most", "confused:", "true", "predicted", "examples", "of", "the", "true", "class"]) + 2
    pairs = [row for row in rows[start:] if row]
    assert sum(int(count) for _, _, count, _, _ in pairs) == 37 - right
    assert [int(count) for _, _, count, _, _ in pairs] == sorted((int(pair[2]) for pair in pairs), reverse=True)


def test_csv(capsys, finished, tmp_path):
    """A row an example, in order; its accuracies are those of the run."""
    output = tmp_path / "examples.csv"
    assert printed(capsys, finished, f"--csv={output}") == printed(capsys, finished)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary, dataset = json.loads((finished / "summary.json").read_text()), small.dataset(20)
    for name, split in (("validation", dataset.validation), ("test", dataset.test)):
        found = [row for row in rows if row["split"] == name]
        assert [int(row["index"]) for row in found] == list(range(len(split)))
        assert [int(row["label"]) for row in found] == split.labels.tolist()
        assert [row["label_name"] for row in found] == [dataset.class_names[label] for label in split.labels]
        correct = [row["predicted"] == row["label"] for row in found]
        assert [int(row["correct"]) for row in found] == correct
        assert sum(correct) / len(split) == pytest.approx(summary[f"{name}_accuracy"])
        for row in found:
            assert float(row["probability"]) >= max(float(row["label_probability"]), 1 / small.CLASSES)
            assert row["correct"] == "0" or row["probability"] == row["label_probability"]
    assert len(rows) == 57


def test_picture(capsys, finished, tmp_path):
    output = tmp_path / "mistakes.png"
    assert printed(capsys, finished, f"--picture={output}") == printed(capsys, finished)
    assert matplotlib.image.imread(output).shape == (927, 1125, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["mistakes.png"]


OUTPUTS = {
    "picture of another format": ("--picture={place}/x.doc", 2, "x.doc: got a name that ends in '.doc', expected .png"),
    "picture without a format": ("--picture={place}/x", 2, "x: got a name that ends in '', expected .png"),
    "picture nowhere": ("--picture={place}/none/x.png", 1, "x.png: got No such file or directory; expected room and"),
    "csv nowhere": ("--csv={place}/none/x.csv", 1, "x.csv: got No such file or directory; expected room and"),
    "csv in a file": ("--csv={place}/file/x.csv", 1, "x.csv: got Not a directory; expected room and permission"),
    "csv for a directory": ("--csv={place}", 1, "got Is a directory; expected room and permission to write there"),
    "csv without a name": ("--csv=", 2, "--csv: got an empty path"),
}


@pytest.mark.parametrize(("flag", "expected", "message"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_that_cannot_be_written(capsys, finished, tmp_path, monkeypatch, flag, expected, message):
    """One line, before any data loads."""
    monkeypatch.setattr(evaluate, "load_dataset", None)
    write_whole(tmp_path / "file", "")
    status, (line,) = command(capsys, "evaluate", finished, flag.format(place=tmp_path))
    assert status == expected
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
