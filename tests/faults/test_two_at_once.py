"""One process a workdir."""

import signal
import socket

from tests.helpers import small
from tests.helpers.runs import CONFIG, command, outcome
from vmapbn_flax.runs import train


def test_a_second_process_is_refused(run, undisturbed, capsys, monkeypatch):
    run.start(name="vmapbn_flax.runs.checkpoints:Checkpoints.save", call=3, seconds=60)
    run.wait_for("waiting")
    (pid,) = {int(word) for word in (run.workdir / ".lock").read_text().split() if word.isdecimal()}
    files = {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*")}
    monkeypatch.setattr(train, "load_dataset", small.load)
    status, (line,) = command(capsys, "train", CONFIG, f"--workdir={run.workdir}")  # of the process of this test
    assert status == 1
    assert line.startswith(f"error: {run.workdir}: got a workdir in use by process {pid} on {socket.gethostname()};")
    assert {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*")} == files
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    # What the dead process wrote into the lock stays there; the lock itself does not.
    assert str(pid) in (run.workdir / ".lock").read_text()
    assert run.finish() == 0
    assert outcome(run.workdir) == undisturbed.outcome
