"""Proposals that learn: Optuna's TPE sampler chooses the members of a batch by what those before have reached."""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.config import validate
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import Member, random_draws, read_sweep, with_values
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.results import SELECTION, Result, read_result
from vmapbn_flax.sweeps.space import Choices, Range, plain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial


def require_optuna() -> None:
    """Raises a UsageError if Optuna is not installed."""
    if find_spec("optuna") is None:
        raise UsageError(
            "config.sweep_options.mode: got optuna, but no library of that name. Install it: pip install 'optuna>=5', "
            "or sweep with --config.sweep_options.mode=random"
        )


class Proposer:
    """Proposes the members of a sweep, batch after batch.

    A batch depends on the config, on how many batches there were, and on what their members have reached. All of it is
    in the workdir: an interrupted sweep continues with the proposals of an undisturbed one.
    """

    def __init__(self, config: ConfigDict, workdir: Workdir):
        self._base, self._space = read_sweep(config)
        self._options, self._workdir = config.sweep_options, workdir
        self._final: dict[str, FrozenTrial] = {}  # of members that are over

    def trials(self, members: Sequence[Member], ledger: Ledger) -> list["FrozenTrial"]:
        """What `members`, which are over or failed, have reached: a trial of Optuna's each."""
        found = []
        for member in members:
            trial = self._final.get(member.name)
            if trial is None:
                trial = self._trial(member, read_result(self._workdir, member, ledger))
                if ledger.is_over(member.name):
                    self._final[member.name] = trial
            found.append(trial)
        return found

    def propose(self, members: Sequence[Member], trials: Sequence["FrozenTrial"], batch: int) -> list[dict[str, Any]]:
        """The values of the next members; none if the sweep has as many as it is to have.

        The first batch is what the mode "random" draws. A later proposal that repeats a member, or that makes no valid
        config, gives way to the first of those draws that does neither.

        Args:
          members: of the batches so far.
          trials: what they have reached.
          batch: how many batches there were.
        """
        count, draws = self._options.size - len(members), random_draws(self._space, self._options)
        count = min(count, self._options.batch)
        if batch == 0 or count <= 0:
            return list(itertools.islice(draws, max(count, 0)))
        taken = {repr(member.values) for member in members}
        proposals: list[dict[str, Any]] = []
        with quiet():
            study = self._study(trials, batch)
            for _ in range(count):
                values = self._ask(study)
                if not self._is_usable(values, taken):
                    # Of the `size` draws, all of them valid and distinct, fewer are taken.
                    values = next(drawn for drawn in draws if self._is_usable(drawn, taken))
                    study.enqueue_trial(self._parameters(values))
                    study.ask(self._distributions())
                values = {name: plain(value) for name, value in values.items()}
                taken.add(repr(values))
                proposals.append(values)
        return proposals

    def _study(self, trials: Sequence["FrozenTrial"], batch: int) -> "Study":
        import optuna

        seed = int(np.random.SeedSequence((self._options.seed, batch)).generate_state(1)[0])
        # With a constant liar, the members of a batch keep away from one another.
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(trials)
        return study

    def _ask(self, study: "Study") -> dict[str, Any]:
        asked = study.ask(self._distributions()).params
        values = {}
        for name, dimension in self._space.items():
            if isinstance(dimension, Range):
                values[name] = dimension.clip(asked[name])
            else:
                values[name] = next(value for value in dimension.values if _label(value) == asked[name])
        return values

    def _is_usable(self, values: dict[str, Any], taken: Collection[str]) -> bool:
        """Whether `values` make a valid config, and are not `taken`."""
        if repr({name: plain(value) for name, value in values.items()}) in taken:
            return False
        try:
            validate(with_values(self._base, values))
        except UsageError:
            return False
        return True

    def _trial(self, member: Member, result: Result) -> "FrozenTrial":
        """A diverged member is the worst there is, one without an intermediate value; a failed one says nothing."""
        from optuna.trial import TrialState, create_trial

        evaluations = [row[SELECTION] for row in result.rows if SELECTION in row]
        reached = {number: value for number, value in enumerate(evaluations, start=1) if value is not None}
        if result.status not in ("done", "stopped"):
            reached = {}
        value = reached[max(reached)] if reached else None
        state = TrialState.PRUNED
        if result.status == "failed":
            state = TrialState.FAIL
        elif result.status == "done" and value is not None:
            state = TrialState.COMPLETE
        return create_trial(
            state=state,
            value=value,
            params=self._parameters(member.values),
            distributions=self._distributions(),
            intermediate_values=reached,
            user_attrs={"member": member.name, "status": result.status},
        )

    def _parameters(self, values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: values[name] if isinstance(dimension, Range) else _label(values[name])
            for name, dimension in self._space.items()
        }

    def _distributions(self) -> dict[str, "BaseDistribution"]:
        return {name: _distribution(dimension) for name, dimension in self._space.items()}


def _distribution(dimension: Choices | Range) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match dimension:
        case Choices(values):
            return CategoricalDistribution(tuple(dict.fromkeys(map(_label, values))))
        case Range(low, high, log, whole=True):
            return IntDistribution(max(round(low), int(log)), round(high), log=log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _label(value: Any) -> Any:
    """`value` as Optuna's storages take it: tuples as text."""
    return plain(value) if isinstance(value, bool | int | float | str) else str(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna from reporting every study and trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
