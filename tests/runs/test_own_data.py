"""Whole runs on a person's own files, in each format, through the command line."""

import json

import numpy as np
import pytest

from tests.helpers import shared
from tests.helpers.own import examples, write_folder, write_idx
from tests.helpers.runs import CONFIG, command
from vmapbn_flax.data import folder

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections, of itself

STREAMED = f"--config.data.memory_limit={40 * (8 * 9 + 4) / 1e9}"


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """In memory, data of each format meets the same program."""
    with shared.programs():
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The same 40 training and 12 test images in every format, in the order that a folder's have."""
    root = tmp_path_factory.mktemp("own")
    train, test = (part.read(np.argsort(part.labels, kind="stable")) for part in (examples(40, 1), examples(12, 2)))
    write_folder(root / "folder", train=train, test=test)
    train = train.read(folder.permutation(40))
    write_idx(root / "idx", train=train, test=test)
    np.savez(root / "npz", x_train=train.images, y_train=train.labels, x_test=test.images, y_test=test.labels)
    (root / "npz.npz").rename(root / "npz")
    return root


@pytest.fixture
def train(own, tmp_path, capsys, monkeypatch):
    """Trains for two steps; returns the status, the lines it says and the rows it writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vmapbn_flax.runs.pictures.plot_runs", lambda workdirs, output: output.touch())
    monkeypatch.chdir(own)

    def train(name, *more):
        workdir = tmp_path / f"run_{name}{len(more)}"
        flags = [f"--config.data.name={name}", "--config.train.num_epochs=1", f"--workdir={workdir}"]
        status, lines = command(capsys, "train", CONFIG, *flags, *more)
        rows = workdir / "metrics.jsonl"
        return status, lines, [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    return train


def test_every_format_trains_the_same_run(train):
    expected = None
    for name, *more in (["idx"], ["npz"], ["folder"], ["folder", STREAMED]):
        status, lines, rows = train(name, f"--config.data.dir={name}", *more)
        assert status == 0, lines
        assert rows[-1]["test_count"] == 12
        assert any("40 training and 12 test examples" in line for line in lines)
        assert any("examples, streamed)" in line for line in lines) == bool(more)
        expected = expected or rows
        assert rows == expected


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("idx", [], "error: data.dir: got ''; expected where the files are, for data.name=idx. Say so with "),
        ("idx", ["--config.data.dir=folder"], "error: folder/train-images-idx3-ubyte: got no such file"),
        ("npz", ["--config.data.dir=none"], "error: none: got No such file or directory; expected a .npz file, or"),
        ("folder", ["--config.data.dir=idx"], "/idx/train: got No such file or directory; expected a folder"),
        ("folder", ["--config.data.dir=folder", "--config.data.test_fraction=0.5"], "folder has a test split. Leave"),
    ],
)
def test_what_is_wrong_is_one_line(train, tmp_path, name, flags, message):
    status, lines, rows = train(name, *flags)
    assert (status, len(lines), rows, list(tmp_path.glob("run_*"))) == (2, 1, [], [])
    assert message in lines[0]


@pytest.mark.usefixtures("compiled_quickly")
def test_held_out_examples_are_part_of_the_config(train, own, tmp_path):
    """A resume with another fraction is refused: training examples would have been test examples."""
    flags = ["--config.data.dir=held_out"]
    write_folder(own / "held_out", train=examples(60, 1))
    status, _, rows = train("folder", *flags, "--config.data.test_fraction=0.4")
    assert (status, rows[-1]["test_count"]) == (0, 24)
    status, lines, _ = train("folder", *flags, "--config.data.test_fraction=0.2")
    assert status == 1
    assert "config.data.test_fraction: 0.4 -> 0.2" in lines[0]
