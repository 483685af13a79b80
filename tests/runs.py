"""Whole runs to test with: commands in this process, and what a finished run leaves behind."""

import functools
import json
from pathlib import Path

import jax
import small
from ml_collections import ConfigDict

from vmapbn_flax.checkpoint import restore
from vmapbn_flax.cli import main
from vmapbn_flax.programs import Programs

CONFIG = f"--config={Path(__file__).parent}/faults/config.py"


def command(capsys, *argv):
    """The exit status of a command line, and the lines it writes to standard error."""
    capsys.readouterr()
    status = main([str(argument) for argument in argv])
    return status, capsys.readouterr().err.splitlines()


def outcome(workdir):
    """All that a run ends with and that has to be the same however it was disturbed."""
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["seconds"], summary["speed"]
    return {
        "config": (workdir / "config.json").read_text(),
        "metrics": (workdir / "metrics.jsonl").read_text(),
        "summary": summary,
        "states": [state_bytes(workdir, summary[step]) for step in ("step", "best_step")],
        "picture": (workdir / "accuracy.png").exists(),
    }


def state_bytes(workdir, step):
    """The arrays of a checkpoint by name: type, shape and bytes."""
    state = restore(workdir / "checkpoints", step, _template((workdir / "config.json").read_text()))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): (leaf.dtype.name, leaf.shape, leaf.tobytes()) for path, leaf in leaves}


def leftovers(workdir):
    """Files that only something unfinished leaves behind."""
    return [str(path) for path in workdir.rglob("*") if "tmp" in path.name]


@functools.cache
def _template(saved_config):
    config = ConfigDict(json.loads(saved_config))
    dataset = small.dataset() if config.data.name == "small" else small.mnist()
    return Programs(config, dataset).template()
