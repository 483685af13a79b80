"""Many processes, one run or sweep: process 0 leads, and the others follow it call by call.

The leader runs the loop. It alone has the workdir, and it alone decides what comes next: before each call that works
on the devices of all processes it says which one, and the others make the same call with the same numbers. What they
report in turn are signals, so that one sent to any process stops all of them at the same step.
"""

import contextlib
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree
from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.config import without_distributed
from vmapbn_flax.errors import EndedElsewhere, Interrupted, UsageError, UserError
from vmapbn_flax.multihost import distributed
from vmapbn_flax.training.metrics import EvalMetrics
from vmapbn_flax.training.programs import PARTS, Programs
from vmapbn_flax.training.state import TrainState

_END, _CHANGE, _COMPILE, _COMPILE_MEASURE, _CREATE, _PLACE, _ADVANCE, _FRESH_METRICS, _MEASURE, _FETCH = range(10)

_PIECE_BYTES = 2**26


class Group:
    """The processes of a run, or sweep, seen from one of them.

    Attributes:
      config: of the run, the same in all of them.
      follows: whether another process leads.
      many: whether there are others.
      parted: whether all of them know that this is the end.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.follows = jax.process_index() > 0
        self.many = jax.process_count() > 1
        self.parted = not self.many

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If the block ends in a UserError in one process, the others exit, without a word, with its status."""
        try:
            yield
        except UserError as error:
            self.exchange(error.exit_status)
            self.parted = True
            raise
        if status := self.exchange(0).max():
            self.parted = True
            raise EndedElsewhere(int(status))

    def require_same_config(self) -> None:
        """Refuses to go on with one config here and another there."""
        with self.together():
            checksums = self.exchange(zlib.crc32(self.config.to_json(sort_keys=True).encode()) >> 1)
            if len(set(checksums[:, 0].tolist())) > 1:
                raise UsageError(
                    "got configs that differ between processes, expected the same command line in all of them but for "
                    "config.distributed.process_id"
                )

    @contextlib.contextmanager
    def led(self, received: list[int]) -> Iterator["Leader"]:
        """Leads the others through the block, at whose end they end; signals that they get go to `received`."""
        leader = Leader(self, received)
        try:
            yield leader
        except BaseException as error:
            if status := _exit_status(error):
                leader.announce(_END, status)
                self.parted = True
            raise
        leader.announce(_END, leader.exit_status)
        self.parted = True

    def follow(self, programs: Programs | None = None, change: Callable[[list[int]], Programs] | None = None) -> None:
        """Makes the leader's calls until it ends, and exits with its status if that is not 0.

        Args:
          programs: those of a run.
          change: makes those of a sweep's members, given which.
        """
        state = None
        with signals.deferred([]) as received:
            while True:
                call, *numbers = self.exchange(0, 0, 0, *received[:1])[0, :3].tolist()
                if call == _END:
                    self.parted = True
                    if status := numbers[0]:
                        raise EndedElsewhere(status)
                    return
                if call == _CHANGE:
                    state = None
                    programs = change(self.broadcast(np.zeros(numbers[0], np.int32)).tolist())
                elif call == _COMPILE:
                    programs.compile_ahead(numbers[0])
                elif call == _COMPILE_MEASURE:
                    programs.compile_measure_ahead()
                elif call == _CREATE:
                    state = programs.create()
                elif call == _PLACE:
                    state = programs.place(self.broadcast(programs.template()))
                elif call == _ADVANCE:
                    state = programs.advance(state, *numbers)
                elif call == _FRESH_METRICS:
                    state = programs.fresh_metrics(state)
                elif call == _MEASURE:
                    programs.measure(state)
                elif call == _FETCH:
                    programs.fetch(state, list(PARTS)[numbers[0]])

    def exchange(self, *numbers: int) -> Int[np.ndarray, "processes 4"]:
        """Up to four numbers of each process, the same in all of them, once all of them have called this."""
        row = np.zeros(4, np.int32)
        row[: len(numbers)] = numbers
        if not self.many:
            return row[np.newaxis]
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(row)

    def broadcast(self, tree: PyTree) -> PyTree:
        """The leader's arrays, for arrays of the same shapes and types."""
        from jax.experimental import multihost_utils

        leaves, structure = jax.tree.flatten(tree)
        sizes = [int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
        # As bytes: they are sent as a sum with zeros, which would turn -0.0 into 0.0.
        if self.follows:
            content = np.zeros(sum(sizes), np.uint8)
        else:
            content = np.concatenate([np.asarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
        # Piece by piece: each lies whole on a device.
        pieces = np.split(content, range(_PIECE_BYTES, content.size, _PIECE_BYTES))
        content = np.concatenate([multihost_utils.broadcast_one_to_all(piece) for piece in pieces])
        parts = np.split(content, np.cumsum(sizes)[:-1])
        arrays = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, arrays)


class Leader:
    """Process 0 as the others see it.

    Attributes:
      exit_status: which they are to have too.
    """

    def __init__(self, group: Group, received: list[int]):
        self._group, self._received = group, received
        self.exit_status = 0

    @property
    def is_followed(self) -> bool:
        """Whether there are other processes."""
        return self._group.many

    def announce(self, call: int, *numbers: int) -> None:
        """Says which call comes next, one of those that `Group.follow` knows, and hears of signals."""
        signums = self._group.exchange(call, *numbers)[1:, 3]
        if signums.any() and not self._received:
            self._received.append(int(signums.max()))

    def change(self, members: Sequence[int]) -> None:
        """Has the others make the programs of other members of a sweep."""
        if self.is_followed:
            self.announce(_CHANGE, len(members))
            self.broadcast(np.array(members, np.int32))

    def broadcast(self, tree: PyTree) -> PyTree:
        """Hands arrays to the others, who wait for ones of these shapes and types, and returns them."""
        return self._group.broadcast(tree)

    def of_all(self, programs: Programs) -> Programs:
        """`programs`, called in every process."""
        return _Announced(self, programs) if self.is_followed else programs


class _Announced:
    """`Programs` as the loop of process 0 has them: each call on all devices is announced before it is made."""

    def __init__(self, leader: Leader, programs: Programs):
        self._leader, self._programs = leader, programs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def compile_ahead(self, step: int) -> None:
        self._leader.announce(_COMPILE, step)
        self._programs.compile_ahead(step)

    def compile_measure_ahead(self) -> None:
        self._leader.announce(_COMPILE_MEASURE)
        self._programs.compile_measure_ahead()

    def create(self) -> TrainState:
        self._leader.announce(_CREATE)
        return self._programs.create()

    def place(self, state: PyTree) -> PyTree:
        self._leader.announce(_PLACE)
        return self._programs.place(self._leader.broadcast(state))

    def advance(self, state: TrainState, step: int, count: int) -> TrainState:
        self._leader.announce(_ADVANCE, step, count)
        return self._programs.advance(state, step, count)

    def fresh_metrics(self, state: TrainState) -> TrainState:
        self._leader.announce(_FRESH_METRICS)
        return self._programs.fresh_metrics(state)

    def measure(self, state: TrainState) -> dict[str, EvalMetrics]:
        self._leader.announce(_MEASURE)
        return self._programs.measure(state)

    def fetch(self, state: TrainState, part: str = "state") -> PyTree:
        if not self._programs.is_whole:
            self._leader.announce(_FETCH, list(PARTS).index(part))
        return self._programs.fetch(state, part)


@contextlib.contextmanager
def joined(config: ConfigDict) -> Iterator[Group]:
    """Makes this process one of those that `config.distributed` speaks of.

    Where they do not come to an end together, since one died or failed on its own, the others exit as soon as they
    find out, with a line that says so and status 1.

    Raises:
      RunError: the processes do not find one another.
      UsageError: their configs differ.
    """
    joining = config.distributed.to_dict()
    config = without_distributed(config)
    if not joining["coordinator"]:
        yield Group(config)
        return
    distributed.initialize(**joining)
    group = Group(config)
    try:
        group.require_same_config()
        yield group
    except BaseException as error:
        if not group.parted:
            distributed.leave(error, _exit_status(error) or 1)
        raise
    finally:
        jax.distributed.shutdown()  # which waits for the others: only now that all of them are on their way


def _exit_status(error: BaseException) -> int | None:
    """Of an error that ends one process in good order, and so can end the others."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args or (signal.SIGINT,))[0]
    if isinstance(error, OSError):
        return 1
    return error.exit_status if isinstance(error, UserError | Interrupted) else None
