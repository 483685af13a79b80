"""`vmapbn-flax parity`: the vmapped network compared with the batched one, on real batches."""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.config import validate
from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.networks import in_form
from vmapbn_flax.runs.checkpoints import Checkpoints, restore
from vmapbn_flax.runs.console import table
from vmapbn_flax.training.metrics import TrainMetrics, compute
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState
from vmapbn_flax.training.trees import named_leaves

_STEPS = 100
_FLOOR = 0.01  # of the largest entry of a tree: below it an array may be nothing but rounding


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints the differences; the status is 1 if one is too large."""
    rows = parity(arguments.config)
    cells = [(*row, "yes" if row.within else "NO") for row in rows]
    header = ("vmapped against batched", "worst array", "difference", "in ulps", "relative", "tolerance", "within")
    table(cells, header, file=sys.stdout)
    return 0 if all(row.within for row in rows) else 1


class Difference(NamedTuple):
    """The largest difference between two trees of arrays, in the array where it is largest relative to its size."""

    what: str
    array: str  # its name in the trees
    absolute: float
    ulps: float  # in units in the last place of `size`
    relative: float  # to `size`: the largest entry of the array, or a hundredth of the trees' if that is larger
    tolerance: float  # of `relative`

    @property
    def within(self) -> bool:
        return self.relative <= self.tolerance  # which NaN is not


def compare(what: str, first: PyTree, second: PyTree, tolerance: float) -> Difference:
    """The largest difference between two trees of float32 arrays, each array by its own measure."""
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    largest = {name: np.abs(pair).max() for name, pair in zip(named_leaves(first), pairs, strict=True)}
    for name, size in largest.items():
        if not np.isfinite(size):
            return Difference(what, name, np.nan, np.nan, np.nan, tolerance)
    floor = _FLOOR * max(size for size in largest.values() if not isinstance(size, np.integer))  # counts are exact
    found = []
    for (name, size), (a, b) in zip(largest.items(), pairs, strict=True):
        apart = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
        size = np.float32(max(size, floor))
        found.append(
            Difference(what, name, apart, apart / float(np.spacing(size)), apart / float(size or 1), tolerance)
        )
    return max(found, key=lambda difference: difference.relative)


def parity(config: ConfigDict) -> list[Difference]:
    """Compares the vmapped and the batched network of `config`, from the same seed on the same batches.

    Outputs and gradients of the first batch, losses of the first steps, parameters and statistics after them, and the
    accuracy of each network's checkpoint evaluated by the other.

    Raises:
      UsageError: the config cannot be used, or has no batch norm.
    """
    validate(config)
    if config.model.norm == "none":
        raise UsageError(
            "config.model.norm: got 'none', expected 'vmap' or 'batched', or 'renorm' or "
            "'batched_renorm': parity compares the two"
        )
    dataset = load_dataset(config.data)
    programs = []
    for batched in (False, True):
        variant = config.copy_and_resolve_references()  # a deep copy: programs read it when they are compiled
        variant.model.norm = in_form(config.model.norm, batched=batched)
        programs.append(Programs([variant], dataset))
    with contextlib.closing(programs[0]) as vmap, contextlib.closing(programs[1]) as batched:
        return _compare_programs(vmap, batched)


def _compare_programs(vmap: Programs, batched: Programs) -> list[Difference]:
    count = min(_STEPS, vmap.steps_per_epoch, vmap.total_steps)

    first = [program.gradients(program.create(), step=0) for program in (vmap, batched)]
    losses, states = zip(*(_advance(program, count) for program in (vmap, batched)), strict=True)
    rows = [
        compare("outputs of the first batch", first[0][0], first[1][0], 1e-5),
        compare("gradients of the first batch", first[0][1], first[1][1], 1e-5),
        compare(f"losses of the first {count} steps", losses[0], losses[1], 1e-4),
        compare(f"parameters after {count} steps", states[0].params, states[1].params, 1e-3),
        compare(f"statistics after {count} steps", states[0].batch_stats, states[1].batch_stats, 1e-3),
    ]
    for name, state, own, other in (("vmapped", states[0], vmap, batched), ("batched", states[1], batched, vmap)):
        restored = _through_checkpoint(state, other)
        what = f"accuracy of the {name} network's checkpoint in the other"
        key = own.selection
        rows.append(compare(what, np.float32(own.evaluate(state)[key]), np.float32(other.evaluate(restored)[key]), 0.0))
    return rows


def _advance(programs: Programs, count: int) -> tuple[np.ndarray, TrainState]:
    state, losses = programs.create(), []
    for step in range(count):
        state = programs.advance(state, step, 1)
        losses.append(compute(state.metrics)["loss"])
        state = state.replace(metrics=TrainMetrics.empty())
    return np.array(losses, np.float32), state


def _through_checkpoint(state: TrainState, programs: Programs) -> Any:
    with signals.raised(), tempfile.TemporaryDirectory() as directory:
        with contextlib.closing(Checkpoints(Path(directory))) as checkpoints:
            checkpoints.save(int(state.step), programs.snapshot(state), {"runs": []})
        return restore(Path(directory), int(state.step), programs.template())[0]
