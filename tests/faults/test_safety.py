"""Nothing read from a workdir is run or unpickled, and no name in it leads out of it."""

import json
import pickle
import shutil
import signal

import pytest

from vmapbn_flax.runs.checkpoints import saved_steps

STEP = "vmapbn_flax.training.programs:Programs.advance"  # by when all has been read


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def python_in_json(path):
    """What some loaders of JSON, YAML or trees would import or call."""
    call = f"__import__('pathlib').Path({str(path)!r}).touch()"
    return {
        "py/reduce": [{"py/function": "builtins.open"}, {"py/tuple": [str(path), "w"]}],
        "__class__": call,
        "!": call,
    }


@pytest.fixture
def stopped(run, killed):
    """The workdir of a run to go on with, which it reads first."""
    return shutil.copytree(killed, run.workdir)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def resum(checkpoint):
    """Makes the sums those of the files, as someone who means harm would."""
    import hashlib

    sums = checkpoint / "SHA256"
    names = [line.partition("  ")[2] for line in sums.read_text().splitlines()]
    sha = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    sums.write_text("".join(f"{sha[name]}  {name}\n" for name in names))


def targets(workdir):
    newest = workdir / "checkpoints" / str(saved_steps(workdir / "checkpoints")[-1])
    return {
        "config.json": workdir / "config.json",
        "metrics.jsonl": workdir / "metrics.jsonl",
        "summary.json": workdir / "summary.json",
        "meta": newest / "meta" / "metadata",
        "tree": newest / "state" / "_METADATA",
        "orbax": newest / "_CHECKPOINT_METADATA",
        "arrays": max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size),
    }


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json", "meta", "tree", "orbax", "arrays"])
def test_pickles_are_bytes(run, stopped, tmp_path, name):
    path, canary = targets(stopped)[name], tmp_path / "canary"
    path.write_bytes(pickle.dumps(Payload(canary)))
    if name in ("meta", "tree", "arrays"):
        resum(path.parents[1] if name != "arrays" else next(p for p in path.parents if (p / "SHA256").exists()))
    status = run.finish(watch=str(stopped), name=STEP)
    assert status in (1, -signal.SIGKILL), run.lines()  # refused; or gone round it and on to the next step
    assert not any(line.startswith("Traceback") for line in run.lines())
    assert not canary.exists()
    assert not [line for line in run.lines() if line.startswith("watched")]


def test_names_in_trees_are_not_imported(run, stopped, tmp_path):
    """orbax's description of the tree may name types, by module."""
    canary = tmp_path / "canary"
    evil = python_in_json(canary) | {"module_name": "antigravity", "class_name": "fly", "value_type": "os.system"}

    def change(content):
        for entry in content["tree_metadata"].values():
            entry["value_metadata"] |= evil
            for key in entry["key_metadata"]:
                key |= evil
        content |= {"custom_metadata": evil, "pytree_metadata_options": {"support_rich_types": True} | evil}

    path = targets(stopped)["tree"]
    rewrite(path, change)
    resum(path.parents[1])
    assert run.finish(watch=str(stopped), name=STEP) in (1, -signal.SIGKILL)
    assert not canary.exists()
    assert not [line for line in run.lines() if line.startswith(("watched", "Traceback"))]


def test_names_do_not_lead_out(run, stopped, tmp_path):
    """Of fields, rows and checkpoints: none is a path to write to."""
    names = ["../../out", "/tmp/out", "a/../../out"]
    paths = targets(stopped)
    config = paths["config.json"].read_text()
    rewrite(paths["config.json"], lambda config: config.update({name.replace(".", ""): name for name in names}))
    rewrite(paths["meta"], lambda meta: meta.update({"step": names[0]}))
    resum(paths["meta"].parents[1])
    with paths["metrics.jsonl"].open("a") as file:
        file.writelines(json.dumps({"step": step, name: 1.0}) + "\n" for step in (1, 99) for name in names)
    assert run.finish(watch=str(stopped)) == 1  # another config
    paths["config.json"].write_text(config)
    assert run.finish(watch=str(stopped)) == 0, run.lines()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "log"}
    assert not [line for line in run.lines() if line.startswith("watched")]
