"""Where the runs of one program go on: from their newest whole checkpoint, if it is theirs."""

from collections.abc import Sequence
from pathlib import Path

from vmapbn_flax.errors import RunError
from vmapbn_flax.multihost.processes import Processes
from vmapbn_flax.runs.checkpoints import Meta, restore, restore_latest
from vmapbn_flax.runs.loading import find_step
from vmapbn_flax.runs.record import Record
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState


def restore_runs(
    directory: Path, programs: Programs, records: Sequence[Record], processes: Processes, *, own: bool = False
) -> tuple[TrainState, Meta] | None:
    """The newest whole checkpoint in `directory`, which every process reads, as `restore`; None if there is none.

    With `own`, the newest checkpoint of each run takes its place where there is none.

    Raises:
      RunError: the checkpoints are damaged, or of other runs.
    """
    template, restored = programs.template(), None
    with processes.together() as agreement:
        if processes.first:
            restored = restore_latest(directory, template)
            agreement.say(step=restored and restored[1]["step"])
    step = agreement.heard[0]["step"]
    with processes.together():
        if step is None:
            return _restore_own(programs, records) if own else None
        restored = restored or restore(directory, step, template)
        _require_fit(restored[1], directory, programs, records)
    return restored


def _restore_own(programs: Programs, records: Sequence[Record]) -> tuple[TrainState, Meta]:
    """The states of the newest checkpoints of `records`, stacked, and what lies beside the first of them."""
    found = []
    for record in records:
        directory = record.workdir.checkpoints
        state, meta = restore(directory, find_step(directory, None), programs.member_template)
        record.require_fit(meta["runs"][0], meta["step"])
        found.append((state, meta))
    states, metas = zip(*found, strict=True)
    if len(steps := {meta["step"] for meta in metas}) > 1:
        raise RunError(
            f"{records[0].workdir.path.parent}: got members of a group at the steps {sorted(steps)}; expected all at "
            f"the same. Put their checkpoints back from a copy, or start afresh in another --workdir."
        )
    return programs.stack(states), metas[0]


def _require_fit(meta: Meta, directory: Path, programs: Programs, records: Sequence[Record]) -> None:
    if [run.get("name") for run in meta["runs"]] != [record.name for record in records]:
        raise RunError(
            f"{directory}: got checkpoints of other members, expected {records[0].name} and the "
            f"rest of its group. Remove {directory.parent} to start the group afresh."
        )
    for record, saved in zip(records, meta["runs"], strict=True):
        if not record.diverged:
            record.require_fit(saved, meta["step"])
    if meta["step"] > programs.total_steps:
        raise RunError(
            f"{directory}: got a checkpoint of step {meta['step']}, expected at most the "
            f"{programs.total_steps} of this run: its data set has shrunk. Use the data.dir it was made "
            f"with, or another --workdir."
        )
