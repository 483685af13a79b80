"""Successive halving (Jamieson & Talwalkar 2016): the rungs at which the worst members of a sweep are stopped.

Rung r is after `first_rung * halving**r` epochs. Of n members that reach it, n / halving train on, rounded down, but at
least one.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.results import SELECTION
from vmapbn_flax.training.hyperparameters import steps_in
from vmapbn_flax.training.programs import Programs


def rung_epochs(options: ConfigDict, rung: int) -> float:
    """The epochs up to a rung; `options` are the section `sweep_options` of the config."""
    return options.first_rung * options.halving**rung


def rung_step(options: ConfigDict, rung: int, train: ConfigDict, programs: Programs) -> int:
    """The step of a rung, which has an evaluation; the last step, if there is no such rung.

    Args:
      options: the section `sweep_options` of the sweep's config.
      train: the section `train` of a member's.
    """
    if not options.halving:
        return programs.total_steps
    evaluations = round(rung_epochs(options, rung) / train.eval_every)
    return min(programs.total_steps, evaluations * max(1, steps_in(train.eval_every, programs.steps_per_epoch)))


def rank(workdir: Workdir, steps: Mapping[str, int]) -> list[str]:
    """The members of the sweep in `workdir`, named in `steps`, with the best validation accuracy at their steps first.

    Equals stay in the order of `steps`.

    Raises:
      RunError: a member has no such evaluation.
    """
    accuracies = {name: _accuracy(workdir.member(name), step) for name, step in steps.items()}
    return sorted(steps, key=accuracies.__getitem__, reverse=True)


def _accuracy(workdir: Workdir, step: int) -> float:
    found = [row[SELECTION] for row in workdir.read_rows() if row["step"] == step and SELECTION in row]
    if not found:
        raise RunError(
            f"{workdir.metrics}: got no {SELECTION} at step {step}, expected that of the rung. Put the file back from "
            f"a copy, or choose another --workdir."
        )
    return -1.0 if found[-1] is None else found[-1]
