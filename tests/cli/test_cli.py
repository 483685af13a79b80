"""What people get wrong, as the command line tells them: one line, the right exit status, nothing written."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import quick, small
from tests.helpers.runs import CONFIG, command
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.cli.main import main
from vmapbn_flax.cli.parser import make_parser
from vmapbn_flax.data import bundled
from vmapbn_flax.runs import train as run
from vmapbn_flax.runs.checkpoints import saved_steps

ROOT = Path(__file__).parents[2]
TINY = "--config=configs/tiny.py"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module", autouse=True)
def small_data():
    """What runs in this process trains on few images, and is compiled quickly."""
    with pytest.MonkeyPatch.context() as patch, quick.programs():
        patch.setattr(run, "load_dataset", small.load)
        yield


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def refused(capsys, *argv):
    """The exit status and the one line of a command that cannot be carried out."""
    status, lines = command(capsys, *argv)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return status, lines[0]


# Config values. Each line names the field, what it got and what it takes.
VALUES = {
    "seed": ["-1", "4294967296", "99999999999999999999"],
    "data.name": [""],
    "data.validation_size": ["-1"],
    "data.test_fraction": ["1", "-0.1", "nan"],
    "data.memory_limit": ["0", "-1", "nan", "inf"],
    "model.norm": ["layer", ""],
    "model.hidden": ["()", "(0,)", "(16,-1)", "(16,2.5)", "(16,x)", "wide", "2000000000"],
    "model.batch_norm_momentum": ["1", "-0.1", "nan", "0.999999999999"],
    "model.batch_norm_epsilon": ["0", "-1e-5", "inf", "1e-60"],
    "model.ghost_batch_size": ["1", "3", "-2", "256"],
    "optimizer.name": ["adagrad"],
    "optimizer.learning_rate": ["0", "-1e-3", "nan", "inf", "1e39"],
    "optimizer.schedule": ["linear"],
    "optimizer.warmup_epochs": ["-1", "1", "nan"],
    "optimizer.weight_decay": ["-1", "inf"],
    "optimizer.adam_b1": ["1"],
    "optimizer.adam_b2": ["-0.5"],
    "optimizer.sgd_momentum": ["1.5"],
    "train.batch_size": ["-5", "0", "1"],
    "train.num_epochs": ["0", "-1", "nan", "inf"],
    "train.label_smoothing": ["1", "-0.1"],
    "train.log_every": ["0"],
    "train.eval_every": ["0", "nan"],
    "train.eval_batch_size": ["0", "99999999999"],
    "train.max_skipped_steps": ["0", "99999999999"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in VALUES for value in VALUES[field]])
def test_config_values(capsys, workdir, monkeypatch, field, value):
    monkeypatch.setattr(run, "load_dataset", None)  # found before any data loads
    status, line = refused(capsys, "train", TINY, f"--config.{field}={value}", f"--workdir={workdir}")
    assert status == 2
    assert re.match(rf"error: config\.{field}: got .+, expected .+\. Change it with --config\.{field}=", line)
    assert not workdir.exists()


# Config values that it takes the data to judge.
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.batch_size=101"], r"config\.train\.batch_size: got 101, expected at most the 100 training"),
        (["--config.train.num_epochs=0.01"], r"config\.train\.num_epochs: got 0\.01, expected at least one step"),
        (
            ["--config.train.num_epochs=1e300"],
            r"config\.train\.num_epochs: got 1e\+300, expected .* fewer than 2\*\*31",
        ),
        (
            ["--config.data.name=mnist", "--config.data.validation_size=60000"],
            r"validation_size: got 60000; expected 0 to",
        ),
        (
            ["--config.data.name=mnist", "--config.data.dir=~nobody9/x"],
            r"data\.dir: got ~nobody9/x, a home that is not known",
        ),
        (["--config.data.name=cifar10", "--config.data.dir=~nobody9/x"], r"data\.dir: got ~nobody9/x, a home"),
        (["--config.data.name=minst"], r"data\.name: got 'minst'; .* Did you mean 'mnist'\?"),
        (["--config.data.name=../mnist"], r"data\.name: got '\.\./mnist'; expected 'mnist' or a data set"),
        (["--config.data.name=cifar10"], r"holds none\. Prepare it: .*tfds build cifar10"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_config_values_and_data(capsys, workdir, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    short = ["--config.optimizer.warmup_epochs=0"]
    status, line = refused(capsys, "train", CONFIG, *short, *flags, f"--workdir={workdir}")
    assert status == 2
    assert re.search(message, line), line
    assert not workdir.exists()


# The command line itself.
COMMANDS = {
    "no command": (
        [],
        "required: command; usage: .*{train,evaluate,refresh,predict,.*,report,figure}",
    ),
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "no --config": (["train"], "got no --config, expected a config file, such as --config=configs/vmap_bn.py"),
    "empty --config": (["train", "--config="], "got a config file that cannot be read"),
    "--config without a value": (["train", "--config"], "Missing value for flag --config"),
    "missing config file": (["train", "--config=configs/none.py"], "No such file or directory: 'configs/none.py'"),
    "directory as a config file": (["train", "--config=configs"], "got a file that is not Python"),
    "text as a config file": (["train", "--config=LICENSE"], "LICENSE"),
    "argument for a config without": (["train", f"{TINY}:3"], r"get_config\(\) takes 0 positional arguments but 1"),
    "saved config without a workdir": (["train", "--config=configs/saved.py"], "missing 1 required .* 'workdir'"),
    "unknown field": (["train", TINY, "--config.seeed=1"], 'seeed: Did you mean "seed" instead of "seeed"'),
    "unknown inner field": (["train", TINY, "--config.train.batchsize=1"], 'Did you mean "batch_size"'),
    "sweep of a field that has none": (
        ["train", TINY, "--config.sweep.seed=(0,1)"],
        r"unknown field \(seed\), .*, or of those that the config file sweeps",
    ),
    "unknown section": (["train", TINY, "--config.trian.seed=1"], "unknown field .*trian"),
    "field of a field": (["train", TINY, "--config.seed.x=1"], r"unknown field .*seed\.x"),
    "text for an integer": (["train", TINY, "--config.seed=many"], "--config.seed=many: invalid literal"),
    "float for an integer": (["train", TINY, "--config.train.batch_size=12.5"], "--config.train.batch_size=12.5"),
    "text for a float": (["train", TINY, "--config.optimizer.learning_rate=fast"], "could not convert .* 'fast'"),
    "value for a section": (["train", TINY, "--config.model=5"], "--config.model=5"),
    "stray argument": (["train", TINY, "more"], "got the stray argument 'more', expected only flags"),
    "stray argument first": (["train", "configs/tiny.py", TINY], "got the stray argument 'configs/tiny.py'"),
    "unknown flag": (["train", TINY, "--sede=1"], "got the unknown flag --sede, expected --config"),
    "unknown short flag": (["train", TINY, "-q"], "got the unknown flag --q"),
    "abbreviated flag": (["train", TINY, "--work=x"], "got the unknown flag --work,"),
    "empty workdir": (["train", TINY, "--workdir="], "--workdir: got an empty path"),
    "workdir without a value": (["train", TINY, "--workdir"], "--workdir: expected one argument"),
    "no workdir": (["evaluate"], "required: workdir"),
    "step of another type": (["evaluate", "run", "--step=last"], "--step: invalid int value: 'last'"),
    "unknown norm": (["evaluate", "run", "--norm=layer"], "--norm: invalid choice: 'layer'"),
    "stray argument to evaluate": (["evaluate", "run", "more"], "got the unknown argument 'more'"),
    "unknown flag to refresh": (["refresh", "run", "--fast"], "got the unknown argument '--fast'"),
    "no output": (["plot", "run"], "required: -o/--output"),
    "no runs": (["plot", "-o", "x.png"], "required: workdir"),
    "workdir for a selftest": (["selftest", TINY, "--workdir=x"], "got the unknown flag --workdir"),
    "selftest of a sweep": (
        ["selftest", "--config=configs/sweep_lr.py"],
        "config.sweep: got values of .*learning_rate",
    ),
    "parity without batch norm": (["parity", "--config=configs/no_bn.py"], "config.model.norm: got 'none', expected"),
}


@pytest.mark.parametrize(("argv", "message"), COMMANDS.values(), ids=COMMANDS.keys())
def test_commands(capsys, tmp_path, argv, message):
    before = sorted(ROOT.iterdir())
    status, line = refused(capsys, *argv)
    assert status == 2
    assert re.search(message, line), line
    assert sorted(ROOT.iterdir()) == before


CONFIG_FILES = {
    "raises": ("def get_config(): return 1 / 0", "ZeroDivisionError in the config file: division by zero"),
    "does not import": ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
    "does not parse": ("def get_config(:", "invalid syntax"),
    "has no get_config": ("config = {}", "get_config"),
    "returns a dict": ("def get_config(): return {'seed': 1}", r"got a dict from its get_config\(\), expected a Conf"),
    "lacks fields": (
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})",
        r"config\.train\.num_epochs: got a config without this field, expected every field of vmapbn_flax\.defa",
    ),
    "wrong type": (
        "from vmapbn_flax import default_config\ndef get_config():\n  c = default_config()\n  c.seed = 'x'\n  return c",
        "Could not override field 'seed'",
    ),
    "new type": (
        "from vmapbn_flax import default_config\ndef get_config():\n  c = default_config()\n"
        "  with c.ignore_type(): c.train.batch_size = 'many'\n  return c",
        r"config\.train\.batch_size: got 'many', expected 2 or more examples",
    ),
    "misspelt field": (
        "from vmapbn_flax import default_config\ndef get_config():\n  c = default_config()\n"
        "  c.train.num_epoch = 3.0\n  return c",
        r'unknown field .*Did you mean "num_epochs" instead of "num_epoch".*one of vmapbn_flax\.default_config\(\)',
    ),
}


def test_a_config_file_of_one_s_own(tmp_path, monkeypatch):
    """From any directory: it starts from the package's defaults and imports its neighbours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as the console script has it
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "widths.py").write_text("NARROW = (4, 3)")
    (tmp_path / "mine.py").write_text(
        "import widths\nfrom vmapbn_flax import default_config\n\n"
        "def get_config():\n    config = default_config()\n    config.data.name = 'small'\n"
        "    config.model.hidden = widths.NARROW\n    config.train.batch_size = 16\n"
        "    config.train.num_epochs = 1.0\n    return config\n"
    )
    assert main(["train", f"--config={tmp_path}/mine.py"]) == 0
    assert json.loads((tmp_path / "runs/mine/config.json").read_text())["model"]["hidden"] == [4, 3]
    assert main(["train", f"--config={ROOT}/configs/saved.py:runs/mine", "--config.train.num_epochs=2"]) == 0


@pytest.mark.parametrize(("text", "message"), CONFIG_FILES.values(), ids=CONFIG_FILES.keys())
def test_config_files(capsys, tmp_path, workdir, monkeypatch, text, message):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections' name for any of them
    path = tmp_path / "mine.py"
    path.write_text(text)
    status, line = refused(capsys, "train", f"--config={path}", f"--workdir={workdir}")
    assert status == 2
    assert re.search(message, line), line
    assert not workdir.exists()


# Workdirs.


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data):
    """A workdir with a finished run of few steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run.train(parse_config([CONFIG, "--config.train.num_epochs=1"])[0], workdir)
    return workdir


def replace(name, content):
    def damage(workdir):
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def edit_config(**changes):
    def damage(workdir):
        path = workdir / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def lose_middle_row(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = lines[1][:20] + "\n"
    (workdir / "metrics.jsonl").write_text("".join(lines))


def lose_all_but_the_last_row(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[-1])


WORKDIRS = {
    "config.json: torn": (replace("config.json", '{"seed": 0, "da'), "config.json: got damaged JSON"),
    "config.json: empty": (replace("config.json", ""), "config.json: got damaged JSON"),
    "config.json: bytes": (replace("config.json", b"\x80\x04\xff"), "config.json: got damaged JSON"),
    "config.json: list": (replace("config.json", "[1, 2]"), r"config.json: got damaged JSON \(a list, not an object\)"),
    "config.json: nested deep": (replace("config.json", "[" * 10**5), "config.json: got damaged JSON"),
    "config.json: directory": (replace("config.json", None), "config.json: got Is a directory; expected"),
    "config.json: unknown field": (edit_config(sede=1), r"differs .*config\.sede: 1 -> None"),
    "config.json: dotted field": (edit_config(**{"a.b": 1}), "got a damaged config in the workdir"),
    "config.json: section of another type": (edit_config(train=3), r"differs .*config\.train: 3 -> None"),
    "config.json: epochs of another type": (
        edit_config(train={"num_epochs": "5"}),
        "got a damaged config in the workdir",
    ),
    "config.json: no fields": (replace("config.json", "{}"), r"differs .*config\.seed: None -> 0"),
    "metrics.jsonl: damaged row": (lose_middle_row, "metrics.jsonl, line 2: got a damaged row"),
    "metrics.jsonl: lost rows": (lose_all_but_the_last_row, r"metrics.jsonl: got 1 rows up to step 6, expected the 4"),
    "metrics.jsonl: directory": (replace("metrics.jsonl", None), "metrics.jsonl: got Is a directory; expected"),
    "checkpoints: file": (replace("checkpoints", ""), "checkpoints: got File exists; expected room and permission"),
    "checkpoints: only strays": (
        lambda workdir: [shutil.rmtree(p) or p.mkdir() for p in (workdir / "checkpoints").iterdir()],
        "got no checkpoint that is whole",
    ),
    ".lock: directory": (replace(".lock", None), "run: got Is a directory; expected room and permission"),
}


@pytest.mark.parametrize(("damage", "message"), WORKDIRS.values(), ids=WORKDIRS.keys())
def test_workdirs(capsys, workdir, finished, damage, message):
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    damage(workdir)
    before = contents(workdir)
    status, line = refused(capsys, "train", CONFIG, "--config.train.num_epochs=1", f"--workdir={workdir}")
    assert status == 1
    assert re.search(message, line), line
    assert contents(workdir) == before


def contents(workdir):
    """Of every file, but the lock and the files that only the picture-makers read."""
    files = [
        path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock" and "events" not in path.name
    ]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "6"}'])
def test_damaged_summary(capsys, workdir, finished, content):
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").write_text(content)
    status, line = refused(capsys, "train", CONFIG, "--config.train.num_epochs=1", f"--workdir={workdir}")
    assert status == 1
    assert "summary.json: got" in line


def test_checkpoints_of_another_model(capsys, workdir, finished):
    shutil.copytree(finished / "checkpoints", workdir / "checkpoints")
    status, line = refused(capsys, "train", CONFIG, "--config.model.hidden=(7,5)", f"--workdir={workdir}")
    assert status == 1
    assert re.search(
        r"checkpoints/6: .*: got float32\[\d.*\], expected float32\[\d*, 7.*a checkpoint of another model", line
    )


def test_no_place_for_a_workdir(capsys, tmp_path):
    """Permissions do not stop root, so these are places where nobody can make a directory."""
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        status, line = refused(capsys, "train", CONFIG, f"--workdir={workdir}")
        assert status == 1
        assert re.search(rf"{workdir}.*: got .*; expected", line)


COMMANDS_ON_WORKDIRS = {
    "evaluate nothing": (["evaluate", "{none}"], 1, "config.json: got No such file or directory; expected the workdir"),
    "refresh nothing": (["refresh", "{none}"], 1, "config.json: got No such file or directory"),
    "saved config of nothing": (["train", "--config=configs/saved.py:{none}"], 1, "config.json: got No such file"),
    "saved config of here": (["train", "--config=configs/saved.py:"], 1, "config.json: got No such file"),
    "plot nothing": (["plot", "{none}", "-o", "{none}.png"], 1, "none: got no metrics.jsonl with rows"),
    "plot into nothing": (["plot", "{run}", "-o", "{none}/x.png"], 1, "x.png: got No such file or directory"),
    "plot another format": (["plot", "{run}", "-o", "{none}.doc"], 2, "none.doc: got .*'.doc', expected .png"),
    "evaluate a step that is not": (["evaluate", "{run}", "--step=5"], 1, r"got steps \[3, 6\], expected step 5"),
    "evaluate a sweep": (["evaluate", "{sweep}"], 1, r"sweep: got the workdir of a sweep, expected that of a run\."),
    "refresh a sweep": (["refresh", "{sweep}"], 1, r"sweep: got the workdir of a sweep, expected that of a run\."),
    "plot a sweep": (["plot", "{sweep}", "-o", "{none}.png"], 1, "sweep: got the workdir of a sweep, expected that of"),
    "train refreshed statistics": (
        ["train", CONFIG, "--workdir={refreshed}"],
        1,
        "got refreshed statistics, expected a",
    ),
}


@pytest.mark.parametrize(
    ("argv", "expected", "message"), COMMANDS_ON_WORKDIRS.values(), ids=COMMANDS_ON_WORKDIRS.keys()
)
def test_commands_on_workdirs(capsys, tmp_path, finished, monkeypatch, argv, expected, message):
    (tmp_path / "refreshed").mkdir()
    (tmp_path / "refreshed" / "refresh.json").write_text("{}")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    monkeypatch.setattr("vmapbn_flax.cli.evaluate.load_dataset", lambda *where: small.dataset())
    places = {"none": tmp_path / "none", "run": finished, "refreshed": tmp_path / "refreshed"}
    places["sweep"] = tmp_path / "sweep"
    status, line = refused(capsys, *(argument.format(**places) for argument in argv))
    assert status == expected
    assert re.search(message, line), line


def test_evaluate_a_damaged_checkpoint(capsys, tmp_path, finished, monkeypatch):
    monkeypatch.setattr("vmapbn_flax.cli.evaluate.load_dataset", lambda *where: small.dataset())
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "6" / "SHA256").unlink()
    status, line = refused(capsys, "evaluate", tmp_path / "run")
    assert status == 1
    assert "6: got a damaged checkpoint" in line
    assert command(capsys, "evaluate", tmp_path / "run", "--step=3") == (0, [])


# Data files.


def truncate(content):
    return content[: len(content) // 2]


DATA_FILES = {
    "missing": (None, "No such file or directory"),
    "empty": (lambda content: b"", "contents of SHA-256|got .*; expected an original file"),
    "truncated": (truncate, "ended before the end-of-stream"),
    "not gzip": (lambda content: b"labels", "Not a gzipped file"),
    "other labels": (
        lambda content: gzip.compress(b"\0\0\x08\x01" + (10_000).to_bytes(4, "big") + bytes(10_000)),
        "contents of SHA-256",
    ),
    "labels out of range": (
        lambda c: gzip.compress(gzip.decompress(c).replace(b"\x09", b"\x0a")),
        "contents of SHA-256",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DATA_FILES.values(), ids=DATA_FILES.keys())
def test_data_files(capsys, tmp_path, workdir, damage, message):
    data = tmp_path / "data"
    data.mkdir()
    for file in bundled._BUNDLED.glob("*.gz"):
        (data / file.name).symlink_to(file)
    path = data / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    status, line = refused(capsys, "train", TINY, f"--config.data.dir={data}", f"--workdir={workdir}")
    assert status == 2
    assert f"{path}: got " in line
    assert re.search(message, line), line
    assert not workdir.exists()


# Training itself.


def test_divergence(capsys, workdir):
    flags = [
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=1e30",
        "--config.train.max_skipped_steps=5",
    ]
    status, lines = command(capsys, "train", CONFIG, *flags, f"--workdir={workdir}")
    assert status == 1
    assert re.search(r"error: .*got 5 steps in a row .* not finite, up to step \d+ at learning rate .*Lower", lines[-1])
    # The same command comes to the same end.
    again = command(capsys, "train", CONFIG, *flags, f"--workdir={workdir}")
    assert (again[0], again[1][-1]) == (status, lines[-1])


def test_out_of_memory(capsys, workdir):
    flags = ["--config.train.eval_batch_size=2000000000", "--config.train.num_epochs=1"]
    status, lines = command(capsys, "train", CONFIG, *flags, f"--workdir={workdir}")
    assert status == 1
    assert re.fullmatch(r"error: out of memory \(.*\): .* do not fit\. Lower .*eval_batch_size.*", lines[-1])
    assert saved_steps(workdir / "checkpoints") == []


# The same through `python train.py`, as people run it.

SUBPROCESS = {
    "unknown config key": ([TINY, "--config.seeed=1"], 2, 'Did you mean "seed"'),
    "wrong type": ([TINY, "--config.seed=x"], 2, "--config.seed=x: invalid literal"),
    "negative batch size": (
        [TINY, "--config.train.batch_size=-5"],
        2,
        "config.train.batch_size: got -5, expected 2 or",
    ),
    "learning rate nan": ([TINY, "--config.optimizer.learning_rate=nan"], 2, "config.optimizer.learning_rate: got nan"),
    "unknown data set": ([TINY, "--config.data.name=minst"], 2, "Did you mean 'mnist'"),
    "unreadable workdir": ([TINY, "--workdir=LICENSE/run"], 1, "LICENSE/run: got Not a directory"),
    "missing --config": ([], 2, "got no --config"),
    "stray argument": ([TINY, "more"], 2, "got the stray argument 'more'"),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """All of them at once: most of their time they wait for imports."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "TFDS_DATA_DIR": str(elsewhere)}
    return {
        name: subprocess.Popen(
            [
                sys.executable,
                "train.py",
                *(argv if any("workdir" in a for a in argv) else [*argv, f"--workdir={elsewhere}/x"]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for name, (argv, _, _) in SUBPROCESS.items()
    }


@pytest.mark.parametrize("name", SUBPROCESS)
def test_train_py(processes, name):
    _, expected, message = SUBPROCESS[name]
    process = processes[name]
    out, err = process.communicate()
    assert (process.returncode, out) == (expected, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not Path(process.args[-1].removeprefix("--workdir=")).exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        command(capsys, "train", "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "usage: vmapbn-flax train --config=FILE",
        "--config.FIELD=VALUE",
        "configs/saved.py",
        "--workdir",
        "resumes",
    ):
        assert part in text
    for path in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / path).exists()


def test_every_command_and_argument_is_described():
    parser = make_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    names = "train evaluate refresh predict export fold parity selftest plot report figure"
    assert list(commands.choices) == names.split()
    for name, subparser in commands.choices.items():
        text = subparser.format_help()
        assert text.startswith(f"usage: vmapbn-flax {name} ")
        assert subparser.description
        assert [action.dest for action in subparser._actions if not action.help] == []
        assert ("--config=FILE" in text) == subparser.get_default("takes_config")


ARGUMENTS = {
    "mine.py": "runs/mine",
    "mine.py:": "runs/mine",
    "mine.py:large": "runs/mine_large",
    "mine.py:width=8,depth=2": "runs/mine_width=8,depth=2",
    "mine.py:/tmp/large": "runs/mine__tmp_large",
    "mine.py:../../large": "runs/mine_.._.._large",
    "mine.py:..": "runs/mine_..",
    "saved.py:elsewhere/large": "elsewhere/large",
}


@pytest.mark.parametrize(("source", "expected"), ARGUMENTS.items(), ids=ARGUMENTS.keys())
def test_default_workdir(tmp_path, monkeypatch, source, expected):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    text = "from vmapbn_flax import default_config\ndef get_config(argument=''): return default_config()\n"
    (tmp_path / source.partition(":")[0]).write_text(text)
    assert parse_config([f"--config={tmp_path}/{source}"])[1] == Path(expected)


def test_compiled_programs_are_kept(tmp_path):
    """In the user's cache directory, for the next process, which gets the same numbers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    argv = ["--config=configs/tiny.py", "--config.train.num_epochs=0.1", "--config.optimizer.warmup_epochs=0.0"]

    def train(number):
        """The sizes of the entries, the metrics and the warnings after a run."""
        workdir = tmp_path / str(number)
        command = [sys.executable, "train.py", *argv, f"--workdir={workdir}"]
        said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stderr
        warned = [line for line in said.splitlines() if "arning" in line]
        entries = (tmp_path / "cache" / "vmapbn_flax").glob("*-cache")
        return {path.name: path.stat().st_size for path in entries}, (workdir / "metrics.jsonl").read_bytes(), warned

    first = train(0)
    assert any("train_steps" in name for name in first[0])
    assert first[2] == []
    assert train(1) == first
