"""The results of a sweep, read from its ledger and its members' rows, and ranked by validation accuracy."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.selection import best_row
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import Member, read_members
from vmapbn_flax.sweeps.ledger import Ledger

SELECTION = "validation_accuracy"
_FIGURES = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")


class Result(NamedTuple):
    """A member, its status and its evaluations."""

    name: str
    workdir: Workdir
    values: dict[str, Any]  # of the swept fields
    status: str
    step: int
    rung: int | None  # that stopped it
    rank: int | None  # at that rung, from 1
    rows: list[dict[str, Any]]  # of its evaluations, as far as its sweep trained it

    @property
    def reached(self) -> float:
        """How long the member trained: infinity for one that is done, else the rung that stopped it, else -1."""
        if self.status == "done":
            return math.inf
        return -1.0 if self.rung is None else float(self.rung)

    def figure(self, name: str) -> float | None:
        """`name` in the last evaluation; None if the member is neither done nor stopped by a rung."""
        return _last(self.rows, name) if self.reached >= 0 else None

    @property
    def order(self) -> tuple[float, float]:
        """What ranks members, the best highest: those that trained longer first, then by validation accuracy."""
        return self.reached, self.figure(SELECTION) or 0.0


class Setting(NamedTuple):
    """Members that differ only in the seed."""

    label: str
    values: dict[str, Any]  # of the swept fields but the seed
    members: list[Result]

    @property
    def furthest(self) -> list[Result]:
        """The members that trained longest; none if no member is done or was stopped by a rung."""
        most = max(member.reached for member in self.members)
        return [member for member in self.members if member.reached == most >= 0]

    def figures(self, name: str) -> list[float]:
        """`figure` of each of the `furthest` members that has one."""
        found = (member.figure(name) for member in self.furthest)
        return [figure for figure in found if figure is not None]

    def best(self) -> Result | None:
        """The member with the highest validation accuracy; None if no member is done."""
        best = max(self.members, key=lambda member: member.order)
        return best if best.status == "done" and best.figure(SELECTION) is not None else None


def read_settings(workdir: Workdir) -> list[Setting]:
    """The settings of the sweep in `workdir`, the best first.

    They are ranked by how far the `furthest` members came, then by how many of the members came so far, then by the
    mean of their validation accuracies. Settings with a member that has none (it diverged, failed or still trains) come
    last. Test accuracy does not count.

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


def load_sweep(workdir: str | Path) -> list[dict[str, Any]]:
    """The members of the sweep in `workdir`, which may still be running, as records for pandas or plain Python.

    The first record is that of the best member, the one that `report` names: settings come in the order of the report,
    and the members of a setting, which differ only in the seed, by validation accuracy.

    Returns:
      A dictionary for each member, all with the same keys. None stands for what there is not.

      - `name`, and the value of each swept field by its dotted name, such as `optimizer.learning_rate`.
      - `status`, as in the ledger: "done", "stopped" by a rung, "diverged", ...; `step`, the last one.
      - `rung`, which stopped the member, from 0, and its `rank` there, from 1.
      - `validation_accuracy`, `validation_loss`, `test_accuracy`, `test_loss`: of the last evaluation.
      - `best_step`, `best_validation_accuracy` and so on: of the evaluation with the best validation accuracy, whose
        checkpoint `load_run` takes.
      - `workdir`: of the member, for `load_run`.

    Raises:
      RunError: `workdir` has no sweep, or a damaged one.
    """
    settings = read_settings(Workdir(Path(workdir)))
    return [
        _record(member)
        for setting in settings
        for member in sorted(setting.members, key=lambda member: member.order, reverse=True)
    ]


def _record(member: Result) -> dict[str, Any]:
    best = best_row(member.rows, SELECTION, {row["step"] for row in member.rows}) or {}
    return {
        "name": member.name,
        **member.values,
        "status": member.status,
        "step": member.step,
        "rung": member.rung,
        "rank": member.rank,
        **{name: _last(member.rows, name) for name in _FIGURES},
        "best_step": best.get("step"),
        **{f"best_{name}": best.get(name) for name in _FIGURES},
        "workdir": str(member.workdir),
    }


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def read_result(sweep: Workdir, member: Member, ledger: Ledger) -> Result:
    """What `member` of a sweep has reached.

    Raises:
      RunError: its rows are damaged.
    """
    workdir, entry = sweep.member(member.name), ledger.members[member.name]
    rows = [row for row in workdir.read_rows() if SELECTION in row]
    if ledger.is_over(member.name):  # the member may have been continued alone since
        rows = [row for row in rows if row["step"] <= entry["step"]]
    rung, rank = entry.get("rung"), entry.get("rank")
    return Result(member.name, workdir, member.values, entry["status"], entry["step"], rung, rank, rows)


def _by_setting(results: Iterable[Result]) -> list[Setting]:
    settings: dict[str, Setting] = {}
    for result in results:
        values = {name: value for name, value in result.values.items() if name != "seed"}
        label = ", ".join(part for part in result.name.split(",") if not part.startswith("seed=")) or "all seeds"
        settings.setdefault(label, Setting(label, values, [])).members.append(result)
    return list(settings.values())


def _rank(setting: Setting) -> tuple[bool, float, float, float]:
    furthest, found = setting.furthest, setting.figures(SELECTION)
    incomplete = any(member.figure(SELECTION) is None for member in setting.members)
    reached = furthest[0].reached if furthest else -1.0
    return incomplete, -reached, -len(furthest) / len(setting.members), -statistics.mean(found) if found else 0.0
