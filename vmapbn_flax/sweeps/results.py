"""The results of a sweep, read from its ledger and its members' rows, and ranked by validation accuracy."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import Member, read_members
from vmapbn_flax.sweeps.ledger import Ledger

SELECTION = "validation_accuracy"


class Result(NamedTuple):
    """A member, its status and its rows."""

    name: str
    values: dict[str, Any]  # of the swept fields
    status: str
    step: int
    rows: list[dict[str, Any]]  # of its metrics.jsonl, as far as its sweep trained it

    def figure(self, name: str) -> float | None:
        """`name` in the last evaluation; None if the member is not done."""
        if self.status != "done":
            return None
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)


class Setting(NamedTuple):
    """Members that differ only in the seed."""

    label: str
    values: dict[str, Any]  # of the swept fields but the seed
    members: list[Result]

    def figures(self, name: str) -> list[float]:
        """`figure` of each member that has one."""
        found = (member.figure(name) for member in self.members)
        return [figure for figure in found if figure is not None]

    def best(self) -> Result | None:
        """The member with the highest validation accuracy; None if no member is done."""
        found = [(figure, member) for member in self.members if (figure := member.figure(SELECTION)) is not None]
        return max(found, key=lambda pair: pair[0])[1] if found else None


def read_settings(workdir: Workdir) -> list[Setting]:
    """The settings of the sweep in `workdir`, the best mean validation accuracy first.

    Settings with a member that has none (it diverged, failed or is not done) come last. Test accuracy does not count.

    Raises:
      RunError: `workdir` has no sweep, or a damaged one.
    """
    if not workdir.is_sweep:
        raise RunError(
            f"{workdir}: got no {workdir.ledger.name}, expected the workdir of a sweep, such as runs/sweep_lr"
        )
    ledger = Ledger(workdir)
    results = [
        read_result(workdir, member, ledger) for member in read_members(workdir) if member.name in ledger.members
    ]
    return sorted(_by_setting(results), key=_rank)


def read_result(workdir: Workdir, member: Member, ledger: Ledger) -> Result:
    """What `member` of the sweep in `workdir` has reached.

    Raises:
      RunError: its rows are damaged.
    """
    entry, rows = ledger.members[member.name], workdir.member(member.name).read_rows()
    if ledger.is_over(member.name):  # the member may have been continued alone since
        rows = [row for row in rows if row["step"] <= entry["step"]]
    return Result(member.name, member.values, entry["status"], entry["step"], rows)


def _by_setting(results: Iterable[Result]) -> list[Setting]:
    settings: dict[str, Setting] = {}
    for result in results:
        values = {name: value for name, value in result.values.items() if name != "seed"}
        label = ", ".join(part for part in result.name.split(",") if not part.startswith("seed=")) or "all seeds"
        settings.setdefault(label, Setting(label, values, [])).members.append(result)
    return list(settings.values())


def _rank(setting: Setting) -> tuple[bool, float]:
    found = setting.figures(SELECTION)
    return len(found) < len(setting.members), -statistics.mean(found) if found else 0.0
