"""What becomes of a run whose files are damaged while it is stopped."""

import os
import random
import shutil

import pytest

from tests.helpers.runs import leftovers, outcome
from vmapbn_flax.runs.checkpoints import saved_steps


@pytest.fixture
def stopped(run, killed):
    """The checkpoints of a run to go on with, of which those of 21 and 24 are the newest."""
    shutil.copytree(killed, run.workdir)
    return run.workdir / "checkpoints"


def flip_bits(path):
    """In every file, at a random place."""
    rng = random.Random(7)
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.stat().st_size:
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)


def halve_files(path):
    for file in path.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_bits, halve_files])
def test_the_newest_checkpoint(run, undisturbed, stopped, damage):
    damage(stopped / "24")
    assert run.finish() == 0, run.lines()
    first, second = run.lines()[:2]
    assert first.startswith(f"warning: {stopped}/24: got a damaged checkpoint (")
    assert first.endswith(f"It is kept as {stopped}/damaged/24.")
    assert "resuming at step 21 of 30" in second
    assert not any("Traceback" in line for line in run.lines())
    assert outcome(run.workdir) == undisturbed.outcome
    assert [path.name for path in (stopped / "damaged").iterdir()] == ["24"]
    assert leftovers(run.workdir) == []


def test_strays(run, undisturbed, stopped):
    for name in ("99", "25", "007", "notes"):
        (stopped / name).mkdir()
    (stopped / "readme.txt").write_text("mine")
    (stopped / "26").write_text("a file")
    assert run.finish() == 0, run.lines()
    warned = [line.split()[1] for line in run.lines() if line.startswith("warning:")]
    assert warned == [f"{stopped}/{step}:" for step in (99, 26, 25)]
    assert "resuming at step 24 of 30" in run.lines()[3]
    assert outcome(run.workdir) == undisturbed.outcome
    assert (stopped / "readme.txt").read_text() == "mine"


def test_none_good(run, stopped):
    for step in saved_steps(stopped):
        halve_files(stopped / str(step))
    before = {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*") if path.name != ".lock"}
    assert run.finish() == 1
    (line,) = run.lines()
    assert line.startswith(f"error: {stopped}: got no checkpoint that is whole, the newest because of: {stopped}/24:")
    after = {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*") if path.name != ".lock"}
    assert after == before
