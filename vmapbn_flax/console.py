"""What a run says on the terminal: a line at the start, progress, a table at the end."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from io import TextIOBase

import jax
from tqdm import tqdm

from vmapbn_flax.ledger import Ledger


def say(message: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


class Progress(contextlib.AbstractContextManager):
    """A bar of steps on a terminal; elsewhere a line for each evaluation."""

    def __init__(self, step: int, total_steps: int):
        self._interactive = sys.stderr.isatty()
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
        else:
            say(f"step {step} of {self._total_steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))


class SweepProgress(Progress):
    """A bar of the steps of all members on a terminal; elsewhere a line for each evaluation of a group."""

    def __init__(self, ledger: Ledger):
        super().__init__(0, 0)
        self._ledger = ledger
        self._best: tuple[float, str] | None = None
        self._number, self._names = 0, []

    def start(self, number: int, names: Sequence[str], total_steps: int) -> None:
        """The group `number`, of members that take `total_steps` each, is next."""
        self._number, self._names, self._total_steps = number, names, total_steps
        # Of the others nothing is known until they start; most sweeps have as many steps throughout.
        self._bar.total = total_steps * len(self._ledger.members)
        self._bar.n = sum(entry["step"] for entry in self._ledger.members.values())
        self._show()

    def advance(self, count: int) -> None:
        super().advance(count * len(self._names))

    def evaluated(self, step: int, results: Sequence[Mapping[str, float]]) -> None:
        figures = zip(self._names, results, strict=True)
        found = [(result["validation_accuracy"], name) for name, result in figures if result]
        self._best = max([*found, *([self._best] if self._best else [])], default=None)
        if self._interactive:
            self._show()
        else:
            say(f"group {self._number}, step {step} of {self._total_steps}: {self._state()}")

    def _show(self) -> None:
        self._bar.set_postfix_str(self._state())

    def _state(self) -> str:
        counts = ", ".join(f"{self._ledger.count(status)} {status}" for status in ("done", "diverged"))
        best = f", best validation_accuracy {self._best[0]:.4f} of {self._best[1]}" if self._best else ""
        return f"{counts} of {len(self._ledger.members)}{best}"


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), *, file: TextIOBase | None = None) -> None:
    """Prints rows of cells in columns, to standard error unless `file` says otherwise."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header, box=box.SIMPLE, show_header=bool(header))
    for row in rows:
        grid.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    # A pipe has no width: never fold a path or a figure there.
    Console(file=file or sys.stderr, width=None if sys.stderr.isatty() else 200).print(grid)


def device_name(devices: Sequence[jax.Device]) -> str:
    """The devices, as `cpu` or `2 x NVIDIA H100`."""
    return devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"
