"""Checkpoints: orbax saves and restores them, a digest tells whether what came back is what was saved."""

import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.console import say
from vmapbn_flax.runs.digest import Arrays, digest, require_whole, write_sums

State = TypeVar("State")

_PARTIAL = ".orbax-checkpoint-tmp"  # ends the name of what orbax is still writing, and of what is being deleted

# Of many processes one saves and restores, since it has all that there is to save, without waiting for the others.
_PROCESS_0 = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})

# What orbax logs: dozens of lines a save, and, when one fails, tracebacks of what is raised as well: of its
# own, of tasks that it leaves behind, and of event loops that it closes while its threads still call them.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _report_unraisable(unraisable: Any, report: Callable[[Any], None] = sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


sys.unraisablehook = _report_unraisable


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>/`: the latest two and the best.

    Saving runs in the background: `close`, on every way out, waits for it. orbax's own manager is not
    used: it cannot open a directory in which any step's metrics are damaged, and a kill while it deletes
    a step leaves half of one behind.

    Raises:
      RunError: a save failed, here or on a later call.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        self._keep: set[int] | None = None
        self._saving = self._directory
        self._checkpointer = ocp.AsyncCheckpointer(
            _handler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_sums),
            multiprocessing_options=_PROCESS_0,
        )
        with self._failures():
            self._directory.mkdir(parents=True, exist_ok=True)
            for partial in self._directory.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(partial)

    def save(self, step: int, state: Any, config: dict, best_step: int | None = None, rows: int = 0) -> None:
        """Saves `state` under `step` unless it is there.

        Args:
          step: of `state`.
          state: a tree of arrays.
          config: of the run, as JSON has it.
          best_step: its checkpoint is kept beside the latest two.
          rows: how many rows `metrics.jsonl` has.
        """
        saved = self.steps()
        if step not in saved:
            arrays = _to_arrays(state)
            meta = {"step": step, "config": config, "rows": rows, "versions": versions()}
            meta["digest"] = digest(arrays, meta)
            self._saving = self._directory / str(step)
            with self._failures():
                self._checkpointer.save(
                    self._saving,
                    args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)),
                )
        self._keep = {*sorted({*saved, step})[-2:], best_step}

    def _write_sums(self) -> None:
        """What orbax calls when it has written all files, before it gives the directory its name."""
        write_sums(_partial(self._saving))

    def wait(self) -> None:
        """Returns once what was saved is on the disk, and deletes what that makes superfluous."""
        with self._failures():
            self._checkpointer.wait_until_finished()
            for step in saved_steps(self._directory):
                if self._keep is not None and step not in self._keep:
                    path = self._directory / str(step)
                    shutil.rmtree(path.rename(_partial(path)))  # whole or gone, whenever a kill arrives

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps that are saved, in ascending order."""
        self.wait()
        return saved_steps(self._directory)

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        steps = self.steps()
        return self._directory / str(steps[-1]) if steps else None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        # A full disk raises whatever the layer that trips over it raises.
        except Exception as error:
            self._keep = None
            steps = saved_steps(self._directory)
            raise RunError(
                f"{self._directory}: got a checkpoint that could not be saved ({_reason(error)}); expected room "
                f"and permission to write there. {f'That of step {steps[-1]} is whole' if steps else 'None is whole'}; "
                f"with the reason put right, the same command continues."
            ) from error


def _handler() -> ocp.CompositeCheckpointHandler:
    options = ocp.CompositeOptions(multiprocessing_options=_PROCESS_0)
    return ocp.CompositeCheckpointHandler(composite_options=options)


def versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic and file formats a run depends on."""
    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")}


def saved_steps(directory: Path) -> list[int]:
    """The steps that `directory` has something for, good or damaged, in ascending order."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))


def restore(directory: Path, step: int, template: State) -> State:
    """The state saved under `step`, in the structure of `template`.

    Raises:
      RunError: there is none, it is damaged, or it is of another model.
    """
    path = directory / str(step)
    try:
        arrays, _ = _read(path)
    except DamagedError as error:
        raise RunError(f"{error} Choose another --step; training on falls back to the newest good one.") from None
    return _from_arrays(arrays, template, path)


def restore_latest(directory: Path, template: State) -> tuple[State, dict[str, Any]] | None:
    """The newest good state, in the structure of `template`, and what was saved with it.

    None where there is no checkpoint at all. Every one is read, and the damaged are kept aside, under
    `<directory>/damaged/`, with a warning for each.

    Raises:
      RunError: every checkpoint is damaged, or the newest good one is of another model; nothing is moved.
    """
    newest, damaged = None, {}
    for step in reversed(saved_steps(directory)):
        path = directory / str(step)
        try:
            arrays, meta = _read(path)
            newest = newest or (_from_arrays(arrays, template, path), meta)
        except DamagedError as error:
            damaged[step] = error
    if newest is None and damaged:
        raise RunError(
            f"{directory}: got no checkpoint that is whole, the newest because of: {damaged[max(damaged)]} "
            f"Expected one. Restore {directory} from a copy, or start afresh in another --workdir."
        )
    for step, error in damaged.items():
        aside = _unused(directory / "damaged" / str(step))
        say(f"warning: {error} It is kept as {aside}.")
        aside.parent.mkdir(exist_ok=True)
        (directory / str(step)).rename(aside)
    return newest


class DamagedError(Exception):
    """A checkpoint that is not what was saved."""


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        require_whole(path)
        saved = ocp.Checkpointer(_handler(), multiprocessing_options=_PROCESS_0).restore(
            path.absolute(),
            args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()),
        )
        arrays, meta = {name: np.asarray(array) for name, array in saved["state"].items()}, saved["meta"]
        if meta["digest"] != digest(arrays, meta):
            raise ValueError("its digest is not that of what was saved")
        if str(meta["step"]) != path.name:
            raise ValueError(f"it was saved as step {meta['step']}")
    # Damage raises whatever the layer that trips over it raises, `Exception` itself included.
    except Exception as error:
        raise DamagedError(f"{path}: got a damaged checkpoint ({_reason(error)}).") from error
    return arrays, meta


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _reason(error: Exception) -> str:
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # at the end of pages of tensorstore's
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


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
