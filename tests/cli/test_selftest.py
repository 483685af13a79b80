import contextlib
import io
import re
import shutil
from types import SimpleNamespace

import jax
import pytest

from configs import own_network
from tests.helpers import small
from vmapbn_flax import default_config
from vmapbn_flax.cli import selftest as module
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.cli.main import main
from vmapbn_flax.errors import RunError
from vmapbn_flax.files import write_json
from vmapbn_flax.runs.checkpoints import Checkpoints, restore, saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs

FLAGS = ["--config=configs/tiny.py", "--config.model.hidden=(4,)"]
TRAIN = module._train


def selftest(train):
    """The exit status of the command, with `train` for its processes, and a line of its table for each comparison."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(module, "_train", train)
        # As many as here, where the result is evaluated again: with jax 0.10 bits depend on it.
        patch.setenv("JAX_NUM_CPU_DEVICES", str(jax.device_count()))
        status = main(["selftest", *FLAGS])
    lines = (re.split(r" {2,}", line.strip()) for line in out.getvalue().splitlines())
    return status, [tuple(line) for line in lines if len(line) == 3][1:]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What the command finds, and the workdirs that its processes leave behind."""
    kept = tmp_path_factory.mktemp("kept")

    def train_and_keep(flags, workdir, *, stop=False):
        said = TRAIN(flags, workdir, stop=stop)
        shutil.copytree(workdir.path, kept / ("stopped" if stop else workdir.path.name))
        return said

    status, found = selftest(train_and_keep)
    return SimpleNamespace(status=status, found=found, workdirs=kept)


@pytest.fixture(scope="module")
def programs():
    return Programs([parse_config(FLAGS)[0]], small.mnist())


def test_stopped_and_resumed(real, programs):
    assert real.status == 0
    state = jax.tree.leaves(programs.template())
    # A training row at 10, 20, 30, 40, 47 (the step and three numbers), an evaluation at 23, 46, 47 (the same).
    rows = 5 + 3
    assert [(what, size.partition(",")[0], equal) for what, size, equal in real.found] == [
        ("state", f"{len(state)} arrays", "yes"),
        ("metrics.jsonl", f"{rows} rows of {4 * rows} numbers", "yes"),
        ("summary.json but for seconds", "9 fields", "yes"),
        ("parity: the vmapped and the batched network", "7 quantities", "yes"),
        ("refresh: the checkpoint evaluated", "3 figures", "yes"),
    ]
    assert real.found[0][1].endswith(f" {sum(leaf.size * leaf.dtype.itemsize for leaf in state):,} bytes")
    (step,) = saved_steps(real.workdirs / "stopped" / "checkpoints")
    assert 10 <= step < 47


@pytest.mark.slow
def test_a_resume_that_is_perturbed(real, programs, monkeypatch):
    """By one bit of one weight, of a pixel that is black in every image, and by one digit of one row."""

    def train(flags, workdir, *, stop=False):
        straight = workdir.path.name == "straight"
        if stop or straight:
            shutil.copytree(real.workdirs / ("stopped" if stop else "straight"), workdir.path)
        if stop:
            flip_a_bit(workdir.checkpoints, programs)
            rows = workdir.metrics.read_text()
            workdir.metrics.write_text(rows.replace('train_loss": 2', 'train_loss": 3', 1))
        return "" if stop or straight else TRAIN(flags, workdir)

    monkeypatch.setattr(module, "parity", lambda config: [])
    status, found = selftest(train)
    assert status == 1
    assert [equal for _, _, equal in found] == [
        "NO: 1 differ, first params/dense_0/kernel",
        "NO: 1 differ, first row 1",
        *["yes"] * 3,
    ]


def flip_a_bit(directory, programs):
    """Saves the newest checkpoint as it would be with the last bit of its first weight another."""
    step = saved_steps(directory)[-1]
    state, meta = restore(directory, step, programs.template())
    state.params["dense_0"]["kernel"].view("uint32")[0, 0] ^= 1
    shutil.rmtree(directory / str(step))
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(step, state, {"runs": meta["runs"]})


class Alone(own_network.Net):
    """A network without a batched twin in its module."""


def test_a_network_without_a_twin(monkeypatch, tmp_path, capsys):
    """There is nothing to compare it with but itself."""
    monkeypatch.setattr(module, "refresh", lambda path, network: {"before": {"test_accuracy": 0.5}})
    write_json(Workdir(tmp_path).summary, {"test_accuracy": 0.5})
    found = module._check_norms(default_config(f"{__name__}:Alone"), Workdir(tmp_path))
    assert found == [("refresh: the checkpoint evaluated", "1 figures, 3 bytes", [])]
    assert f"refresh, without parity: {__name__}:Alone has no batched twin" in capsys.readouterr().err


def test_a_run_that_is_over_too_soon(monkeypatch):
    def train(flags, workdir, *, stop=False):
        (workdir.checkpoints / "24").mkdir(parents=True, exist_ok=True)
        return "resuming at step 24 of 24 steps"

    monkeypatch.setattr(module, "load_dataset", lambda *where: small.dataset())
    monkeypatch.setattr(module, "_train", train)
    with pytest.raises(RunError, match=r"got a run of 24 steps that was over before it could be stopped, expected a"):
        module.selftest(small.config(), [])


def test_a_process_that_fails(tmp_path):
    with pytest.raises(
        RunError, match=r"got exit status 2 from a run, expected it to train; it said: error: got .*none"
    ):
        TRAIN(["--config=configs/none.py"], Workdir(tmp_path / "run"), stop=True)
