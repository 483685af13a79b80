"""Where the runs of one program go on: from their newest whole checkpoint, if it is theirs."""

from collections.abc import Sequence
from pathlib import Path

from vmapbn_flax.errors import RunError
from vmapbn_flax.multihost.processes import Processes
from vmapbn_flax.runs.checkpoints import Meta, restore, restore_latest
from vmapbn_flax.runs.record import Record
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState


def restore_runs(
    directory: Path, programs: Programs, records: Sequence[Record], processes: Processes
) -> tuple[TrainState, Meta] | None:
    """The newest whole checkpoint in `directory`, which every process reads, as `restore`; None if there is none.

    Raises:
      RunError: the checkpoints are damaged, or of other runs.
    """
    template, restored = programs.template(), None
    with processes.together() as agreement:
        if processes.first:
            restored = restore_latest(directory, template)
            agreement.say(step=restored and restored[1]["step"])
    step = agreement.heard[0]["step"]
    if step is None:
        return None
    with processes.together():
        restored = restored or restore(directory, step, template)
        _require_fit(restored[1], directory, programs, records)
    return restored


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
