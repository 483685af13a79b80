"""The end of a failed process, the interpreter's own exit included, after the line that says why."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.faults.test_disk import small_disk
from tests.helpers import small
from tests.helpers.program import CONFIG, ROOT, environment

__all__ = ["small_disk"]

SECONDS = 5

# A thread that works on, as one that compiles does.
BUSY = """
import threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
from vmapbn_flax.cli.main import run_program
run_program(["train", "--config=missing.py"])
"""


def ends(*argv, **options):
    """The exit status, the lines on standard error, and the seconds from the line that says why to the exit."""
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        **options,
    )
    lines, moment = [], time.monotonic()
    with process:
        for line in process.stderr:  # ends with the process, or when it closes its standard error
            lines.append(line)
            if line.startswith("error: "):
                moment = time.monotonic()
                break
        try:
            lines += process.communicate(timeout=SECONDS)[1].splitlines(keepends=True)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"alive {SECONDS} s after {lines[-1]}")
    return process.returncode, lines, time.monotonic() - moment


def test_a_thread_that_works_on(tmp_path):
    status, lines, seconds = ends("-c", BUSY)
    assert status == 2, lines
    assert seconds < SECONDS


def test_no_room_for_directories(small_disk, tmp_path):
    """orbax's threads would wait five minutes for a directory that could not be made."""
    small_disk(tmp_path / "run", "1m,nr_inodes=8")
    splits = {"train": small.dataset().train, "test": small.dataset().test}
    images = {f"{name}_images": split.images for name, split in splits.items()}
    np.savez(tmp_path / "small.npz", **images, **{f"{name}_labels": split.labels for name, split in splits.items()})
    data = ("--config.data.name=npz", f"--config.data.dir={tmp_path}")
    status, lines, seconds = ends("-m", "vmapbn_flax", "train", CONFIG, *data, f"--workdir={tmp_path}/run")
    assert status == 1
    assert seconds < SECONDS
    assert [line.split(":")[0] for line in lines if not line.startswith(("step", str(tmp_path)))] == ["error"], lines
    assert "No space left on device" in lines[-1]
