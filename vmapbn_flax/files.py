"""The one place that writes files: whole or not at all, or by appending lines that can be cut back."""

import contextlib
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError, unwritable

_LONGEST_JSON = 2**26  # bytes
_DEEPEST_JSON = 30  # objects and lists inside one another
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path` atomically: a reader sees the old content or the new, never a part.

    Several processes may write the same file at the same time; the last one wins.

    Raises:
      RunError: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = _temporary(path)
    written = False
    try:
        while not written:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):  # another process took it for a killed writer's
                temporary.replace(path)
                written = True
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def require_writable(path: Path) -> None:
    """Checks that `write_whole` can write `path`, before the work whose result it is.

    Raises:
      RunError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary = _temporary(path)
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def _temporary(path: Path) -> Path:
    """The name of a file beside `path`, of this writer alone."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_unfinished(directory: Path) -> None:
    """Removes the temporary files of killed writers from `directory` and from the directories in it.

    A writer that is alive and loses its file so writes it again.
    """
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in directory.glob(pattern):
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()


def remove_directory(path: Path) -> None:
    """Removes a directory, or what a kill left of its removal: it is whole or gone, whenever a kill arrives."""
    removed = path.with_name(f"{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        shutil.rmtree(path.rename(removed), ignore_errors=True)


def in_threads(function: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Calls `function`, which waits for the disk, with each of `items`, eight at a time.

    A file system brings many files to the disk together, in the time of one. Returns when no call goes on.

    Raises:
      Exception: what the first call that failed raised; some of the others are then left out.
    """
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(function, items):
            pass


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, unless they exist.

    Raises:
      RunError: the directory cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_file(path: Path, most: float = _LONGEST_JSON) -> bytes:
    """The content of the file `path`, which comes from anywhere.

    Raises:
      OSError: the file cannot be read, is a pipe or a device, which might never end, or has more than `most` bytes.
    """
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "A pipe or a device", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return path.read_bytes()


def parse_json(content: bytes) -> dict[str, Any]:
    """The JSON object `content`, which comes from anywhere.

    Raises:
      ValueError: it is no JSON, no object, or nested too deep.
    """
    try:
        parsed = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(parsed, dict):
        raise ValueError(f"a {type(parsed).__name__}, not an object")
    require_shallow(parsed)
    return parsed


def require_shallow(parsed: Any) -> None:
    """Checks that code which follows the nesting of `parsed`, a value of JSON, will not fail.

    Raises:
      ValueError: it is nested too deep.
    """
    level, depth = [parsed], 0
    while level := [value for outer in level if isinstance(outer, dict | list) for value in _inner(outer)]:
        depth += 1
        if depth > _DEEPEST_JSON:
            raise ValueError(f"nested more than {_DEEPEST_JSON} deep")


def _inner(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      RunError: the file is missing or damaged.
    """
    try:
        return parse_json(read_file(path))
    except OSError as error:
        raise RunError(f"{path}: got {error.strerror}; expected the workdir of a run, which has this file.") from None
    except ValueError as error:
        raise RunError(
            f"{path}: got damaged JSON ({error}); expected what a run wrote there. Put it back from a copy, or "
            f"start afresh in another --workdir."
        ) from None


class AppendFile:
    """A file that is appended to at once, without a buffer or a thread that a crash could lose.

    It is open only while it is written to: a sweep has more of them than a process may hold open.
    """

    def __init__(self, path: Path):
        self._path = path

    def write(self, data: bytes) -> None:
        with self._opened() as file:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the error that writing the rest would raise

    def flush(self) -> None:
        """Returns when everything written is on the disk."""
        with self._opened() as file:
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        try:
            with self._path.open("ab", buffering=0) as file:
                yield file
        except OSError as error:
            raise unwritable(self._path, error) from error


class AppendLog(AppendFile):
    """JSON objects, one a line, in an append-only file that can be cut back to an earlier step."""

    def cut_back(self, keep: Callable[[dict], bool]) -> list[dict]:
        """Removes the rows for which `keep` is false, and a last line torn by a kill; returns the other rows.

        Raises:
          RunError: a line before the last is damaged.
        """
        lines = read_lines(self._path)
        kept = [(line, row) for line, row in lines if keep(row)]
        content = b"".join(line for line, _ in kept)
        if not self._path.exists() or content != self._path.read_bytes():
            write_whole(self._path, content)
        return [row for _, row in kept]

    def append(self, row: dict) -> None:
        self.write(json.dumps(row).encode() + b"\n")


def read_lines(path: Path) -> list[tuple[bytes, dict]]:
    """The lines of a log, each with its row, without a torn last line.

    Raises:
      RunError: a line before the last is damaged.
    """
    lines = read_file(path, math.inf).splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not (type(row.get("step")) is int and 0 <= row["step"] < 2**63 and line.endswith(b"\n")):
                raise ValueError("no object with an integer step")
            if not all(value is None or _is_number(value) for value in row.values()):
                raise ValueError("a value that is neither a finite number nor null")
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(
                f"{path}, line {number}: got a damaged row ({error}); expected one JSON object a line. "
                f"Remove that line, or start afresh in another --workdir."
            ) from None
        rows.append((line, row))
    return rows


def _is_number(value: Any) -> bool:
    """Whether `value` is one that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
