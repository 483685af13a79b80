"""Bad inputs of every kind, through the command line: one line that names the culprit, the right status, nothing else.

`test_cli.py` reads some of these lines more closely.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import quick, small
from tests.helpers.runs import CONFIG, command
from vmapbn_flax import default_config
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.config import flat
from vmapbn_flax.fields import FIELDS, NETWORK_FIELDS
from vmapbn_flax.runs import train as run
from vmapbn_flax.sweeps.plan import Datasets

ROOT = Path(__file__).parents[2]
SAVED = "--config=configs/saved.py:"


@pytest.fixture(scope="module", autouse=True)
def small_data():
    """The set called small, for commands in this process, compiled quickly; from the directory of a clone."""
    before = Path.cwd()
    os.chdir(ROOT)
    with pytest.MonkeyPatch.context() as patch, quick.programs():
        patch.setattr(run, "load_dataset", small.load)
        for module in ("evaluate", "refresh", "parity", "selftest"):
            patch.setattr(f"vmapbn_flax.cli.{module}.load_dataset", small.load)
        patch.setattr(Datasets, "load", lambda self, config: small.load(config.data))
        yield
    os.chdir(before)


def check(capsys, argv, status, word):
    got, lines = command(capsys, *argv)
    assert (got, len(lines)) == (status, 1), lines
    assert lines[0].startswith("error: ")
    assert word in lines[0]


# Every field: what no type of it can be read from, and what is out of range.

DEFAULTS = flat(default_config())
OF_NO_TYPE = {int: ["x", "1.5", "", "()"], float: ["x", "", "()"], bool: ["x"], tuple: ["x", "1.5"], str: []}
OUT_OF_RANGE = {
    "train.num_epochs": ["-inf"],
    "seed": ["-2147483649"],
    "data.name": ["/etc", "mnist/", "a b"],
    "data.memory_limit": ["-0.0"],
    "data.augment": ["('shift',)", "('flip:1',)", "(2,)"],
    "model.name": ["cnn", "nowhere:Net", "json:loads"],
    "model.norm": ["None", "VMAP"],
    "model.dtype": ["int8", "float16"],
    "model.hidden": ["(65537,)", "(1e3,)", "('a',)"],
    "model.batch_norm_momentum": ["-inf"],
    "model.batch_norm_epsilon": ["nan"],
    "model.ghost_batch_size": ["-1"],
    "optimizer.name": ["", "Adam"],
    "optimizer.learning_rate": ["-inf"],
    "optimizer.schedule": ["", "cos"],
    "optimizer.warmup_epochs": ["inf"],
    "optimizer.weight_decay": ["nan"],
    "optimizer.adam_b1": ["-1e-3", "nan"],
    "optimizer.adam_b2": ["1.0", "inf"],
    "optimizer.sgd_momentum": ["1", "nan"],
    "train.batch_size": ["-1"],
    "train.label_smoothing": ["nan", "inf"],
    "train.log_every": ["-1", "1" + "0" * 30],
    "train.eval_every": ["-1", "inf"],
    "train.eval_batch_size": ["-1"],
    "train.max_skipped_steps": ["-1"],
    "mesh.data": ["-1", "100000", "7777"],
    "mesh.member": ["-1", "1000000000"],
    "mesh.cpu_devices": ["-1", "1000000000"],
    "mesh.replicate_limit": ["-1", "9223372036854775808"],
    "distributed.coordinator": ["host", "host:port", ":1"],
    "distributed.num_processes": ["0", "-1", "2"],
    "distributed.process_id": ["-1", "1"],
    "sweep_options.mode": ["", "grid"],
    "sweep_options.size": ["0", "10001", "1000000000000"],
    "sweep_options.batch": ["0", "-1"],
    "sweep_options.seed": ["-1", "1" + "0" * 30],
    "sweep_options.chunk": ["-1", "1" + "0" * 30],
    "sweep_options.on_failure": ["", "retry"],
    "sweep_options.halving": ["1", "-3", "1" + "0" * 30],
    "sweep_options.first_rung": ["0", "nan", "inf"],
}
FLAGS = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
FLAGS += [(name, value) for name, default in DEFAULTS.items() for value in OF_NO_TYPE[type(default)]]


def test_every_field_has_bad_values():
    assert {name for name, _ in FLAGS} | {"data.dir"} == FIELDS.keys() | NETWORK_FIELDS["mlp"].keys()


@pytest.mark.parametrize(("name", "value"), FLAGS)
def test_flags(capsys, tmp_path, name, value):
    check(capsys, ["train", CONFIG, f"--config.{name}={value}", f"--workdir={tmp_path}/run"], 2, name)
    assert list(tmp_path.iterdir()) == []


# Every field in the config.json of a run that somebody else made.

OTHER_TYPES = {
    int: [1.5, True, "1", None, [1]],
    float: ["1", True, None],
    bool: [1],
    tuple: [5, "x"],
    str: [5, None, ["a"]],
}
SAVED_FIELDS = [(name, value) for name, default in DEFAULTS.items() for value in OTHER_TYPES[type(default)][:2]]
SAVED_FIELDS += [("data.dir", "a\0b"), ("data.dir", "\ud800"), ("seed", 10**400), ("optimizer.learning_rate", 10**400)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data):
    """The workdir of a finished run of a few steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run.train(parse_config([CONFIG, "--config.train.num_epochs=1"])[0], workdir)
    return workdir


@pytest.mark.parametrize(("name", "value"), SAVED_FIELDS)
def test_saved_fields(capsys, tmp_path, finished, name, value):
    config = json.loads((finished / "config.json").read_text())
    *sections, last = name.split(".")
    holder = config
    for section in sections:
        holder = holder[section]
    holder[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(capsys, ["evaluate", tmp_path], 1, last)


# Workdirs of the wrong kind, for every command.

PLACES = {
    "nothing": lambda path, finished: None,
    "an empty directory": lambda path, finished: path.mkdir(),
    "a file": lambda path, finished: path.write_text("x"),
    "a file for a config": lambda path, finished: (path / "config.json").mkdir(parents=True),
    "no config": lambda path, finished: [shutil.copytree(finished, path), (path / "config.json").unlink()],
    "a torn config": lambda path, finished: [shutil.copytree(finished, path), os.truncate(path / "config.json", 99)],
    "a list for a config": lambda path, finished: [path.mkdir(), (path / "config.json").write_text("[]")],
    "no fields": lambda path, finished: [path.mkdir(), (path / "config.json").write_text("{}")],
}
COMMANDS = {
    "evaluate": lambda path: ["evaluate", path],
    "evaluate the other": lambda path: ["evaluate", path, "--norm=batched"],
    "refresh": lambda path: ["refresh", path],
    "train on": lambda path: ["train", f"{SAVED}{path}", "--config.train.num_epochs=2"],
    "report": lambda path: ["report", path],
    "figure": lambda path: ["figure", path],
    "parity": lambda path: ["parity", f"{SAVED}{path}"],
    "selftest": lambda path: ["selftest", f"{SAVED}{path}"],
}
# An object without fields is a config of defaults to these.
MAY = {("train on", "no fields"), ("parity", "no fields"), ("selftest", "no fields")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMMANDS)
def test_workdirs_of_the_wrong_kind(capsys, tmp_path, finished, name, place):
    if (name, place) in MAY:
        return
    path = tmp_path / "run"
    PLACES[place](path, finished)
    check(capsys, COMMANDS[name](path), 1, str(path))


MORE = {
    "evaluate: no checkpoint of that step": (["evaluate", "{run}", "--step=99"], 1, "step 99"),
    "evaluate: negative step": (["evaluate", "{run}", "--step=-1"], 1, "step -1"),
    "evaluate: step beyond all numbers": (["evaluate", "{run}", "--step=" + "9" * 30], 1, "9999"),
    "evaluate: half a step": (["evaluate", "{run}", "--step=1.5"], 2, "--step"),
    "evaluate: two workdirs": (["evaluate", "{run}", "{run}"], 2, "unknown argument"),
    "evaluate: empty workdir": (["evaluate", ""], 2, "workdir"),
    "evaluate: a config": (["evaluate", "{run}", "--config=configs/tiny.py"], 2, "--config"),
    "refresh: step": (["refresh", "{run}", "--step=99"], 1, "step 99"),
    "refresh: no workdir": (["refresh"], 2, "workdir"),
    "refresh: norm": (["refresh", "{run}", "--norm=vmap"], 2, "--norm"),
    "figure: a run": (["figure", "{run}"], 1, "sweep.json"),
    "report: a run": (["report", "{run}"], 1, "sweep.json"),
    "report: no workdir": (["report"], 2, "workdir"),
    "report: two workdirs": (["report", "{run}", "{run}"], 2, "unknown argument"),
    "plot: a file": (["plot", "LICENSE", "-o", "{new}.png"], 1, "LICENSE"),
    "plot: one of two": (["plot", "{run}", "{new}", "-o", "{new}.png"], 1, "{new}"),
    "plot: no suffix": (["plot", "{run}", "-o", "{new}"], 2, "{new}"),
    "plot: into a directory": (["plot", "{run}", "-o", "{tmp}/directory.png"], 1, "directory.png"),
    "plot: two outputs": (["plot", "{run}", "-o", "{new}.png", "-q"], 2, "-q"),
    "plot: empty output": (["plot", "{run}", "-o", ""], 2, "-o"),
    "parity: no config": (["parity"], 2, "--config"),
    "parity: a workdir": (["parity", "{run}"], 2, "--config"),
    "parity: a sweep": (["parity", "--config=configs/sweep_lr.py"], 2, "config.sweep"),
    "selftest: no config": (["selftest"], 2, "--config"),
    "selftest: a workdir": (["selftest", "{run}"], 2, "--config"),
    "selftest: no steps": (["selftest", CONFIG, "--config.train.num_epochs=1e-9"], 2, "warmup_epochs"),
    "train: a workdir": (["train", "{run}"], 2, "--config"),
    "train: in a file": (["train", CONFIG, "--workdir=LICENSE"], 1, "LICENSE"),
    "train: another seed": (["train", CONFIG, "--config.seed=1", "--workdir={run}"], 1, "config.seed: 0 -> 1"),
    "train: fewer epochs": (
        ["train", CONFIG, "--config.train.num_epochs=0.5", "--config.optimizer.warmup_epochs=0", "--workdir={run}"],
        1,
        "config.train.num_epochs",
    ),
    "train: a section of the config": (["train", CONFIG, "--config.train=x"], 2, "train"),
    "train: a method of the config": (["train", CONFIG, "--config.lock=1"], 2, "lock"),
    "train: text in an index": (["train", CONFIG, "--config.model.hidden[x]=1"], 2, "indices"),
    "train: two configs": (["train", CONFIG, "--config=configs/none.py"], 2, "configs/none.py"),
    "train: a config in a directory": (["train", "--config=configs/"], 2, "configs"),
    "train: a picture for a config": (["train", "--config={run}/accuracy.png"], 2, "not Python"),
    "train: JSON for a config": (["train", "--config={run}/config.json"], 2, "expected one that ends in .py"),
}


@pytest.mark.parametrize(("argv", "status", "word"), MORE.values(), ids=MORE.keys())
def test_commands(capsys, tmp_path, finished, argv, status, word):
    (tmp_path / "directory.png").mkdir()
    places = {"run": finished, "new": tmp_path / "new", "tmp": tmp_path}
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    check(capsys, [argument.format(**places) for argument in argv], status, word.format(**places))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before
    assert [path.name for path in tmp_path.rglob("*")] == ["directory.png"]


# Sweeps.

SWEEPS = {
    "no such field": "sweep.seeed = (0, 1)",
    "no such inner field": "sweep.optimizer.rate = (0.1, 0.2)",
    "no values": "sweep.seed = ()",
    "a number": "sweep.seed = 5",
    "text": "sweep.seed = 'ab'",
    "text among numbers": "sweep.seed = (0, 'a')",
    "out of range": "sweep.seed = (0, -1)",
    "the same twice": "sweep.seed = (1, 1)",
    "too many": "sweep.seed = sweep.data.validation_size = tuple(range(1, 102))",
    "a section": "sweep.model = (0, 1)",
    "devices": "sweep.mesh = ConfigDict({'data': (1, 2)})",
    "processes": "sweep.distributed = ConfigDict({'num_processes': (1, 2)})",
    "a distribution in a product": "sweep.seed = ('uniform', 0, 1)",
    "lengths to zip": "config.sweep_options.mode = 'zip'\n    sweep.seed = (0, 1)\n    sweep.model.norm = ('vmap',)",
    "a distribution of names": "config.sweep_options.mode = 'random'\n    sweep.model.norm = ('uniform', 0, 1)",
    "a distribution the wrong way": "config.sweep_options.mode = 'random'\n    sweep.seed = ('uniform', 5, 1)",
    "a logarithm of zero": "config.sweep_options.mode = 'random'\n    sweep.seed = ('log_uniform', 0, 1)",
    "all numbers": "config.sweep_options.mode = 'random'\n    sweep.seed = ('uniform', -1e308, 1e308)",
    "a number beyond floats": "config.sweep_options.mode = 'random'\n    sweep.seed = ('uniform', 0, 10**400)",
    "more draws than values": "config.sweep_options.mode = 'random'\n    sweep.seed = (0, 1)",
    "none held out": "config.data.validation_size = 0\n    sweep.seed = (0, 1)",
    "a long name": "sweep.model.hidden = ((1,) * 200, (2,) * 200)",
}


@pytest.mark.parametrize("lines", SWEEPS.values(), ids=SWEEPS.keys())
def test_sweeps(capsys, tmp_path, monkeypatch, lines):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections' name for any of them
    monkeypatch.syspath_prepend(ROOT)
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\nfrom tests.helpers import fault_config\n\n\ndef get_config():\n"
        "    config = fault_config.get_config()\n    config.data.validation_size = 20\n    sweep = config.sweep\n"
        f"    {lines}\n    return config\n"
    )
    word = "validation_size" if "validation_size = 0" in lines else "sweep"
    check(capsys, ["train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"], 2, word)
    assert not (tmp_path / "run").exists()


def test_there_are_two_hundred():
    cases = len(FLAGS) + len(SAVED_FIELDS) + len(PLACES) * len(COMMANDS) - len(MAY) + len(MORE) + len(SWEEPS)
    assert cases >= 200
