"""The ledger of a sweep: its members, its groups, and the status of each member."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_json
from vmapbn_flax.runs.workdir import Workdir

STATUSES = ("pending", "running", "waiting", "done", "diverged", "stopped", "failed")
_OVER = ("done", "diverged", "stopped")  # for good; a failed member is tried again


class Ledger:
    """The members and groups of a sweep, saved in its workdir.

    Group membership is fixed before training: a member's bits are reproducible only in the same group. A member's first
    group trains it to the first rung, or to the end in a sweep without rungs, its second group to the next one.

    Attributes:
      members: status, step and reason of each, by name; of one that a rung stopped, `rung`, from 0, and `rank`, from 1.
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
        self._numbers: dict[str, list[int]] = {}  # of the groups of each member
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
                    or (entry["status"] == "stopped" and not type(entry["rung"]) is type(entry["rank"]) is int)
                ):
                    raise ValueError(f"a member with {entry}")
            self._numbers = {name: [] for name in self.members}
            for number, names in enumerate(self.groups):
                self._enter(number, names)
            if self._numbers.keys() != self.members.keys() or not all(self._numbers.values()):
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
            self.members |= {name: {"status": "pending", "step": 0, "reason": ""} for name in names}
            self._append(names)
        self.write()

    def _append(self, names: Sequence[str]) -> None:
        self.groups.append(list(names))
        self._enter(len(self.groups) - 1, names)

    def _enter(self, number: int, names: Sequence[str]) -> None:
        """Notes that the group `number` is the next of each of its members."""
        for name in names:
            self._numbers.setdefault(name, []).append(number)
        if len({len(self._numbers[name]) for name in names}) != 1 or len({*names}) < len(names):
            raise ValueError(f"a group of {names}, which are not at one rung")

    def mark(
        self, names: Iterable[str], status: str, step: int | None = None, reason: str = "", *, write: bool = True
    ) -> None:
        """Sets the status of those of `names` that are neither over nor waiting; writes the ledger if `write`."""
        for name in names:
            if not (self.is_over(name) or self.is_waiting(name)):
                entry = self.members[name]
                self.members[name] = {
                    "status": status,
                    "step": entry["step"] if step is None else step,
                    "reason": reason,
                }
        if write:
            self.write()

    def rank(self, names: Sequence[str], kept: int, reached: str, groups: Iterable[Sequence[str]]) -> None:
        """Ends a rung, in one write of the ledger.

        Args:
          names: of the members that wait there, the best first.
          kept: how many of them train on; the others are stopped.
          reached: what they have reached, in words.
          groups: of those that train on.
        """
        rung = self.rung(names[0])
        go = "goes" if kept == 1 else "go"
        for rank, name in enumerate(names, start=1):
            self.members[name]["status"] = "pending"
            if rank > kept:
                reason = f"{reached}: rank {rank} of {len(names)}, of which {kept} {go} on"
                self.members[name] |= {"status": "stopped", "reason": reason, "rung": rung, "rank": rank}
        for group in groups:
            self._append(group)
        self.write()

    def write(self) -> None:
        self._workdir.write(self._workdir.ledger, self.content)

    def is_over(self, name: str) -> bool:
        return self.members[name]["status"] in _OVER

    def is_waiting(self, name: str) -> bool:
        """Whether the member is at a rung, with checkpoints of its own, and not ranked there yet."""
        return self.members[name]["status"] == "waiting"

    def rung(self, name: str) -> int:
        """The rung, from 0, that the member's last group trains to; after the last rung comes the end."""
        return len(self._numbers[name]) - 1

    def is_trained(self, number: int) -> bool:
        """Whether the group `number` has brought each of its members to the end, to divergence or to its rung."""
        return all(
            self.is_over(name) or self.is_waiting(name) or self._numbers[name][-1] != number
            for name in self.groups[number]
        )

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
