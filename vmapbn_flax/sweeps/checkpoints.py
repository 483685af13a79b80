"""The checkpoints of each member of a group, taken from those that the group has together."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from vmapbn_flax.runs.checkpoints import Checkpoints, restore, saved_steps
from vmapbn_flax.runs.record import Record
from vmapbn_flax.training.programs import Programs

_SAVES_AT_ONCE = 8  # each takes threads and open files


def save_members(
    records: Sequence[Record], checkpoints: Path, steps: Sequence[int], programs: Programs, process: int
) -> None:
    """Saves the best and the last checkpoint of each member on the devices of `process`, which is this one.

    They are those of a run alone: the member can be evaluated, refreshed and continued. Those of the rung before are
    removed, but for the best.

    Args:
      records: of the members.
      checkpoints: the directory of the group's checkpoints.
      steps: of the group's checkpoints.
    """
    members: dict[int, set[int]] = {}  # whose checkpoint is to be taken from the group's, by its step
    best_steps: dict[int, int] = {}
    for i, owner in enumerate(programs.owners()):
        if owner == process:
            best = records[i].best_row([*steps, *saved_steps(records[i].workdir.checkpoints)])
            best_steps[i] = best["step"] if best else steps[-1]
            for step in {steps[-1], best_steps[i]}:
                members.setdefault(step, set()).add(i)
    for step in sorted(members.keys() & {*steps}):
        state, meta = restore(checkpoints, step, programs.template())
        own, numbers = programs.split(state), sorted(members[step])
        for first in range(0, len(numbers), _SAVES_AT_ONCE):
            with contextlib.ExitStack() as stack:  # its end waits for the saves
                for i in numbers[first : first + _SAVES_AT_ONCE]:
                    saved = Checkpoints(records[i].workdir.checkpoints, alone=True, latest=1)
                    stack.callback(saved.close)
                    described = {"data": programs.described, "runs": [{**meta["runs"][i], "name": ""}]}
                    saved.save(int(own[i].step), own[i], described, [best_steps[i]])
