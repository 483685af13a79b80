"""The members of a sweep, planned before they train: all at once, or in the mode "optuna" batch after batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vmapbn_flax.config import validate_sizes
from vmapbn_flax.multihost.processes import Processes
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import Member, expand
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.mirror import mirror
from vmapbn_flax.sweeps.plan import Datasets, extend_plan, make_plan
from vmapbn_flax.sweeps.proposals import Proposer


class Batches:
    """What of a sweep has been planned; every process has the same.

    Attributes:
      ledger: of the sweep.
      members: those in the ledger, by name.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        members: Mapping[str, Member],
        datasets: Datasets,
        processes: Processes,
    ):
        self._config, self._workdir, self._datasets, self._processes = config, workdir, datasets, processes
        self._proposer = Proposer(config, workdir) if config.sweep_options.mode == "optuna" else None
        self.ledger = Ledger(workdir)
        self.members: dict[str, Member] = {} if self._proposer else dict(members)

    def start(self) -> None:
        """Plans all members of the sweep, or those of its first batch, if its ledger does not have them.

        Raises:
          RunError: see `make_plan`.
        """
        self._expand(self.ledger.proposed)
        with self._processes.together() as agreement:
            if self._processes.first:
                batch = self._propose() if self._proposer and all(map(self.ledger.is_over, self.members)) else []
                ledger = make_plan(self._config, self._workdir, self.members, self._datasets, batch)
                agreement.say(ledger=ledger.content)
        self._hear(agreement.heard[0]["ledger"])

    def extend(self) -> bool:
        """Plans the next batch, when the members so far have trained; returns whether there is one."""
        if self._proposer is None:
            return False
        with self._processes.together() as agreement:
            if self._processes.first:
                batch = self._propose() if self._may_extend() else []
                if batch:
                    extend_plan(self._config, self._workdir, self.ledger, self.members, self._datasets, batch)
                agreement.say(ledger=self.ledger.content if batch else None)
        ledger = agreement.heard[0]["ledger"]
        if ledger is not None:
            self._hear(ledger)
        return ledger is not None

    def _may_extend(self) -> bool:
        """Whether every member is over or, as far as the sweep goes on without it, failed; and not all of a batch."""
        last = list(self.members)[-len(self.ledger.proposals[-1]) :]
        failed = [name for name in self.members if self.ledger.members[name]["status"] == "failed"]
        others = (name for name in self.members if name not in failed)
        goes_on = self._config.sweep_options.on_failure == "continue" and not set(last) <= set(failed)
        return all(map(self.ledger.is_over, others)) and (not failed or goes_on)

    def _propose(self) -> list[dict[str, Any]]:
        """The values of the next batch, whose members join `members`; none without a proposer, or after the last."""
        if self._proposer is None:
            return []
        members = list(self.members.values())
        trials = self._proposer.trials(members, self.ledger)
        if trials:
            mirror(trials, self._workdir)
        batch = self._proposer.propose(members, trials, len(self.ledger.proposals))
        self._expand([*self.ledger.proposed, *batch])
        return batch

    def _hear(self, ledger: dict[str, Any]) -> None:
        self.ledger.update(ledger)
        self._expand(self.ledger.proposed)

    def _expand(self, proposals: Sequence[dict[str, Any]]) -> None:
        """Adds to `members` those with these values, if it lacks some."""
        if self._proposer is not None and len(proposals) > len(self.members):
            for member in expand(self._config, proposals):
                if member.name not in self.members:
                    validate_sizes(member.config, len(self._datasets.load(member.config).train))
                    self.members[member.name] = member
