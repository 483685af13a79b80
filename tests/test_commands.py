"""The commands in README.md and docs/: they run, or are listed here; the files and fields that they name exist."""

import dataclasses
import re
import shlex
import socket
import subprocess
import sys
import tomllib

import PIL.Image
import pytest

from tests.helpers import small
from tests.helpers.runs import command
from tests.test_docs import PAGES, ROOT
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.config import is_sweep, validate
from vmapbn_flax.data import bundled
from vmapbn_flax.fields import FIELDS, NETWORK_FIELDS
from vmapbn_flax.sweeps.expand import expand

BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^for .*?^done; wait$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
NO_WARMUP = "--config.optimizer.warmup_epochs=0.0"
SMALL = {"mlp": "--config.model.hidden=(8,8,8)", "conv": "--config.model.features=(2,)"}  # or of two channels

LISTED = [
    # These install something, or need what the tests do without.
    "pip install -e .",
    "pip install -e '.[test]'",
    "pip install .",
    "pip install -e '.[cuda]'",
    "pip install -e . -c docs/constraints-3.11.txt",
    "pip install -e '.[tensorflow]'",
    "pip install -e '.[dev]'",
    "pip install -e '.[peers]'",
    "pip install -e '.[export]'",
    "pip install -e '.[optuna]'",
    "python3 -m venv .venv",
    "source .venv/bin/activate",
    "pre-commit install",
    "tensorboard --logdir runs",
    "optuna-dashboard sqlite:///runs/sweep_optuna/optuna.db",
    "tfds build fashion_mnist --file_format=array_record",
    "python train.py --config=configs/vmap_bn.py --config.data.name=fashion_mnist",
    "python train.py --config=configs/vmap_bn.py --config.data.name=folder --config.data.dir=~/flowers",
    "python train.py --config=configs/vmap_bn.py --config.data.name=idx --config.data.dir=fashion_mnist",
    "srun python train.py --config=configs/vmap_bn.py --config.distributed.coordinator=slurm",
    # These test, or other tests run them.
    "python -m vmapbn_flax export runs/vmap_bn -o vmap_bn.pt",  # in test_docs.py, where PyTorch is installed
    "pytest",
    "pytest -n0 tests/training/test_steps.py",
    "pip download --no-deps --no-binary flax -d peers flax==0.12.8",
    "tar -xzf peers/flax-0.12.8.tar.gz -C peers",
    "git clone --depth 1 --branch v0.13.8 https://github.com/patrick-kidger/equinox peers/equinox-0.13.8",
    "VMAPBN_PEER_TESTS=peers pytest -n0 tests/nn/test_their_tests.py",
    "pytest -m slow",
    "pytest tests/cli tests/test_files.py tests/runs tests/multihost tests/faults",
    "pytest -n0 -m slow -s tests/faults/test_kills.py",
    "pytest -n0 -m slow tests/test_fuzz.py",
    ".ci/run",
    ".ci/constraints",
    "python -m vmapbn_flax selftest --config=configs/tiny.py",
    "python tests/benchmarks/performance.py > docs/performance.md",
    "python tests/benchmarks/exactness.py > docs/exactness.md",
    "python tests/benchmarks/folding.py",
    "taskset -c 0 python tests/benchmarks/batch_norm.py",
    "python tests/benchmarks/scaling.py",
    "python tests/benchmarks/sweeps.py",
    "python tests/benchmarks/smoothness.py",
]


def commands(page):
    """The commands of a page, without comments; a loop is one."""
    found = []
    for block in BLOCK.findall((ROOT / page).read_text()):
        loops = LOOP.findall(block)
        for line in LOOP.sub("LOOP", block).replace("\\\n", "").splitlines():
            parts = re.sub(r"\s+#.*", "", line).split(" && ")
            found += [loops.pop(0) if part == "LOOP" else part for part in parts]
    return found


def arguments(text):
    """The arguments of a command of this program; None for another program."""
    words = shlex.split(text)
    if words[:2] == ["python", "train.py"]:
        return ["train", *words[2:]]
    return words[3:] if words[:3] == ["python", "-m", "vmapbn_flax"] else None


TO_RUN = {page: [text for text in commands(page) if text not in LISTED] for page in PAGES}
TO_RUN = {page: texts for page, texts in TO_RUN.items() if texts}


def test_commands_are_run_or_listed():
    found = {text for page in PAGES for text in commands(page)}
    assert [text for texts in TO_RUN.values() for text in texts if not (arguments(text) or LOOP.match(text))] == []
    assert sorted(set(LISTED) - found) == []


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What the commands read of a clone, without runs; a tenth of the images to test with, and all decoded once."""
    mnist = dataclasses.replace(small.mnist(), test=small.mnist().test[:1000])
    monkeypatch.setattr(bundled, "read_mnist", lambda directory: mnist)
    for name in ("configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    for folder in ("chalk", "paper"):  # the images of docs/using.md
        (tmp_path / folder).mkdir()
        PIL.Image.new("RGB", (20, 30), "white").save(tmp_path / folder / "three.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(argv):
    """`argv` with a small network and a thousandth of the epochs; on other devices, in a workdir of its own."""
    if argv[0] not in ("train", "parity") or "saved.py" in argv[1]:  # whose config is short already
        return argv
    config, workdir = parse_config([flag for flag in argv if flag.startswith("--config")])
    more = [f"--workdir={workdir}_devices"] if config.mesh.data else []
    if "warmup_epochs" in config.sweep.optimizer:  # draws of it, and of other fields
        size = config.sweep_options.size // 8
        more += ["--config.sweep.optimizer.warmup_epochs=(0.0,)", f"--config.sweep_options.size={size}"]
    if config.sweep_options.halving:  # the rungs are where they were in the shorter sweep, each at an evaluation
        first = config.sweep_options.first_rung / 1000
        more += [f"--config.{name}={first}" for name in ("sweep_options.first_rung", "train.eval_every")]
    small = SMALL.get(config.model.name, "--config.model.width=2")
    return [*argv, small, NO_WARMUP, f"--config.train.num_epochs={config.train.num_epochs / 1000}", *more]


def quick(page):
    return page if page in ("README.md", "docs/index.md") else pytest.param(page, marks=pytest.mark.slow)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("page", [quick(page) for page in TO_RUN])
def test_commands_run(page, clone, capsys):
    """In the order of the page, one after another."""
    for text in TO_RUN[page]:
        if argv := arguments(text):
            status, lines = command(capsys, *shortened(argv))
            assert status == 0, [text, *lines]


@pytest.mark.parametrize("text", [text for texts in TO_RUN.values() for text in texts if LOOP.match(text)])
@pytest.mark.slow
def test_processes_run(text, clone):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    short = shlex.join([SMALL["mlp"], NO_WARMUP, "--config.train.num_epochs=0.02"])
    python = f'python() {{ "{sys.executable}" "$@" {short}; }}\n'
    done = subprocess.run(["bash", "-c", python + text.replace("9876", str(port))], capture_output=True, text=True)
    assert "on 2 x cpu" in done.stderr
    assert (clone / "runs" / "vmap_bn" / "summary.json").exists(), done.stderr


# What commands and the code in sentences name.

NAMED = {page: "\n".join(CODE.findall((ROOT / page).read_text())) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    names = re.findall(r"(?<![\w./-])(?:tests|docs|configs|vmapbn_flax|\.ci)/[\w./-]*(?![\w./<*-])", NAMED[page])
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_fields_exist(page):
    known = set(FIELDS).union(*NETWORK_FIELDS.values())
    fields = re.findall(r"--config\.([a-z][\w.]*)", NAMED[page])
    assert [name for name in fields if name.removeprefix("sweep.") not in known] == []


def test_configs_are_valid():
    for text in {text for page in PAGES for text in commands(page) if "--config=" in text and "saved.py" not in text}:
        flags = [word.replace("$i", "1") for word in shlex.split(text) if word.startswith("--config")]
        config, _ = parse_config(flags)
        assert expand(config) if is_sweep(config) else validate(config) is None


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [name for page in PAGES for name in re.findall(r"'\.\[(\w+)\]'", NAMED[page]) if name not in extras] == []
