"""Output on the terminal: lines, progress, tables."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from io import StringIO, TextIOWrapper
from typing import IO

from tqdm import tqdm

_WIDEST = 100_000  # characters of a line in a pipe

TextFile = IO[str] | StringIO | TextIOWrapper  # beartype takes only what has a `mode` for an IO


def say(message: str) -> None:
    """Prints a line to standard error, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


class Progress(contextlib.AbstractContextManager):
    """A bar of steps on a terminal; elsewhere a line for each evaluation."""

    def __init__(self, step: int, total_steps: int, *, shown: bool = True):
        self._shown = shown
        self._interactive = shown and sys.stderr.isatty()
        # `initial` leaves the steps before a resume out of the rate, and so out of the ETA.
        self._bar = tqdm(
            initial=step, total=total_steps, unit="step", disable=not self._interactive, dynamic_ncols=True
        )
        self._total_steps = total_steps

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def evaluated(self, step: int, results: Sequence[Mapping[str, float]]) -> None:
        """Shows the figures of a run's evaluation at `step`."""
        (figures,) = results
        shown = {name: f"{value:.4f}" for name, value in figures.items() if not name.endswith("count")}
        if self._interactive:
            self._bar.set_postfix(shown)
        elif self._shown:
            say(f"step {step} of {self._total_steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), *, file: TextFile | None = None) -> None:
    """Prints rows of cells in columns, to standard error unless `file` says otherwise."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    titles = list(header) or [""] * max(map(len, rows), default=0)
    # On a narrow terminal a name is folded, and never cut off.
    columns = [Column(_shown(title), overflow="fold") for title in titles]
    grid = Table(*columns, box=box.SIMPLE, show_header=bool(header))
    for row in rows:
        grid.add_row(*map(_shown, row))
    file = file or sys.stderr
    # A pipe has no width: never fold a path or a figure there.
    Console(file=file, width=None if file.isatty() else _WIDEST).print(grid)


def _shown(cell: object) -> str:
    """A cell as it is, where rich would read markup and a terminal commands in a name."""
    from rich.markup import escape

    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return escape("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))
