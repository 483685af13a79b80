"""The progress of a sweep on the terminal."""

from collections.abc import Mapping, Sequence

from vmapbn_flax.runs.console import Progress, say
from vmapbn_flax.sweeps.ledger import Ledger


class SweepProgress(Progress):
    """A bar of the steps of all members on a terminal; elsewhere a line for each evaluation of a group."""

    def __init__(self, ledger: Ledger, *, shown: bool = True):
        super().__init__(0, 0, shown=shown)
        self._ledger = ledger
        self._best: tuple[float, str] | None = None
        self._number = 0
        self._names: Sequence[str] = ()

    def start(self, number: int, names: Sequence[str], total_steps: int) -> None:
        """Shows that the group `number`, whose members take `total_steps` each, is next."""
        self._number, self._names, self._total_steps = number, names, total_steps
        # The steps of later groups are not known yet; in most sweeps all members that are not over take equally many.
        members = self._ledger.members.items()
        self._bar.total = sum(entry["step"] if self._ledger.is_over(name) else total_steps for name, entry in members)
        self._bar.n = sum(entry["step"] for _, entry in members)
        self._show()

    def advance(self, count: int) -> None:
        super().advance(count * len(self._names))

    def evaluated(self, step: int, results: Sequence[Mapping[str, float]]) -> None:
        figures = zip(self._names, results, strict=True)
        found = [(result["validation_accuracy"], name) for name, result in figures if result]
        self._best = max([*found, *([self._best] if self._best else [])], default=None)
        if self._interactive:
            self._show()
        elif self._shown:
            say(f"group {self._number}, step {step} of {self._total_steps}: {self._state()}")

    def _show(self) -> None:
        self._bar.set_postfix_str(self._state())

    def _state(self) -> str:
        counts = ", ".join(f"{self._ledger.count(status)} {status}" for status in ("done", "stopped", "diverged"))
        best = f", best validation_accuracy {self._best[0]:.4f} of {self._best[1]}" if self._best else ""
        return f"{counts} of {len(self._ledger.members)}{best}"
