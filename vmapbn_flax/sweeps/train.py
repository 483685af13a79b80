"""Training a sweep: group after group, each in one program, with the status of each member in a ledger."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.config import validate_sizes, without_distributed
from vmapbn_flax.errors import Interrupted, RunError
from vmapbn_flax.files import in_threads, remove_directory
from vmapbn_flax.multihost.processes import Processes, SharedError, joined
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.console import say
from vmapbn_flax.runs.loop import Loop
from vmapbn_flax.runs.record import Record
from vmapbn_flax.runs.train import facts, held
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.batches import Batches
from vmapbn_flax.sweeps.checkpoints import save_members
from vmapbn_flax.sweeps.expand import Member, expand, program_key
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.plan import Datasets, divide
from vmapbn_flax.sweeps.progress import SweepProgress
from vmapbn_flax.sweeps.proposals import require_optuna
from vmapbn_flax.sweeps.results import SELECTION
from vmapbn_flax.sweeps.rungs import rank, rung_epochs, rung_step
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs


def train_sweep(config: ConfigDict, path: Path) -> Ledger:
    """Trains, or resumes, the sweep in the workdir `path`, prints its report, and returns its ledger.

    Args:
      config: made from `vmapbn_flax.default_config()`, with values in `config.sweep`.
      path: of the workdir; made if it does not exist. Each member has a workdir of its own in it.

    Raises:
      UsageError: the config or the data cannot be used.
      RunError: the workdir is in use, damaged or of another sweep.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    members = {member.name: member for member in expand(config)}
    if config.sweep_options.mode == "optuna":
        require_optuna()
    mesh.divide_cpu(config.mesh, sweep=True, processes=config.distributed.num_processes)
    with joined(**config.distributed) as processes:
        workdir, datasets = Workdir(path, writes=processes.first), Datasets()
        processes.require_same(facts(without_distributed(config)))
        for member in members.values():
            validate_sizes(member.config, len(datasets.load(member.config).train))
        with held(workdir, processes):
            batches = Batches(config, workdir, members, datasets, processes)
            batches.start()
            with signals.deferred() as received:
                sweep = _Sweep(config, workdir, batches.ledger, batches.members, datasets, processes, received)
                sweep.train()
                while batches.extend():
                    sweep.train()
            if processes.first:
                # Not before: it imports matplotlib, which training imports while the devices work.
                from vmapbn_flax.sweeps.report import report

                report(workdir)
        return batches.ledger


class _Sweep:
    """A sweep in training."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        ledger: Ledger,
        members: Mapping[str, Member],
        datasets: Datasets,
        processes: Processes,
        received: Sequence[int],
    ):
        self._options, self._workdir, self._ledger, self._members = config.sweep_options, workdir, ledger, members
        self._datasets, self._processes, self._received = datasets, processes, received
        self._programs: Programs | None = None
        self._compiled_for: tuple[int, str] | None = None

    def train(self) -> None:
        """Trains every member that is not over to its end, or to the rung that stops it."""
        # Failures that can strike one group and spare the next: a full disk, a damaged checkpoint, out of memory. With
        # many processes only an error that all of them raise, or the others would wait.
        alone = self._processes.count == 1
        failures = (RunError, MemoryError, jax.errors.JaxRuntimeError) if alone else SharedError
        step = 0
        with SweepProgress(self._ledger, shown=self._processes.first) as progress:
            for number in self._numbers():
                names = self._ledger.groups[number]
                # Where members are trained but this is still there, they do not all have checkpoints of their own.
                if self._ledger.is_trained(number) and not self._workdir.group_checkpoints(number).exists():
                    self._remove_group(number)
                    continue
                with self._processes.together() as agreement:
                    agreement.say(received=list(self._received))
                if signums := [signum for heard in agreement.heard for signum in heard["received"]]:
                    raise Interrupted(signums[0], step)
                try:
                    step = self._train_group(number, names, progress)
                except failures as error:
                    self._programs = None
                    reason = " ".join(f"{_kind(error)}: {error}".split())
                    self._ledger.mark(names, "failed", reason=reason)
                    if self._processes.first:
                        say(f"warning: group {number} failed: {reason}")
                    if self._options.on_failure == "stop":
                        return
                    continue
                self._remove_group(number)

    def _numbers(self) -> Iterator[int]:
        """The numbers of the groups, those that are added at rungs included."""
        number = 0
        while number < len(self._ledger.groups) or self._rank():
            yield number
            number += 1

    def _rank(self) -> bool:
        """Ranks the members that wait at a rung, unless others have failed before it; returns whether it did."""
        ledger = self._ledger
        waiting = {name: ledger.members[name]["step"] for name in self._members if ledger.is_waiting(name)}
        if not waiting:
            return False
        if failed := ledger.count("failed"):
            if self._processes.first:
                say(f"warning: {len(waiting)} members wait at their rung for {failed} that failed; run again")
            return False
        with self._processes.together() as agreement:
            if self._processes.first:
                ranked = rank(self._workdir, waiting)
                kept = max(1, len(ranked) // self._options.halving)
                rung, best = ledger.rung(ranked[0]), {*ranked[:kept]}
                epochs = rung_epochs(self._options, rung)
                reached = f"rung {rung}, after {epochs:g} epoch{'s' * (epochs != 1)}"
                members = [self._members[name] for name in waiting if name in best]
                in_threads(lambda name: self._write_hparams(name, waiting[name]), ranked[kept:])
                ledger.rank(ranked, kept, reached, divide(members, self._options, self._datasets))
                say(f"{reached}: {kept} of {len(ranked)} members train on")
                agreement.say(ledger=ledger.content)
        ledger.update(agreement.heard[0]["ledger"])
        return True

    def _remove_group(self, number: int) -> None:
        """Removes the group's checkpoints, or what a kill left of that."""
        if self._processes.first:
            remove_directory(self._workdir.group_checkpoints(number).parent)

    def _train_group(self, number: int, names: Sequence[str], progress: SweepProgress) -> int:
        started, configs = time.monotonic(), [self._members[name].config for name in names]
        programs = self._programs_of(configs)
        progress.start(number, names, programs.total_steps)
        records = [self._record(name) for name in names]
        for record in records:
            record.diverged = self._ledger.members[record.name]["status"] == "diverged"
        with self._processes.together():
            self._ledger.mark(names, "running")
        checkpoints = self._workdir.group_checkpoints(number)
        rung = self._ledger.rung(names[0])
        end = rung_step(self._options, rung, configs[0].train, programs)
        loop = Loop(records, checkpoints, programs, configs[0].train, self._processes, started, own=rung > 0, end=end)
        with contextlib.closing(loop):
            loop.run(
                self._received,
                progress,
                on_save=lambda step: self._ledger.mark([record.name for record in loop.active], "running", step),
                on_divergence=lambda diverged: self._mark_diverged(loop, diverged),
            )
            self._finish(loop, records, checkpoints, programs)
        return loop.step

    def _record(self, name: str) -> Record:
        member = self._members[name]
        return Record(member.config, self._workdir.member(name), SELECTION, name, tuple(member.values))

    def _write_hparams(self, name: str, step: int) -> None:
        """Writes TensorBoard's hparams of a member that a rung stops at `step`."""
        record = self._record(name)
        record.open(step)
        record.write_hparams()

    def _programs_of(self, configs: Sequence[ConfigDict]) -> Programs:
        """The programs for members with these configs; compiled ones if the last group had the same size and kind."""
        key = (len(configs), program_key(configs[0]))
        if self._programs is not None and key == self._compiled_for:
            self._programs.set_members(configs)
            return self._programs
        self._programs = None  # frees the devices before the next programs fill them
        dataset = self._datasets.load(configs[0])
        if self._processes.count > 1:
            self._processes.require_same({"data": dataset.fingerprint()})
        self._programs = Programs(configs, dataset, mesh.member_mesh(configs[0].mesh, len(configs)))
        self._compiled_for = key
        return self._programs

    def _mark_diverged(self, loop: Loop, diverged: Sequence[tuple[Record, int]]) -> None:
        """Marks members that diverged, and are frozen by their steps; the others train on."""
        loop.save()  # before the ledger: a member that is over there must be in a checkpoint
        loop.saved_steps()  # waits until the checkpoint is whole
        with self._processes.together():
            for record, step in diverged:
                most = record.config.train.max_skipped_steps
                reason = f"{most} steps in a row not finite, up to step {step}"
                self._ledger.mark([record.name], "diverged", step, reason, write=False)
            self._ledger.write()

    def _finish(self, loop: Loop, records: Sequence[Record], checkpoints: Path, programs: Programs) -> None:
        """Writes each member's own checkpoints, and marks it: at the end done, with a summary, at a rung waiting."""
        steps = loop.saved_steps()
        with self._processes.together() as agreement:  # process 0 may still have removed some
            agreement.say(steps=steps)
        steps = agreement.heard[0]["steps"]
        with self._processes.together(), loop.timing.clock("checkpoint"):
            save_members(records, checkpoints, steps, programs, self._processes.index)
        with self._processes.together():
            device, seconds = mesh.device_name(programs.devices), loop.timing.seconds()
            done = loop.step == programs.total_steps

            def finish(record: Record) -> None:
                record.finish(loop.step, [*steps, *saved_steps(record.workdir.checkpoints)], seconds, device)

            in_threads(finish, loop.active if done else ())
            self._ledger.mark([record.name for record in loop.active], "done" if done else "waiting", loop.step)


def _kind(error: Exception) -> str:
    return "RunError" if isinstance(error, SharedError) else type(error).__name__
