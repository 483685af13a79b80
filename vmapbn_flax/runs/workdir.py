"""The workdir: the one place that knows the names of the files in it, what it is, and who holds it."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError, unwritable
from vmapbn_flax.files import make_directory, read_json, read_lines, write_json


class Workdir:
    """The directory of a run, of a sweep, of a sweep's member, or of refreshed statistics.

    Attributes:
      path: of the directory, which need not be there yet.
      writes: whether this process writes its files; of many processes only the first one does, and for the others
        what would write does nothing.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self.path, self.writes = path, writes

    def __str__(self) -> str:
        return str(self.path)

    # Of a run.

    @property
    def config(self) -> Path:
        """The whole config of a run or a sweep, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """The training and evaluation rows, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The figures of a finished run, as JSON."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints, one directory a step."""
        return self.path / "checkpoints"

    @property
    def picture(self) -> Path:
        """Accuracy and loss of a finished run, drawn."""
        return self.path / "accuracy.png"

    @property
    def profile(self) -> Path:
        """The directory of a trace of a few steps."""
        return self.path / "profile"

    @property
    def refreshed(self) -> "Workdir":
        """The workdir of the run's refreshed statistics."""
        return Workdir(self.path / "refreshed", writes=self.writes)

    @property
    def refresh(self) -> Path:
        """The figures before and after statistics were refreshed, as JSON; marks a workdir that holds such."""
        return self.path / "refresh.json"

    # Of a sweep.

    @property
    def ledger(self) -> Path:
        """The members and groups of a sweep, as JSON."""
        return self.path / "sweep.json"

    @property
    def sweep_picture(self) -> Path:
        """The validation accuracy of a sweep's members, drawn."""
        return self.path / "sweep.png"

    def member(self, name: str) -> "Workdir":
        """The workdir of a sweep's member."""
        return Workdir(self.path / name, writes=self.writes)

    def group_checkpoints(self, number: int) -> Path:
        """The directory of checkpoints of a group of members that train together."""
        return self.path / "groups" / str(number) / "checkpoints"

    @property
    def sweep(self) -> "Workdir":
        """The workdir that is the sweep's if this one is a member's."""
        return Workdir(self.path.absolute().parent, writes=self.writes)

    # What it is.

    @property
    def is_refreshed(self) -> bool:
        return self.refresh.exists()

    @property
    def is_sweep(self) -> bool:
        return self.ledger.exists()

    @property
    def is_run(self) -> bool:
        """Whether it has what a run leaves behind and a sweep does not."""
        return self.metrics.exists() or (self.config.exists() and not self.is_sweep)

    # What is in it.

    def read_config(self) -> dict[str, Any]:
        """The saved config.

        Raises:
          RunError: there is none, or it is damaged.
        """
        return read_json(self.config)

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics`, none if there is no such file.

        Raises:
          RunError: a line before the last is damaged.
        """
        return [row for _, row in read_lines(self.metrics)]

    def write(self, path: Path, content: Any) -> None:
        """Writes one of its files, as JSON, whole or not at all.

        Raises:
          RunError: it cannot be written.
        """
        if self.writes:
            make_directory(path.parent)
            write_json(path, content)

    # Who holds it.

    @property
    def holder(self) -> str:
        """Who has the lock, or had it last."""
        return self._lock_file.read_text(errors="replace") if self._lock_file.exists() else ""

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the workdir, made if need be, for this process; if it is killed the operating system lets go.

        Raises:
          RunError: another process holds it, or it cannot be written to.
        """
        make_directory(self.path)
        try:
            file = self._lock_file.open("a+", errors="replace")
        except OSError as error:
            raise unwritable(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunError(
                    f"{self}: got a workdir in use by {holder}; expected one that no other process writes. "
                    f"Wait for it or stop it, or choose another --workdir."
                ) from None
            except OSError as error:
                raise unwritable(self.path, error) from error
            yield
