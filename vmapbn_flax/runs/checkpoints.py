"""Checkpoints: orbax saves and restores them, and SHA-256 sums of their files show damage.

orbax is imported by the first save or restore: a new run takes its first steps before that.
"""

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from vmapbn_flax.errors import RunError, first_line
from vmapbn_flax.files import require_shallow
from vmapbn_flax.runs.console import say
from vmapbn_flax.runs.shapes import require_fit
from vmapbn_flax.runs.sums import require_whole, write_sums
from vmapbn_flax.training.trees import named_leaves

if TYPE_CHECKING:
    from orbax.checkpoint import AsyncCheckpointer

State = TypeVar("State")
Arrays = dict[str, Any]
Meta = dict[str, Any]

_PARTIAL = ".orbax-checkpoint-tmp"  # ends the name of a checkpoint that is being written or deleted


class Checkpoints:
    """The checkpoints of one run, or of runs that train together, `<directory>/<step>/`: the latest and each best.

    Saves run in the background; `close` waits for them, and every way out must call it. Many processes save together,
    each its own shards, into a directory that all of them see. orbax's CheckpointManager is not used: where a save
    fails in one of many processes, it waits minutes for the others before it says so.

    Args:
      directory: of the checkpoints; made if it does not exist.
      alone: whether this process saves by itself, without the others.
      latest: how many of the latest are kept.

    Raises:
      RunError: a save failed. A save in the background raises at a later call.
    """

    def __init__(self, directory: Path, *, alone: bool = False, latest: int = 2):
        self._directory, self._latest = directory.absolute(), latest
        self._first = alone or jax.process_index() == 0
        self._kept: set[int] | None = None
        self._saving = self._directory
        self._alone = alone
        self._checkpointer: AsyncCheckpointer | None = None
        with self._failures():
            if self._first:
                self._directory.mkdir(parents=True, exist_ok=True)
                for partial in self._directory.glob(f"*{_PARTIAL}*"):
                    shutil.rmtree(partial)

    def save(self, step: int, state: Any, meta: Meta, best_steps: Iterable[int] = ()) -> None:
        """Saves `state` under `step`, unless that step is saved already.

        Args:
          step: of `state`.
          state: a tree of arrays that nothing changes: numpy arrays or, in many processes, global arrays.
          meta: JSON to save beside the state.
          best_steps: the steps whose checkpoints are kept beside the latest.
        """
        saved = self.steps()
        if step not in saved:
            self._saving = self._directory / str(step)
            meta = {"step": step, **meta, "versions": versions()}
            from vmapbn_flax.runs.checkpointer import make_saver, save_items

            with self._failures():
                if self._checkpointer is None:
                    self._checkpointer = make_saver(alone=self._alone, before_commit=self._write_sums)
                self._checkpointer.save(self._saving, args=save_items(_to_arrays(state), meta))
        self._kept = {*sorted({*saved, step})[-self._latest :], *best_steps}

    def _write_sums(self) -> None:
        """Called by orbax when all files are written, before the directory gets its name."""
        write_sums(_partial(self._saving))

    def wait(self) -> None:
        """Returns when the last save is on the disk and the checkpoints that it supersedes are removed."""
        with self._failures():
            if self._checkpointer:
                self._checkpointer.wait_until_finished()
            if self._first and self._kept is not None:
                for step in set(saved_steps(self._directory)) - self._kept:
                    path = self._directory / str(step)
                    shutil.rmtree(path.rename(_partial(path)))  # whole or gone, whenever a kill arrives

    def close(self) -> None:
        """Waits for the last save, and closes orbax's checkpointer."""
        try:
            self.wait()
        finally:
            if self._checkpointer:
                self._checkpointer.close()

    def steps(self) -> list[int]:
        """The saved steps, in ascending order; waits for the last save."""
        self.wait()
        return saved_steps(self._directory)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        # A full disk raises a different exception in each layer below.
        except Exception as error:
            self._kept = None
            steps = saved_steps(self._directory)
            raise RunError(
                f"{self._directory}: got a checkpoint that could not be saved ({_reason(error)}); expected room "
                f"and permission to write there. {f'That of step {steps[-1]} is whole' if steps else 'None is whole'}; "
                f"with room and permission, the same command continues."
            ) from error


@functools.cache  # a sweep asks for each checkpoint of each member, and reading them takes a third of a save
def versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic and file formats a run depends on."""
    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")}


def saved_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory`, whole or damaged, in ascending order."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))


def restore(directory: Path, step: int, template: State) -> tuple[State, Meta]:
    """The state saved under `step`, in the structure of `template`, and the JSON saved beside it.

    Raises:
      RunError: the checkpoint is missing, damaged, or of another model.
    """
    try:
        return _read(directory / str(step), lambda meta: template)
    except DamagedError as error:
        raise _choose_another(error) from None


def restore_part(directory: Path, step: int, make_template: Callable[[Meta], State]) -> tuple[State, Meta]:
    """A part of the state saved under `step`, and the JSON saved beside it, from which `make_template` makes its form.

    Raises:
      RunError: as `restore`.
      Exception: `make_template` raises it.
    """
    try:
        return _read(directory / str(step), make_template, whole=False)
    except DamagedError as error:
        raise _choose_another(error) from None


def _choose_another(error: Exception) -> RunError:
    return RunError(f"{error} Choose another --step; training on falls back to the newest good one.")


def restore_latest(directory: Path, template: State) -> tuple[State, Meta] | None:
    """`restore` of the newest whole checkpoint; None if there is no checkpoint at all.

    Every checkpoint is read. Damaged ones are moved to `<directory>/damaged/`, with a warning each.

    Raises:
      RunError: every checkpoint is damaged, or one is of another model. Then nothing is moved.
    """
    newest, damaged = None, {}
    for step in reversed(saved_steps(directory)):
        path = directory / str(step)
        try:
            found = _read(path, lambda meta: template)
            newest = newest or found
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
    """The files of a checkpoint are not what was saved."""


def _read(path: Path, make_template: Callable[[Meta], State], *, whole: bool = True) -> tuple[State, Meta]:
    """The state in `path`, as numpy arrays, whatever devices they were saved from, and the JSON beside it.

    Unless `whole`, the template is that of a part of the state, and only this part is read.
    """
    import orbax.checkpoint as ocp

    from vmapbn_flax.runs.checkpointer import make_reader

    with make_reader() as checkpointer:
        with _damage(path):
            require_whole(path)
            meta = checkpointer.restore(path.absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if "runs" not in meta:
                raise ValueError("it was saved by an earlier version of this program")
            require_shallow(meta)
            if repr(meta["step"]) != path.name:
                raise ValueError(f"it was saved as step {meta['step']}")
            runs = meta["runs"]
            if not isinstance(runs, list) or not all(
                isinstance(run["rows"], int) and isinstance(run["config"], dict) for run in runs
            ):
                raise ValueError("runs without rows and configs")
            count = len(runs)
        template = make_template(meta)
        with _damage(path):
            saved_as = dict(ocp.StandardCheckpointHandler().metadata(path.absolute() / "state"))
            if not whole:
                parts = {name.partition("/")[0] for name in named_leaves(template)}
                saved_as = {name: leaf for name, leaf in saved_as.items() if name.partition("/")[0] in parts}
            require_fit(saved_as, template, count, path)
            wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in saved_as.items()}
            # As numpy arrays, also what many processes saved as global ones.
            as_numpy = dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))
            state = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=not whole)
            arrays = checkpointer.restore(path.absolute(), args=ocp.args.Composite(state=state))["state"]
    if count > 1:  # many processes also save the rows that pad the members to the devices
        arrays = {name: array[:count] for name, array in arrays.items()}
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in named_leaves(template)]), meta


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns what reading the checkpoint `path` raises into a DamagedError, but for a RunError."""
    try:
        yield
    except RunError:
        raise
    # Damage raises a different exception in each layer below, `Exception` itself included.
    except Exception as error:
        raise DamagedError(f"{path}: got a damaged checkpoint ({_reason(error)}).") from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _reason(error: Exception) -> str:
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # at the end of a long message of tensorstore
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {first_line(error)}"


def _unused(path: Path) -> Path:
    taken = [path, *(path.with_name(f"{path.name}.{i}") for i in range(1, 1000))]
    return next(candidate for candidate in taken if not candidate.exists())


def _to_arrays(state: Any) -> Arrays:
    def as_saved(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable else np.asarray(leaf)

    return {name: as_saved(leaf) for name, leaf in named_leaves(state).items()}
