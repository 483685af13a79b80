"""A workdir from anywhere: what it claims is checked before it is believed, and no link leads out of it."""

import hashlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax.config import restore_config
from vmapbn_flax.defaults import default_config
from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.checkpoints import Checkpoints, restore, restore_latest
from vmapbn_flax.runs.train import train
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.results import read_settings

RUN = {"name": "", "config": {}, "rows": 0}
STATE = {"kernel": np.ones((4, 5), np.float32), "step": np.int32(3)}


@pytest.fixture
def checkpoints(tmp_path):
    """The directory of a checkpoint of step 3."""
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(3, STATE, {"runs": [RUN]})
    saved.close()
    return tmp_path / "checkpoints"


def resum(checkpoint):
    """Makes the sums those of the files, as someone who means harm would."""
    files = sorted(file for item in ("meta", "state") for file in (checkpoint / item).rglob("*") if file.is_file())
    sums = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(checkpoint)}\n" for file in files)
    (checkpoint / "SHA256").write_text("".join(sums))


def refused(checkpoints, match):
    with pytest.raises(RunError, match=match) as error:
        restore(checkpoints, 3, STATE)
    assert "\n" not in str(error.value)


@pytest.fixture
def little_memory():
    """What is claimed is not allocated: the process may take 4 GB more than it has."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# A checkpoint whose arrays are plain zarr files, as orbax reads them too: anyone can write them by hand.


def zarr(shape, chunks):
    return json.dumps(
        {
            "zarr_format": 2,
            "shape": shape,
            "chunks": chunks,
            "dtype": "<f4",
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        }
    )


@pytest.fixture
def by_hand(checkpoints):
    """Writes the shapes that the checkpoint claims for its kernel."""
    state = checkpoints / "3" / "state"

    def write(shape, chunks):
        for entry in state.iterdir():
            if entry.name != "_METADATA":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        tree = json.loads((state / "_METADATA").read_text())
        tree["use_ocdbt"] = False
        (state / "_METADATA").write_text(json.dumps(tree))
        for name, (size, pieces) in {"kernel": (shape, chunks), "step": ([], [])}.items():
            (state / name).mkdir()
            (state / name / ".zarray").write_text(zarr(size, pieces))
        (state / "step" / ".zarray").write_text(zarr([], []).replace("<f4", "<i4"))
        resum(checkpoints / "3")

    return write


@pytest.mark.parametrize("size", [5 * 10**9, 10**15])
def test_absurd_shapes_are_not_allocated(checkpoints, by_hand, little_memory, size):
    by_hand([4, size], [4, size])
    refused(
        checkpoints, rf"3: kernel: got float32\[4, {size}\], expected float32\[4, 5\]: a checkpoint of another model"
    )


def test_absurd_pieces_are_not_allocated(checkpoints, by_hand, little_memory):
    by_hand([4, 5], [4, 5 * 10**9])
    (checkpoints / "3/state/kernel/0.0").write_bytes(bytes(100))
    resum(checkpoints / "3")
    refused(checkpoints, "3: got a damaged checkpoint .*kernel is stored in pieces of")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": 3.0},
        {"runs": 5},
        {"runs": [5]},
        {"runs": [{**RUN, "rows": "x"}]},
        {"runs": [{**RUN, "config": []}]},
        {"runs": None},
    ],
)
def test_what_lies_beside_the_arrays(checkpoints, change):
    path = checkpoints / "3" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    resum(checkpoints / "3")
    refused(checkpoints, "3: got a damaged checkpoint")


@pytest.mark.parametrize("file", ["SHA256", "meta/metadata", "state/_METADATA", "_CHECKPOINT_METADATA", "state/more"])
def test_pipes_in_a_checkpoint_are_not_waited_for(checkpoints, file):
    path = checkpoints / "3" / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused(checkpoints, f"3: got a damaged checkpoint .*{path.name} is no file")
    with pytest.raises(RunError, match="got no checkpoint that is whole"):
        restore_latest(checkpoints, STATE)


# The files of a workdir.


@pytest.mark.parametrize("name", ["config.json", "sweep.json", "metrics.jsonl"])
def test_pipes_in_a_workdir_are_not_waited_for(tmp_path, name):
    workdir = Workdir(tmp_path)
    workdir.ledger.write_text('{"members": {}, "groups": []}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises((RunError, OSError), match="A pipe or a device"):
        workdir.read_rows() if name == "metrics.jsonl" else read_settings(workdir)


def test_nesting(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 900 + "1" + "}" * 900)
    with pytest.raises(RunError, match=r"config.json: got damaged JSON \(nested more than 30 deep\)"):
        Workdir(tmp_path).read_config()


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "checkpoints", "groups/0/checkpoints", "seed=0/metrics.jsonl"]
)
def test_links_are_not_written_through(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(RunError, match=f"{link}: got a link in a workdir"), Workdir(tmp_path / "run").lock():
        pass
    assert outside.read_text() == "mine"


def test_a_workdir_may_be_behind_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with Workdir(tmp_path / "run").lock():
        assert (tmp_path / "elsewhere" / ".lock").exists()


def test_a_link_ends_a_run_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("vmapbn_flax.runs.train.load_dataset", small.load)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="got a link in a workdir"):
        train(small.config(data__name="small"), tmp_path / "run")
    assert [path.name for path in tmp_path.rglob("*") if path.name != "metrics.jsonl"] == ["run"]


def test_a_config_names_no_machine_to_connect_to():
    saved = default_config().to_dict()
    saved["distributed"].update(coordinator="example.com:1234", num_processes=2, process_id=1)
    restored = restore_config(default_config(), saved, "config.json")
    assert restored.distributed == default_config().distributed


LEDGERS = {
    "names that lead out": {"members": {"../../out": {}}, "groups": [["../../out"]]},
    "absolute names": {"members": {"/tmp/out": {}}, "groups": [["/tmp/out"]]},
    "text for a step": {"members": {"seed=0": {"step": "x"}}, "groups": [["seed=0"]]},
    "no reason": {"members": {"seed=0": {"reason": None}}, "groups": [["seed=0"]]},
    "unknown status": {"members": {"seed=0": {"status": "gone"}}, "groups": [["seed=0"]]},
    "members in no group": {"members": {"seed=0": {}}, "groups": []},
    "groups of no members": {"members": {}, "groups": [["seed=0"]]},
    "groups of groups": {"members": {"seed=0": {}}, "groups": [[["seed=0"]]]},
    "a list of members": {"members": ["seed=0"], "groups": [["seed=0"]]},
}


@pytest.mark.parametrize("content", LEDGERS.values(), ids=LEDGERS)
def test_ledgers(tmp_path, content):
    if isinstance(content["members"], dict):
        entry = {"status": "done", "step": 3, "reason": ""}
        content = content | {"members": {name: entry | more for name, more in content["members"].items()}}
    config = default_config()
    config.data.validation_size = 10
    config.sweep.seed = (0, 1)
    workdir = Workdir(tmp_path)
    workdir.write(workdir.config, config.to_dict())
    workdir.write(workdir.ledger, content)
    with pytest.raises(RunError, match=r"sweep.json: got no ledger of a sweep"):
        read_settings(workdir)
