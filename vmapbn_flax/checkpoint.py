"""Checkpoints: orbax saves and restores them, a digest tells whether what came back is what was saved."""

import hashlib
import logging
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vmapbn_flax.errors import RunError

State = TypeVar("State")
Arrays = Mapping[str, np.ndarray]

# Dozens of lines a save otherwise, through absl's logger, which is the root's.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.WARNING or "/orbax/" not in record.pathname
)


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>/`: the latest two and the best.

    Saving runs in the background: `close`, on every way out, waits for it.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_metric,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(2),
                        checkpoint_managers.BestN(get_metric_fn=_metric, n=1),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def wait(self) -> None:
        """Returns once what was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._manager.close()

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        self.wait()
        steps = saved_steps(self._directory)
        return self._directory / str(steps[-1]) if steps else None

    def save(self, step: int, state: Any, config: dict, metric: float | None) -> None:
        """Saves `state` under `step` unless it is there; `metric` (higher is better) decides which is best."""
        if step in self._manager.all_steps():
            return
        arrays = _to_arrays(state)
        meta = {"step": step, "config": config, "digest": digest(arrays), "versions": versions()}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)),
            # JSON has no NaN, and nothing that is not finite may rank first.
            metrics={"metric": metric if metric is not None and math.isfinite(metric) else -math.inf},
        )


def _metric(metrics: Mapping[str, float]) -> float:
    return metrics["metric"]


def versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic and file formats a run depends on."""
    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def digest(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def saved_steps(directory: Path) -> list[int]:
    """The steps that `directory` has something for, good or damaged, in ascending order."""
    if not directory.exists():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.is_dir() and path.name.isdecimal())


def restore(directory: Path, step: int, template: State) -> State:
    """The state saved under `step`, in the structure of `template`.

    Raises:
      RunError: there is none, it is damaged, or it is of another model.
    """
    path = directory / str(step)
    try:
        arrays = _read(path)
    except DamagedError as error:
        raise RunError(str(error)) from None
    return _from_arrays(arrays, template, path)


def restore_latest(directory: Path, template: State) -> State | None:
    """The newest good state, in the structure of `template`; None where there is no checkpoint at all.

    Damaged ones are kept aside, under `<directory>/damaged/`, with a warning for each.

    Raises:
      RunError: every checkpoint is damaged (nothing is moved then), or the newest good one is of
        another model.
    """
    good, damaged = {}, {}
    for step in reversed(saved_steps(directory)):
        try:
            good[step] = _read(directory / str(step))
        except DamagedError as error:
            damaged[step] = error
    if not good and damaged:
        raise RunError(
            f"{directory}: got no checkpoint that is whole, the newest because of: {damaged[max(damaged)]} "
            f"Expected one. Restore {directory} from a copy, or start afresh in another --workdir."
        )
    for step, error in damaged.items():
        aside = directory / "damaged" / str(step)
        logging.warning("%s It is kept as %s.", error, aside)
        aside.parent.mkdir(exist_ok=True)
        (directory / str(step)).rename(_unused(aside))
    if not good:
        return None
    newest = max(good)
    return _from_arrays(good[newest], template, directory / str(newest))


class DamagedError(Exception):
    """A checkpoint that is not what was saved."""


def _read(path: Path) -> Arrays:
    try:
        saved = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(
            path.absolute(),
            args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()),
        )
        arrays = {name: np.asarray(array) for name, array in saved["state"].items()}
        expected = saved["meta"]["digest"]
    # Damage raises whatever the layer that trips over it raises, `Exception` itself included.
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise DamagedError(f"{path}: got a damaged checkpoint ({type(error).__name__}: {reason}).") from error
    if digest(arrays) != expected:
        raise DamagedError(f"{path}: got a damaged checkpoint (its digest is not that of what was saved).")
    return arrays


def _unused(path: Path) -> Path:
    taken = [path, *(path.with_name(f"{path.name}.{i}") for i in range(1, 1000))]
    return next(candidate for candidate in taken if not candidate.exists())


def _names(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _to_arrays(state: Any) -> Arrays:
    # Copies: on the CPU `np.asarray` is a view of a buffer that the next step will write to.
    return {name: np.array(leaf) for name, leaf in _names(state)}


def _from_arrays(arrays: Arrays, template: State, path: Path) -> State:
    expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _names(template)}
    got = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    for name in dict.fromkeys([*expected, *got]):
        if expected.get(name) != got.get(name):
            describe = {key: _describe(side.get(name)) for key, side in (("got", got), ("expected", expected))}
            raise RunError(
                f"{path}: {name}: got {describe['got']}, expected {describe['expected']}: a checkpoint of "
                f"another model. Use the config it was made with, or another --workdir."
            )
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name, _ in _names(template)])


def _describe(spec: tuple | None) -> str:
    return f"{spec[1]}{list(spec[0])}" if spec else "nothing"
