"""One process a workdir."""

import os
import signal
import socket
import subprocess
import sys

from tests.helpers.program import ROOT
from tests.helpers.runs import outcome


def test_a_second_process_is_refused(run, undisturbed):
    run.start(name="vmapbn_flax.runs.checkpoints:Checkpoints.save", call=3, seconds=60)
    run.wait_for("waiting")
    (pid,) = {int(word) for word in (run.workdir / ".lock").read_text().split() if word.isdecimal()}
    files = {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*")}
    argv = [sys.executable, "-m", "vmapbn_flax", "train", "--config=configs/tiny.py", f"--workdir={run.workdir}"]
    second = subprocess.run(
        argv, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"error: {run.workdir}: got a workdir in use by process {pid} on {socket.gethostname()};")
    assert {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*")} == files
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    # What the dead process wrote into the lock stays there; the lock itself does not.
    assert str(pid) in (run.workdir / ".lock").read_text()
    assert run.finish() == 0
    assert outcome(run.workdir) == outcome(undisturbed.workdir)
