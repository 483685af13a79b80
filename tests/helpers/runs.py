"""Whole runs to test with: commands in this process, and what a finished run leaves behind."""

import functools
import io
import json
from pathlib import Path

import jax
import optuna
from ml_collections import ConfigDict

from tests.helpers import small
from vmapbn_flax.cli.main import main
from vmapbn_flax.runs.checkpoints import restore, saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.report import report
from vmapbn_flax.training.programs import Programs

CONFIG = f"--config={Path(__file__).parent}/fault_config.py"


def command(capsys, *argv):
    """The exit status of a command line, and the lines it writes to standard error."""
    capsys.readouterr()
    status = main([str(argument) for argument in argv])
    return status, capsys.readouterr().err.splitlines()


def outcome(workdir):
    """All that a run, a sweep or a refresh ends with and that has to be the same however it was disturbed."""
    names = ("config.json", "metrics.jsonl", "accuracy.png", "sweep.png", "refresh.json")
    files = {name: contents(workdir / name) for name in names}
    if (workdir / "refreshed").exists():
        files["refreshed"] = outcome(workdir / "refreshed")
    if (workdir / "sweep.json").exists():
        members = json.loads((workdir / "sweep.json").read_text())["members"]
        printed = io.StringIO()
        report(Workdir(workdir), file=printed)
        return files | {
            "ledger": contents(workdir / "sweep.json"),
            "report": printed.getvalue().replace(str(workdir), ""),
            "members": {name: outcome(workdir / name) for name in members},
        }
    if not (workdir / "summary.json").exists():  # of a diverged member, or refreshed
        return files | {"states": {step: state_bytes(workdir, step) for step in saved_steps(workdir / "checkpoints")}}
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["seconds"]
    states = {step: state_bytes(workdir, step) for step in (summary["step"], summary["best_step"])}
    return files | {"summary": summary, "states": states}


def mirrored(workdir):
    """The members of a sweep in the database for Optuna's dashboard, and the state and value of each."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{workdir}/optuna.db", skip_compatibility_check=True)
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).get_trials()
    storage.remove_session()
    storage.engine.dispose()
    return [(trial.user_attrs["member"], trial.state.name, trial.value) for trial in trials]


def contents(path):
    return path.read_bytes() if path.exists() else None


def state_bytes(workdir, step):
    """The arrays of a checkpoint by name: type, shape and bytes."""
    state, _ = restore(workdir / "checkpoints", step, _template((workdir / "config.json").read_text()))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): (leaf.dtype.name, leaf.shape, leaf.tobytes()) for path, leaf in leaves}


def leftovers(workdir):
    """Files that only something unfinished leaves behind."""
    return [str(path) for path in workdir.rglob("*") if "tmp" in path.name or path.name.endswith(".removed")]


@functools.cache
def _template(saved_config):
    config = ConfigDict(json.loads(saved_config))
    return Programs([config], small.load(config.data)).template()
