"""The workdir: the names of its files, its kind, and its lock. No other module names a file in it."""

import contextlib
import fcntl
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError, unwritable
from vmapbn_flax.files import make_directory, read_file, read_json, read_lines, remove_unfinished, write_json


class Workdir:
    """The directory of a run, of a sweep, of a sweep's member, or of refreshed statistics.

    Attributes:
      path: of the directory, which may not exist yet.
      writes: whether this process writes the files. Of many processes only the first does; in the others `write` does
        nothing.
      config: the whole config of a run or a sweep, JSON.
      metrics: a run's training and evaluation rows, a JSON object a line.
      summary: the figures of a finished run, JSON.
      checkpoints: a run's checkpoints, one directory a step.
      picture: accuracy and loss of a finished run, drawn.
      profile: the directory of a trace of a few steps.
      refresh: the figures before and after a refresh, JSON; marks a workdir of refreshed statistics.
      ledger: the members and groups of a sweep, JSON; marks the workdir of a sweep.
      proposals: a copy of what a sweep proposed and reached, for Optuna's dashboard; an SQLite database.
      sweep_picture: the validation accuracy of a sweep's members, drawn.
      figure: a sweep with and without batch norm, drawn as in figure 1 of Ioffe & Szegedy (2015).
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self.path, self.writes = path, writes
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.picture = path / "accuracy.png"
        self.profile = path / "profile"
        self.refresh = path / "refresh.json"
        self.ledger = path / "sweep.json"
        self.proposals = path / "optuna.db"
        self.sweep_picture = path / "sweep.png"
        self.figure = path / "figure.png"
        self._lock_file = path / ".lock"

    def __str__(self) -> str:
        return str(self.path)

    # Workdirs beside it.

    @property
    def refreshed(self) -> "Workdir":
        """The workdir of the run's refreshed statistics."""
        return Workdir(self.path / "refreshed", writes=self.writes)

    @property
    def sweep(self) -> "Workdir":
        """The workdir of the sweep, if this one is a member's."""
        return Workdir(self.path.absolute().parent, writes=self.writes)

    def member(self, name: str) -> "Workdir":
        """The workdir of a sweep's member."""
        return Workdir(self.path / name, writes=self.writes)

    def group_checkpoints(self, number: int) -> Path:
        """The directory of checkpoints of a group, whose members train together."""
        return self.path / "groups" / str(number) / "checkpoints"

    # Its kind.

    @property
    def is_refreshed(self) -> bool:
        return self.refresh.exists()

    @property
    def is_sweep(self) -> bool:
        return self.ledger.exists()

    @property
    def is_run(self) -> bool:
        """Whether it has files of a run that a sweep does not have."""
        alone = self.config.exists() and not self.is_sweep  # or a sweep's, whose ledger is lost or not yet written
        return self.metrics.exists() or (alone and not self.read_config().get("sweep"))

    def refuse_sweep(self) -> None:
        """Raises a RunError if this is the workdir of a sweep."""
        if self.is_sweep:
            members = sorted(path.parent for path in self.path.glob(f"*/{self.config.name}"))
            best = max(members, key=_best_metric, default=None)
            named = f", such as {best}, the best so far" if best else ""
            raise RunError(
                f"{self}: got the workdir of a sweep, expected that of a run. Choose one of its {len(members)} "
                f"members{named}. `vmapbn-flax report {self}` ranks them."
            )

    # Its content.

    def read_config(self) -> dict[str, Any]:
        """The saved config.

        Raises:
          RunError: the config is missing or damaged.
        """
        return read_json(self.config)

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics`; none if the file does not exist.

        Raises:
          RunError: a line before the last is damaged.
        """
        return [row for _, row in read_lines(self.metrics)]

    def write(self, path: Path, content: Any) -> None:
        """Writes `path`, a file of the workdir, as JSON, whole or not at all.

        Raises:
          RunError: the file cannot be written.
        """
        if self.writes:
            make_directory(path.parent)
            write_json(path, content)

    # Its lock.

    @property
    def holder(self) -> str:
        """The process that has the lock, or had it last, in words."""
        return read_file(self._lock_file).decode(errors="replace") if self._lock_file.exists() else ""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the workdir, made if it does not exist, for this process; removes what killed writers left in it.

        The operating system frees the lock of a killed process.

        Raises:
          RunError: another process has the lock, or the workdir cannot be written to.
        """
        make_directory(self.path)
        if link := next(_links(self.path), None):
            raise RunError(
                f"{link}: got a link in a workdir; expected files of its own, for what is behind a link would be "
                f"written to. Put in its place what it leads to, or choose another --workdir."
            )
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
            remove_unfinished(self.path)
            yield


def _best_metric(member: Path) -> float:
    """That of a member's summary; below all others if there is none."""
    with contextlib.suppress(RunError):
        metric = read_json(Workdir(member).summary).get("best_metric")
        return metric if isinstance(metric, int | float) else -math.inf
    return -math.inf


def _links(directory: Path, depth: int = 2) -> Iterator[str]:
    """The symbolic links in `directory`, and so deep below it as a run of a sweep writes."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            elif depth and entry.is_dir():
                yield from _links(Path(entry.path), depth - 1)
