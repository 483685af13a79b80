"""Training a sweep: its members in groups, each group one program, and a ledger of what became of them."""

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.config import validate_sizes
from vmapbn_flax.errors import Interrupted, RunError
from vmapbn_flax.files import workdir_lock
from vmapbn_flax.multihost import processes
from vmapbn_flax.runs import console
from vmapbn_flax.runs.checkpoints import Checkpoints
from vmapbn_flax.runs.loop import Run
from vmapbn_flax.runs.record import Record
from vmapbn_flax.sweeps.expand import Member, expand, program_key
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.plan import Datasets, make_plan
from vmapbn_flax.sweeps.progress import SweepProgress
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs


def train_sweep(config: ConfigDict, workdir: Path) -> Ledger | None:
    """Trains, or resumes, the sweep in `workdir`, reports on it, and returns its ledger.

    Nothing is returned in a process that is not the first of the sweep.

    Args:
      config: what `configs/default.py` makes, with values in `config.sweep`.
      workdir: made if need be; each member has its own in it.

    Raises:
      UsageError: the config or the data cannot be used.
      RunError: the workdir is in use, damaged or of another sweep.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    members = {member.name: member for member in expand(config)}
    mesh.divide_cpu(config.mesh, sweep=True)
    with processes.joined(config) as group:
        config, datasets = group.config, Datasets()
        with group.together():
            for member in members.values():
                validate_sizes(member.config, len(datasets.of(member.config).train))
        programs_of = _ProgramsOf(list(members.values()), datasets)
        if group.follows:
            group.follow(change=programs_of)
            return None
        received: list[int] = []
        with group.led(received) as leader, workdir_lock(workdir):
            ledger = make_plan(config, workdir, members, datasets)
            with signals.deferred(received):
                _train_groups(config, workdir, ledger, members, programs_of, leader, received)
            from vmapbn_flax.sweeps.report import report  # matplotlib, which has been imported if anything was trained

            report(workdir)
            leader.exit_status = 1 if ledger.count("failed") else 0
        return ledger


class _ProgramsOf:
    """Called with the numbers of some members, makes their programs, or takes the last ones if those will do.

    Raises:
      UsageError: see `Programs`.
    """

    def __init__(self, members: Sequence[Member], datasets: Datasets):
        self._members, self._datasets = members, datasets
        self._last, self._compiled_for = None, None

    def __call__(self, numbers: Sequence[int]) -> Programs:
        configs = [self._members[number].config for number in numbers]
        key = (len(configs), program_key(configs[0]))
        if self._last is not None and key == self._compiled_for:
            self._last = self._last.with_members(configs)
        else:
            self.forget()
            dataset, devices = self._datasets.of(configs[0]), mesh.member_mesh(configs[0].mesh, len(configs))
            self._last, self._compiled_for = Programs(configs, dataset, devices), key
        return self._last

    def forget(self) -> None:
        """Lets go of the last ones, and of what they have on the devices."""
        self._last = None


def _train_groups(
    config: ConfigDict,
    workdir: Path,
    ledger: Ledger,
    members: Mapping[str, Member],
    programs_of: _ProgramsOf,
    leader: processes.Leader,
    received: Sequence[int],
) -> None:
    """Trains every group that has a member which is not over."""
    # Where one of many processes fails in a call that all make, they are no longer together.
    failures = RunError if leader.is_followed else (RunError, MemoryError, jax.errors.JaxRuntimeError)
    numbers, step = {name: number for number, name in enumerate(members)}, 0
    with SweepProgress(ledger) as progress:
        for number, names in enumerate(ledger.groups):
            directory = workdir / "groups" / str(number)
            if not all(ledger.is_over(name) for name in names):
                if received:
                    raise Interrupted(received[0], step)
                started, together = time.monotonic(), [numbers[name] for name in names]
                try:
                    leader.change(together)
                    programs = leader.of_all(programs_of(together))
                    progress.start(number, names, programs.total_steps)
                    records = [Record(members[name].config, workdir / name, programs.selection, name) for name in names]
                    with contextlib.closing(GroupRun(records, directory, programs, started, ledger)) as run:
                        run.to_end(received, progress)
                        run.finish()
                    step = run.step
                # A full disk, a damaged checkpoint, out of memory: what can strike one group and not another.
                except failures as error:
                    programs_of.forget()
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    ledger.mark(names, "failed", reason=reason)
                    console.say(f"warning: group {number} failed: {reason}")
                    if config.sweep_options.on_failure == "stop":
                        return
                    continue
                finally:
                    programs = run = None  # what is theirs on the devices goes before the next group's comes
            # Its members have checkpoints of their own by now.
            shutil.rmtree(directory, ignore_errors=True)


class GroupRun(Run):
    """The runs of a group in one program: `Run` with many records, and a checkpoint of them all."""

    def __init__(self, records: Sequence[Record], directory: Path, programs: Programs, started: float, ledger: Ledger):
        for record in records:
            record.stopped = ledger.is_over(record.name)  # diverged, before the group was interrupted
        self._ledger = ledger
        ledger.mark([record.name for record in records], "running")
        super().__init__(records, directory, programs, started)

    def _described(self) -> dict[str, Any]:
        members = {
            record.name: {"config": record.config.to_dict(), "rows": len(record.rows)} for record in self._records
        }
        return {"config": members, "rows": sum(member["rows"] for member in members.values())}

    def _require_fit(self, meta: Mapping[str, Any]) -> None:
        saved = meta["config"]
        if list(saved) != [record.name for record in self._records]:
            raise RunError(
                f"{self._directory}: got checkpoints of other members, expected {self._records[0].name} and those "
                f"that the ledger groups it with. Remove {self._directory}, and they start afresh."
            )
        for record in self._active():
            record.require_fit(saved[record.name]["config"], meta["step"], saved[record.name]["rows"])

    def _save(self) -> None:
        super()._save()
        self._ledger.mark([record.name for record in self._active()], "running", self.step)

    def _diverged(self, record: Record, step: int) -> None:
        """Marks the member, which the step has frozen, and lets the others train on."""
        with self._saving(record, self._programs.held(self._state)[self._records.index(record)], step):
            record.stopped = True
        most = self._config.train.max_skipped_steps
        self._ledger.mark([record.name], "diverged", step, f"{most} steps in a row not finite, up to step {step}")

    def finish(self) -> dict[str, Any]:
        """Writes each member's checkpoint and summary, and marks it done; returns the summaries."""
        summaries = {}
        with self._timing.clock("checkpoint"), contextlib.ExitStack() as stack:  # at whose end all of them are saved
            for number, state in self._programs.held(self._state).items():
                if not self._records[number].stopped:
                    stack.enter_context(self._saving(self._records[number], state, self.step))
        device = mesh.device_name(self._programs.devices)
        for record in self._active():
            summaries[record.name] = record.finish(self.step, [self.step], self._timing.seconds(), device)
        self._ledger.mark(summaries, "done", self.step)
        return summaries

    def _saving(self, record: Record, state: Any, step: int) -> contextlib.AbstractContextManager:
        """Saves a member's checkpoint, from which it can be continued alone; it is saved when the context ends."""
        record.flush()
        checkpoints = Checkpoints(record.workdir / "checkpoints")
        checkpoints.save(step, state, record.config.to_dict(), None, len(record.rows))
        return contextlib.closing(checkpoints)
