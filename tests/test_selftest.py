import contextlib
import json
import re
import shutil

import jax
import pytest
import small

from vmapbn_flax import cli, loop
from vmapbn_flax import selftest as module
from vmapbn_flax.checkpoint import Checkpoints, restore, saved_steps
from vmapbn_flax.errors import RunError
from vmapbn_flax.flags import parse_config
from vmapbn_flax.programs import Programs

FLAGS = ["--config=configs/tiny.py", "--config.model.hidden=(4,)"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What one process compiles the next one loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def selftest(capsys, *flags):
    """The exit status of the command, and a line of its table for each comparison."""
    capsys.readouterr()
    status = cli.main(["selftest", *flags])
    lines = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    return status, [tuple(line) for line in lines if len(line) == 3][1:]


def test_stopped_and_resumed(capsys):
    status, found = selftest(capsys, *FLAGS)
    assert status == 0
    state = jax.tree.leaves(Programs(parse_config(FLAGS)[0], small.mnist()).template())
    # A training row at 10, 20, 30, 40, 47 (`step` and three numbers), an evaluation at 23, 46 and 47 (the same).
    rows = 5 + 3
    assert [(what, size.partition(",")[0], equal) for what, size, equal in found] == [
        ("state", f"{len(state)} arrays", "yes"),
        ("metrics.jsonl", f"{rows} rows of {4 * rows} numbers", "yes"),
        ("summary.json but for seconds", "9 fields", "yes"),
        ("parity: the vmapped and the batched network", "7 quantities", "yes"),
        ("refresh: the checkpoint evaluated", "3 figures", "yes"),
    ]
    assert found[0][1].endswith(f" {sum(leaf.size * leaf.dtype.itemsize for leaf in state):,} bytes")


def test_a_resume_that_is_perturbed(capsys, monkeypatch):
    """One bit of one weight, of a pixel that is black in every image, and one digit of one row."""
    flags = [*FLAGS, "--config.model.norm=none"]
    programs, train = Programs(parse_config(flags)[0], small.mnist()), module._train

    def train_and_perturb(flags, workdir, *, stop=False):
        said = train(flags, workdir, stop=stop)
        if stop:
            flip_a_bit(workdir / "checkpoints", programs)
            log = workdir / "metrics.jsonl"
            first, *rest = log.read_text().splitlines(keepends=True)
            log.write_text(
                "".join([re.sub(r"[1-8](?=,)", lambda digit: str(int(digit[0]) + 1), first, count=1), *rest])
            )
        return said

    monkeypatch.setattr(module, "_train", train_and_perturb)
    status, found = selftest(capsys, *flags)
    assert status == 1
    assert {what: equal for what, _, equal in found} == {
        "state": "NO: 1 differ, first params/dense_0/kernel",
        "metrics.jsonl": "NO: 1 differ, first row 1",
        "summary.json but for seconds": "yes",
    }


def flip_a_bit(directory, programs):
    """Saves the newest checkpoint as it would be with the last bit of its first weight another."""
    step = saved_steps(directory)[-1]
    meta = json.loads((directory / str(step) / "meta" / "metadata").read_text())
    state = restore(directory, step, programs.template())
    state.params["dense_0"]["kernel"].view("uint32")[0, 0] ^= 1
    shutil.rmtree(directory / str(step))
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(step, state, meta["config"], rows=meta["rows"])


def test_a_run_that_cannot_be_stopped(monkeypatch, capsys):
    def train(flags, workdir, *, stop=False):
        loop.train(small.config(), workdir)
        return "resuming at step 24 of 24 steps"

    monkeypatch.setattr(loop, "load_dataset", lambda *where: small.dataset())
    monkeypatch.setattr(module, "load_dataset", lambda *where: small.dataset())
    monkeypatch.setattr(module, "_train", train)
    with pytest.raises(RunError, match=r"got a run of 24 steps that was over before it could be stopped, expected a"):
        module.selftest(small.config(), [])


def test_a_process_that_fails(tmp_path):
    with pytest.raises(
        RunError, match=r"got exit status 2 from a run, expected it to train; it said: error: got .*none"
    ):
        module._train(["--config=configs/none.py"], tmp_path / "run", stop=True)
