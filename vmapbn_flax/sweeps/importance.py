"""How much each swept field matters: the share of the members' ranks that its values explain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vmapbn_flax.sweeps.results import Setting

FEWEST = 20  # members; of fewer, chance alone explains too much
_FEW_VALUES = 8  # of a number; more are divided into quarters
_SHUFFLES = 400


class Importance(NamedTuple):
    """How much a swept field matters.

    Attributes:
      field: its dotted name.
      correlation: Spearman's, of its values with the ranks, above 0 if larger values do better; None if they are no
        numbers.
      share: of the variance of the ranks that lies between its values, or quarters of its values, less what chance
        gives on average (epsilon squared; Kelley, 1935); 0 where that is more.
      by_chance: the share that a field without any effect exceeds in one of twenty sweeps.
    """

    field: str
    correlation: float | None
    share: float
    by_chance: float


def importances(settings: Sequence[Setting]) -> list[Importance]:
    """The importance of each swept field but the seed, the largest share first; none of fewer than `FEWEST` members.

    Members are ranked as in `Result.order`; those that diverged come last. The others do not count yet.
    """
    members = [m for setting in settings for m in setting.members if m.reached >= 0 or m.status == "diverged"]
    if len(members) < FEWEST:
        return []
    ranks = _ranks(np.array([member.order for member in members]))
    found = []
    for field in members[0].values:
        values = [member.values[field] for member in members]
        groups = _groups(values)
        count = groups.max() + 1
        if field == "seed" or ranks.std() == 0 or not 1 < count <= len(members) / 2:
            continue
        rng = np.random.default_rng(0)
        shuffled = [_share(rng.permutation(ranks), groups) for _ in range(_SHUFFLES)]
        correlation = None
        if _are_numbers(values):
            correlation = float(np.corrcoef(_ranks(np.array(values)[:, None]), ranks)[0, 1])
        found.append(Importance(field, correlation, _share(ranks, groups), float(np.quantile(shuffled, 0.95))))
    return sorted(found, key=lambda importance: importance.share, reverse=True)


def _ranks(rows: np.ndarray) -> np.ndarray:
    """The rank of each of `rows`, `(count, keys)`, the smallest first; equal ones share the mean of their ranks."""
    _, places, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places.ravel()]


def _groups(values: Sequence[Any]) -> np.ndarray:
    """The number of the group that each value is in: all that are equal, or a quarter of many numbers."""
    distinct = {value: number for number, value in enumerate(dict.fromkeys(values))}
    if len(distinct) > _FEW_VALUES and _are_numbers(values):
        quarters = np.searchsorted(np.quantile(values, (0.25, 0.5, 0.75)), values)
        return np.unique(quarters, return_inverse=True)[1]
    return np.array([distinct[value] for value in values])


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _share(ranks: np.ndarray, groups: np.ndarray) -> float:
    sizes, sums = np.bincount(groups), np.bincount(groups, ranks - ranks.mean())
    within = 1 - (sums**2 / sizes).sum() / (len(ranks) * ranks.var())
    return max(0.0, float(1 - within * (len(ranks) - 1) / (len(ranks) - len(sizes))))
