"""How much each swept field matters: of fields whose effect is known."""

import math
from pathlib import Path

import numpy as np
import pytest

from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.importance import FEWEST, importances
from vmapbn_flax.sweeps.results import SELECTION, Result, Setting


def settings(accuracy, fields, statuses=None):
    """A setting of one member for each row of `fields`, arrays by name."""
    count = len(next(iter(fields.values())))
    found = []
    for i in range(count):
        values = {name: column[i] for name, column in fields.items()}
        status = (statuses or {}).get(i, "done")
        rows = [{"step": 20, SELECTION: accuracy[i]}]
        rung = 0 if status == "stopped" else None
        result = Result(str(i), Workdir(Path(str(i))), values, status, 20, rung, None, rows)
        found.append(Setting(str(i), values, [result]))
    return found


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    return {"rate": rng.random(count).tolist(), "decay": rng.random(count).tolist()}


def by_field(found):
    return {importance.field: importance for importance in found}


def test_a_field_that_decides_and_one_that_does_not():
    fields = draw(200)
    first, second = importances(settings(np.array(fields["rate"]) ** 3, fields))
    assert (first.field, second.field) == ("rate", "decay")
    assert first.correlation == pytest.approx(1)
    assert first.share > 0.9  # what lies within its quarters is left
    assert abs(second.correlation) < 0.2
    assert second.share <= second.by_chance < 0.05


def test_an_optimum_in_the_middle():
    """Which no correlation shows."""
    fields = draw(200)
    found = by_field(importances(settings(-np.abs(np.array(fields["rate"]) - 0.5), fields)))
    assert abs(found["rate"].correlation) < 0.2
    assert found["rate"].share > 0.5


def test_values_that_are_no_numbers():
    """By hand: ranks 1 to 10 of one, 11 to 20 of the other; 75 % of the variance, and less by what chance gives."""
    fields = {"norm": ["none", "vmap"] * 10, "hidden": [(i,) for i in range(20)], "flag": [True] * 20}
    (found,) = importances(settings([i % 2 + i / 100 for i in range(20)], fields))
    assert (found.field, found.correlation) == ("norm", None)
    between, total = 20 * 5**2, (20**3 - 20) / 12
    assert found.share == pytest.approx(1 - (1 - between / total) * 19 / 18)


@pytest.mark.parametrize("count", [FEWEST, 48, pytest.param(500, marks=pytest.mark.slow)])
def test_chance(count):
    """A field without effect exceeds the share that is said of chance in about one of twenty sweeps."""
    exceeded = 0
    for seed in range(100):
        fields = draw(count, seed)
        (found,) = importances(settings(fields["decay"], {"rate": fields["rate"]}))
        exceeded += found.share > found.by_chance
    assert 0 < exceeded <= 12


def test_ties_and_members_without_a_figure():
    fields = draw(40)
    accuracy = np.array(fields["rate"])
    everyone = by_field(importances(settings(accuracy, fields)))
    # Those with a rate below 0.5 diverge: the last ones, whatever they had before.
    diverged = {i: "diverged" for i, rate in enumerate(fields["rate"]) if rate < 0.5}
    found = by_field(importances(settings(np.where(accuracy < 0.5, 1, accuracy), fields, diverged)))
    assert found["rate"].correlation > 0.8
    assert found["rate"].share > found["rate"].by_chance
    # Those that were stopped come after those that are done.
    stopped = dict.fromkeys(diverged, "stopped")
    assert (
        by_field(importances(settings(np.where(accuracy < 0.5, accuracy + 1, accuracy), fields, stopped))) == everyone
    )
    running = dict.fromkeys(range(40 - FEWEST + 1), "running")
    assert importances(settings(accuracy, fields, running)) == []
    assert importances(settings(np.full(40, 0.5), fields)) == []


def test_the_seed_is_no_field():
    fields = draw(40) | {"seed": list(range(40))}
    assert {found.field for found in importances(settings(fields["rate"], fields))} == {"rate", "decay"}
    assert not any(math.isnan(found.by_chance) for found in importances(settings(fields["rate"], fields)))
