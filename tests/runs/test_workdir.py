import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.workdir import Workdir

NAMES = {
    "config": "config.json",
    "metrics": "metrics.jsonl",
    "summary": "summary.json",
    "checkpoints": "checkpoints",
    "picture": "accuracy.png",
    "profile": "profile",
    "refresh": "refresh.json",
    "ledger": "sweep.json",
    "sweep_picture": "sweep.png",
    "figure": "figure.png",
}


# Names.


@pytest.mark.parametrize(("attribute", "name"), NAMES.items())
def test_its_files_by_name(tmp_path, attribute, name):
    assert getattr(Workdir(tmp_path / "run"), attribute) == tmp_path / "run" / name


@pytest.mark.parametrize("writes", [True, False])
def test_other_workdirs_in_it_and_above_it(tmp_path, writes):
    """They are written by the process that writes this one."""
    workdir = Workdir(tmp_path, writes=writes)
    member = workdir.member("seed=1")
    paths = {workdir.refreshed: tmp_path / "refreshed", member: tmp_path / "seed=1", member.sweep: tmp_path}
    assert [other.path for other in paths] == list(paths.values())
    assert {other.writes for other in paths} == {writes}
    assert workdir.group_checkpoints(3) == tmp_path / "groups" / "3" / "checkpoints"


def test_the_sweep_of_a_member_that_is_named_from_within(tmp_path, monkeypatch):
    (tmp_path / "seed=1").mkdir()
    for directory, path in ((tmp_path, "seed=1"), (tmp_path / "seed=1", ".")):
        monkeypatch.chdir(directory)
        assert Workdir(Path(path)).sweep.path == tmp_path


def test_errors_name_it_as_it_was_given():
    assert str(Workdir(Path("runs/vmap_bn"))) == "runs/vmap_bn"


# What it is.


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        ([], []),
        (["config.json"], ["run"]),
        (["metrics.jsonl"], ["run"]),
        (["config.json", "metrics.jsonl", "summary.json"], ["run"]),
        (["sweep.json"], ["sweep"]),
        (["config.json", "sweep.json"], ["sweep"]),
        (["metrics.jsonl", "sweep.json"], ["run", "sweep"]),
        (["refresh.json"], ["refreshed"]),
        (["config.json", "refresh.json"], ["run", "refreshed"]),
    ],
    ids=lambda names: "+".join(sorted(names)) or "nothing",
)
def test_what_it_is(tmp_path, files, kinds):
    for name in files:
        (tmp_path / name).write_text("{}")
    workdir = Workdir(tmp_path)
    assert [kind for kind in ("run", "sweep", "refreshed") if getattr(workdir, f"is_{kind}")] == kinds


def test_a_config_with_values_to_sweep_is_no_run(tmp_path):
    """Its ledger is lost, or not written yet."""
    (tmp_path / "config.json").write_text('{"sweep": {"seed": [0, 1]}}')
    assert not Workdir(tmp_path).is_run


def test_nothing_is_what_is_not_there(tmp_path):
    workdir = Workdir(tmp_path / "nothing")
    assert (workdir.is_run, workdir.is_sweep, workdir.is_refreshed) == (False, False, False)
    assert (workdir.read_rows(), workdir.holder) == ([], "")
    with pytest.raises(RunError, match=r"nothing/config\.json: got No such file or directory"):
        workdir.read_config()
    assert not workdir.path.exists()


# What is in it.


def test_what_is_written_is_read(tmp_path):
    workdir = Workdir(tmp_path / "new" / "run")
    workdir.write(workdir.config, {"seed": 3})
    assert workdir.read_config() == {"seed": 3}
    workdir.metrics.write_text('{"step": 1, "train_loss": null}\n{"step": 2}\n{"step": 3')
    assert workdir.read_rows() == [{"step": 1, "train_loss": None}, {"step": 2}]


def test_a_process_that_does_not_write_changes_nothing(tmp_path):
    workdir = Workdir(tmp_path / "run", writes=False)
    for other in (workdir, workdir.member("seed=1"), workdir.refreshed):
        other.write(other.config, {"seed": 3})
    assert list(tmp_path.iterdir()) == []
    Workdir(workdir.path).write(workdir.config, {"seed": 4})
    workdir.write(workdir.config, {"seed": 3})
    assert json.loads(workdir.config.read_text()) == {"seed": 4}


# The lock.


def test_one_process_at_a_time(tmp_path):
    script = (
        "import pathlib, sys\n"
        "from vmapbn_flax.runs.workdir import Workdir\n"
        "with Workdir(pathlib.Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError) as error, Workdir(tmp_path).lock():
            pass
        assert f"in use by process {holder.pid} on {socket.gethostname()};" in str(error.value)
        holder.kill()
    with Workdir(tmp_path).lock():  # whatever the dead process left written there
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_the_lock_is_let_go_of(tmp_path):
    with pytest.raises(ZeroDivisionError), Workdir(tmp_path / "new" / "run").lock():
        raise ZeroDivisionError
    with Workdir(tmp_path / "new" / "run").lock():
        pass


@pytest.mark.parametrize("text", ["process 1 on elsewhere\n", "", "\xff\xfe" * 100])
def test_a_stale_lock_is_taken_over(tmp_path, text):
    (tmp_path / ".lock").write_bytes(text.encode("latin-1"))
    with Workdir(tmp_path).lock():
        pass


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    for workdir, got in [("file", "File exists"), ("file/run", "Not a directory"), ("run", "Is a directory")]:
        with ExitStack() as stack, pytest.raises(RunError, match=f"{workdir}: got {got}; expected room"):
            stack.enter_context(Workdir(tmp_path / workdir).lock())
