import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmapbn_flax.errors import RunError
from vmapbn_flax.files import (
    AppendLog,
    in_threads,
    read_json,
    read_lines,
    remove_directory,
    remove_unfinished,
    write_json,
    write_whole,
)

DEEP = "[" * 100_000  # exhausts the stack of a parser that recurses


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Whole files.


def test_written_whole(tmp_path):
    path = tmp_path / "file"
    for content in ("first", b"\x00\xff", ""):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_whole(path, "before")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(RunError, match=r"file: got No space left on device; expected room"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_wait_for_the_disk_together():
    """One after another, eight of them would wait here for ever."""
    together = threading.Barrier(8, timeout=60)
    in_threads(lambda number: together.wait(), range(16))


def test_one_of_many_writes_fails():
    def write(number):
        if number == 3:
            raise RunError("the third")

    with pytest.raises(RunError, match="the third"):
        in_threads(write, range(20))


# Each of its writes is of another length, and says in every place who wrote it.
WRITER = """
import sys
from pathlib import Path
from vmapbn_flax.files import read_json, write_json

path, number = Path(sys.argv[1]), int(sys.argv[2])
problems = []
for length in range(1000, 41_000, 400):
    try:
        write_json(path, {"writer": number, "values": [number] * length})
        found = read_json(path)
        if set(found["values"]) != {found["writer"]}:
            problems.append("torn")
    except Exception as error:
        problems.append(repr(error))
print(len(problems), "problems of 100:", problems[:1])
"""


def test_many_writers_of_one_file(tmp_path):
    """Real processes; and one that takes their temporary files for those of killed writers."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    writers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in (1, 2, 3)]
    while any(writer.poll() is None for writer in writers):
        remove_unfinished(tmp_path)
        time.sleep(0.01)  # or a writer would hardly come to an end
    assert [writer.communicate()[0] for writer in writers] == ["0 problems of 100: []\n"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_killed_writers_left_is_removed(tmp_path, monkeypatch):
    (tmp_path / "member").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(os, "unlink", full)  # as if killed
        for directory in (tmp_path, tmp_path / "member"):
            with pytest.raises(RunError):
                write_whole(directory / "file", "")
    (tmp_path / ".mine.tmp").touch()
    assert len(list(tmp_path.rglob(".file.*"))) == 2
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"member", ".mine.tmp"}


def test_a_directory_is_whole_or_gone(tmp_path, monkeypatch):
    path = tmp_path / "directory"

    def killed(path, **more):
        if path.exists():
            raise KeyboardInterrupt

    path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_directory(path)
    assert not path.exists()
    path.mkdir()
    remove_directory(path)
    assert list(tmp_path.iterdir()) == []  # what the kill left, too


def test_json_comes_back(tmp_path):
    content = {"number": 0.1 + 0.2, "text": "naïve", "list": [1, None]}
    write_json(tmp_path / "file", content)
    assert read_json(tmp_path / "file") == content


@pytest.mark.parametrize(
    "content", ["", '{"seed": 1', "[1]", "3", "null", "NaN", DEEP, b"\xff\xfe{}", b"\x80\x04K\x01."], ids=repr
)
def test_damaged_json(tmp_path, content):
    path = tmp_path / "file"
    write_whole(path, content)
    with pytest.raises(RunError, match=r"file: got damaged JSON .*Put it back"):
        read_json(path)


def test_unreadable_json(tmp_path):
    with pytest.raises(RunError, match="got No such file or directory; expected"):
        read_json(tmp_path / "missing")
    with pytest.raises(RunError, match="got Is a directory; expected"):
        read_json(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="got Not a directory; expected"):
        read_json(tmp_path / "file" / "below")


# Logs.


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


def rows(*steps):
    return [{"step": step, "loss": step / 3} for step in steps]


def write_log(path, *steps):
    log = AppendLog(path)
    log.cut_back(lambda row: True)
    for row in rows(*steps):
        log.append(row)
    log.flush()


def test_a_log_is_cut_back_and_goes_on(path):
    write_log(path, 1, 2, 2, 3)
    log = AppendLog(path)
    assert log.cut_back(lambda row: row["step"] <= 2) == rows(1, 2, 2)
    log.append(rows(7)[0])
    assert [row for _, row in read_lines(path)] == rows(1, 2, 2, 7)


def test_rows_are_bytes_on_the_disk_at_once(path):
    log = AppendLog(path)
    log.append({"step": 1, "loss": 0.1})
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n'


def test_a_log_holds_no_file_open(path):
    """A sweep has more logs than a process may have open files."""
    log, numbers = AppendLog(path), Path("/proc/self/fd")
    before = len(list(numbers.iterdir()))
    log.append({"step": 1})
    log.flush()
    assert len(list(numbers.iterdir())) == before


def test_a_log_that_is_whole_is_not_written(path):
    write_log(path, 1, 2)
    before = path.stat()
    AppendLog(path).cut_back(lambda row: True)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("length", range(1, 30, 4))
def test_a_torn_last_row_is_dropped(path, length):
    write_log(path, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"step": 3, "loss": 0.25}).encode()[:length])
    assert AppendLog(path).cut_back(lambda row: True) == rows(1, 2)
    assert path.read_bytes() == whole


DAMAGED_ROWS = ["{", "[]", "3", "{}", '{"step": null}', '{"step": "3"}', '{"step": 3, "loss": "low"}']
DAMAGED_ROWS += ['{"step": 3, "loss": [1]}', "\0\0\0\0", DEEP, ""]


@pytest.mark.parametrize("damaged", DAMAGED_ROWS, ids=lambda text: text[:30])
def test_a_damaged_row_before_the_last_is_named(path, damaged):
    write_log(path, 1)
    content = path.read_bytes() + damaged.encode() + b"\n"
    path.write_bytes(content + json.dumps(rows(4)[0]).encode() + b"\n")
    with pytest.raises(RunError, match="log, line 2: got a damaged row"):
        AppendLog(path).cut_back(lambda row: True)
    assert path.read_bytes().startswith(content)


def test_a_full_disk_is_an_error_at_once(path, monkeypatch):
    class Full(io.FileIO):  # takes one byte: the operating system's way to say that the next finds no room
        def write(self, line):
            return 1

    monkeypatch.setattr(Path, "open", lambda path, *mode, **options: Full(path, "a"))
    with pytest.raises(RunError, match="log: got No space left on device"):
        AppendLog(path).append({"step": 1})
