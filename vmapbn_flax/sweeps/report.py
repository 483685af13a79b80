"""The report of a sweep: its settings, ranked, what matters, its best member, and a picture."""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence

from vmapbn_flax.runs import console
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.importance import importances
from vmapbn_flax.sweeps.pictures import plot_sweep
from vmapbn_flax.sweeps.results import SELECTION, Result, Setting, read_settings


def report(workdir: Workdir, file: console.TextFile | None = None, top: int = 20) -> Result | None:
    """Prints the ranking of the sweep in `workdir`, draws `sweep.png` there, and returns the best member.

    The best member is that of the best setting, by validation accuracy; None if no member is done.

    Args:
      workdir: of a sweep, which may still be running.
      file: to print to; by default standard error.
      top: the number of settings in the table.

    Raises:
      RunError: `workdir` has no sweep, or a damaged one.
    """
    file = file or sys.stderr
    settings = read_settings(workdir)
    rows = [(rank, *_cells(setting)) for rank, setting in enumerate(settings[:top], start=1)]
    header = ("", "setting", "seeds done", "validation accuracy", "test accuracy", "not done")
    console.table(rows, header, file=file)
    if len(settings) > top:
        members = [member for setting in settings for member in setting.members]
        print(f"the best {top} of {len(settings)} settings; --top={len(settings)} shows all", file=file)
        print(f"{len(members)} members: {_counts(members)}", file=file)
    if found := importances(settings):
        shown = [
            (one.field, "" if one.correlation is None else f"{one.correlation:+.2f}", *map(_percent, one[2:]))
            for one in found
        ]
        header = ("field", "rank correlation", "share of the ranks' variance", "by chance, up to")
        console.table(shown, header, file=file)
    plot_sweep(settings, workdir.sweep_picture)
    print(f"picture: {workdir.sweep_picture}", file=file)
    best = settings[0].best() if settings else None
    if best is not None:
        print(f"best: {best.name}, validation accuracy {best.figure(SELECTION):.2%}", file=file)
        print(f"python train.py --config=configs/saved.py:{workdir.member(best.name)}", file=file)
    return best


def _cells(setting: Setting) -> Sequence[str]:
    done = sum(member.status == "done" for member in setting.members)
    return (
        setting.label,
        f"{done} of {len(setting.members)}",
        _spread(setting.figures(SELECTION)),
        _spread(setting.figures("test_accuracy")),
        _counts([member for member in setting.members if member.status != "done"], steps=True),
    )


def _counts(members: Sequence[Result], *, steps: bool = False) -> str:
    """How many of the members are in which state, such as `3 done, 1 stopped at rung 0`."""

    def state(member: Result) -> str:
        if member.rung is not None:
            return f"stopped at rung {member.rung}"
        return f"diverged at step {member.step}" if steps and member.status == "diverged" else member.status

    return ", ".join(f"{count} {what}" for what, count in Counter(map(state, members)).most_common())


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _spread(figures: Sequence[float]) -> str:
    """The mean in percent, and of several figures the standard deviation."""
    if not figures:
        return ""
    deviation = f" ± {100 * statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{100 * statistics.mean(figures):.2f}{deviation} %"
