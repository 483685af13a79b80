"""A disk that is full, or files that may not grow: one line, and the last good checkpoint as it was."""

import os
import subprocess

import pytest

from tests.helpers.runs import outcome
from vmapbn_flax.runs.checkpoints import saved_steps


@pytest.mark.parametrize("limit", [800, 4000])
def test_files_that_may_not_grow(run, undisturbed, limit):
    """A checkpoint or the picture is the first to reach the limit."""
    assert run.finish(file_limit=limit) == 1
    errors = [line for line in run.lines() if not line.startswith(("step", str(run.workdir)))]
    assert len(errors) == 1, run.lines()
    assert errors[0].startswith("error: ")
    assert "File too large" in errors[0]
    assert run.finish() == 0
    assert outcome(run.workdir) == undisturbed.outcome


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of few bytes."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system; the test above needs no such thing")
    mounted = []

    def mount(place, size):
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("size", ["4k", "48k"])
def test_a_full_disk(run, undisturbed, small_disk, size):
    small_disk(run.workdir, size)
    assert run.finish() == 1
    errors = [line for line in run.lines() if not line.startswith(("step", str(run.workdir)))]
    assert len(errors) == 1, run.lines()
    assert errors[0].startswith("error: ")
    assert "No space left on device" in errors[0]
    steps = saved_steps(run.workdir / "checkpoints")
    subprocess.run(["mount", "-o", "remount,size=100m", run.workdir], check=True)
    assert run.finish() == 0, run.lines()
    if steps:
        assert f"resuming at step {steps[-1]} of 30" in run.lines()[0]
    assert outcome(run.workdir) == undisturbed.outcome
