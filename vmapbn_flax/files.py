"""The one place that writes files: whole or not at all, or by appending lines that can be cut back."""

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError, unwritable


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path` atomically: a reader sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      RunError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
        return content
    except OSError as error:
        raise RunError(f"{path}: got {error.strerror}; expected the workdir of a run, which has this file.") from None
    except (ValueError, RecursionError) as error:
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
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and line.endswith(b"\n")):
                raise ValueError("no object with an integer step")
            if not all(value is None or isinstance(value, int | float) for value in row.values()):
                raise ValueError("a value that is neither a number nor null")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunError(
                f"{path}, line {number}: got a damaged row ({error}); expected one JSON object a line. "
                f"Remove that line, or start afresh in another --workdir."
            ) from None
        rows.append((line, row))
    return rows
