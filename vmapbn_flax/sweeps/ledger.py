"""The ledger of a sweep: its members, its groups, and the status of each member."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_json
from vmapbn_flax.runs.workdir import Workdir

STATUSES = ("pending", "running", "done", "diverged", "failed", "stopped")
_OVER = ("done", "diverged", "stopped")  # for good; a failed member is tried again


class Ledger:
    """The members and groups of a sweep, saved in its workdir.

    Group membership is fixed before training: a member's bits are reproducible only in the same group.

    Attributes:
      members: status, step and reason of each, by name.
      groups: the names of the members of each group.
      proposals: in the mode "optuna", the values of the members of each batch, by the names of the fields, in the order
        in which they were proposed.

    Raises:
      RunError: the file is damaged.
    """

    def __init__(self, workdir: Workdir):
        self._workdir = workdir
        self.members: dict[str, dict[str, Any]] = {}
        self.groups: list[list[str]] = []
        self.proposals: list[list[dict[str, Any]]] = []
        if workdir.is_sweep:
            self.update(read_json(workdir.ledger))

    def update(self, content: Any) -> None:
        """Replaces members and groups with those of `content`, another ledger's.

        Raises:
          RunError: `content` is not a ledger's.
        """
        try:
            self.members, self.groups = dict(content["members"]), [list(names) for names in content["groups"]]
            self.proposals = [list(map(dict, batch)) for batch in content.get("proposals", ())]
            for name, entry in self.members.items():
                if Path(name).name != name or name == "..":
                    raise ValueError(f"the member {name!r}, which is no name of a directory")
                if (
                    entry["status"] not in STATUSES
                    or type(entry["step"]) is not int
                    or type(entry["reason"]) is not str
                ):
                    raise ValueError(f"a member with {entry}")
            if sorted(name for names in self.groups for name in names) != sorted(self.members):
                raise ValueError("groups that do not have its members")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self._workdir.ledger}: got no ledger of a sweep ({error!r}), expected what the sweep wrote there. "
                f"Put it back from a copy, or start afresh in another --workdir."
            ) from None

    @property
    def content(self) -> dict[str, Any]:
        """The whole ledger, as JSON."""
        proposals = {"proposals": self.proposals} if self.proposals else {}
        return {"members": self.members, "groups": self.groups, **proposals}

    @property
    def proposed(self) -> list[dict[str, Any]]:
        """The `proposals` of all batches."""
        return [values for batch in self.proposals for values in batch]

    def add(self, groups: Iterable[Sequence[str]], batch: Sequence[dict[str, Any]] = ()) -> None:
        """Adds groups of new members, and the values of those that were proposed, and writes the ledger."""
        if batch:
            self.proposals.append(list(batch))
        for names in groups:
            self.groups.append(list(names))
            self.members |= {name: {"status": "pending", "step": 0, "reason": ""} for name in names}
        self.write()

    def mark(
        self, names: Iterable[str], status: str, step: int | None = None, reason: str = "", *, write: bool = True
    ) -> None:
        """Sets the status of those of `names` that are not over, and writes the ledger, unless `write` is False."""
        for name in names:
            if not self.is_over(name):
                entry = self.members[name]
                self.members[name] = {
                    "status": status,
                    "step": entry["step"] if step is None else step,
                    "reason": reason,
                }
        if write:
            self.write()

    def write(self) -> None:
        self._workdir.write(self._workdir.ledger, self.content)

    def is_over(self, name: str) -> bool:
        return self.members[name]["status"] in _OVER

    def count(self, status: str) -> int:
        return sum(entry["status"] == status for entry in self.members.values())


def refuse_unfinished_member(workdir: Workdir) -> None:
    """Refuses to train a member alone while its sweep is not done with it.

    A member is its sweep's until the checkpoints of its group are gone, which is after it has one of its own.

    Raises:
      RunError: `workdir` is that of such a member.
    """
    sweep, name = workdir.sweep, workdir.path.absolute().name
    if sweep.is_sweep:
        ledger = Ledger(sweep)
        groups = [number for number, names in enumerate(ledger.groups) if name in names]
        if any(not ledger.is_over(name) or sweep.group_checkpoints(number).exists() for number in groups):
            raise RunError(
                f"{workdir}: got a member that its sweep is not done with ({ledger.members[name]['status']}); expected "
                f"one that is. Continue the sweep: python train.py --config=configs/saved.py:{workdir.path.parent}"
            )
