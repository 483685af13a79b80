"""The report of a sweep: its settings, ranked, its best member, and a picture."""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence

from vmapbn_flax.runs import console
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.pictures import plot_sweep
from vmapbn_flax.sweeps.results import SELECTION, Result, Setting, read_settings


def report(workdir: Workdir, file: console.TextFile | None = None) -> Result | None:
    """Prints the ranking of the sweep in `workdir`, draws `sweep.png` there, and returns the best member.

    The best member is that of the best setting, by validation accuracy; None if no member is done.

    Args:
      workdir: of a sweep, which may still be running.
      file: to print to; by default standard error.

    Raises:
      RunError: `workdir` has no sweep, or a damaged one.
    """
    file = file or sys.stderr
    settings = read_settings(workdir)
    rows = [(rank, *_cells(setting)) for rank, setting in enumerate(settings, start=1)]
    header = ("", "setting", "seeds done", "validation accuracy", "test accuracy", "not done")
    console.table(rows, header, file=file)
    plot_sweep(settings, workdir.sweep_picture)
    print(f"picture: {workdir.sweep_picture}", file=file)
    best = settings[0].best() if settings else None
    if best is not None:
        print(f"best: {best.name}, validation accuracy {best.figure(SELECTION):.2%}", file=file)
        print(f"python train.py --config=configs/saved.py:{workdir.member(best.name)}", file=file)
    return best


def _cells(setting: Setting) -> Sequence[str]:
    others = Counter(
        f"diverged at step {member.step}" if member.status == "diverged" else member.status
        for member in setting.members
        if member.status != "done"
    )
    done = sum(member.status == "done" for member in setting.members)
    return (
        setting.label,
        f"{done} of {len(setting.members)}",
        _spread(setting.figures(SELECTION)),
        _spread(setting.figures("test_accuracy")),
        ", ".join(f"{count} {what}" for what, count in others.items()),
    )


def _spread(figures: Sequence[float]) -> str:
    """The mean in percent, and of several figures the standard deviation."""
    if not figures:
        return ""
    deviation = f" ± {100 * statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{100 * statistics.mean(figures):.2f}{deviation} %"
