"""The ledger of a sweep: who its members are, who trains with whom, and what became of each."""

from collections.abc import Iterable, Sequence
from typing import Any

from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_json
from vmapbn_flax.runs.workdir import Workdir

STATUSES = ("pending", "running", "done", "diverged", "failed")
_OVER = ("done", "diverged")  # for good: what has failed is tried again


class Ledger:
    """What is fixed before training, so that group membership, and with it a member's bits, never change.

    Attributes:
      members: by name, the status, the step and, where there is one, the reason.
      groups: the names of the members of each group.

    Raises:
      RunError: the file is damaged.
    """

    def __init__(self, workdir: Workdir):
        self._workdir = workdir
        self.members: dict[str, dict[str, Any]] = {}
        self.groups: list[list[str]] = []
        if workdir.is_sweep:
            self.update(read_json(workdir.ledger))

    def update(self, content: Any) -> None:
        """Takes over what another ledger's `content` is.

        Raises:
          RunError: it is not that.
        """
        try:
            self.members, self.groups = dict(content["members"]), [list(names) for names in content["groups"]]
            if any(entry["status"] not in STATUSES for entry in self.members.values()):
                raise ValueError("a status that there is not")
            if sorted(name for names in self.groups for name in names) != sorted(self.members):
                raise ValueError("groups of other members")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self._workdir.ledger}: got no ledger of a sweep ({error!r}), expected what the sweep wrote there. "
                f"Put it back from a copy, or start afresh in another --workdir."
            ) from None

    @property
    def content(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"members": self.members, "groups": self.groups}

    def add(self, groups: Iterable[Sequence[str]]) -> None:
        """Adds groups of new members, and writes."""
        for names in groups:
            self.groups.append(list(names))
            self.members |= {name: {"status": "pending", "step": 0, "reason": ""} for name in names}
        self.write()

    def mark(self, names: Iterable[str], status: str, step: int | None = None, reason: str = "") -> None:
        """Notes what became of members that are not over, and writes."""
        for name in names:
            if not self.is_over(name):
                entry = self.members[name]
                self.members[name] = {
                    "status": status,
                    "step": entry["step"] if step is None else step,
                    "reason": reason,
                }
        self.write()

    def write(self) -> None:
        self._workdir.write(self._workdir.ledger, self.content)

    def is_over(self, name: str) -> bool:
        return self.members[name]["status"] in _OVER

    def count(self, status: str) -> int:
        return sum(entry["status"] == status for entry in self.members.values())


def refuse_unfinished_member(workdir: Workdir) -> None:
    """Refuses to train a sweep's member alone before its sweep is done with it.

    Raises:
      RunError: `workdir` is that of such a member.
    """
    sweep, name = workdir.sweep, workdir.path.absolute().name
    if sweep.is_sweep:
        ledger = Ledger(sweep)
        if name in ledger.members and not ledger.is_over(name):
            raise RunError(
                f"{workdir}: got a member that its sweep is not done with ({ledger.members[name]['status']}); expected "
                f"one that is. Continue the sweep: python train.py --config=configs/saved.py:{workdir.path.parent}"
            )
