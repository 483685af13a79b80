"""The processes of one run or sweep, and what they tell one another.

Every process runs the same program. Most of its decisions follow from what all processes have: the config, the data,
global arrays. Some facts only one process can know: a signal, the clock, a file that could not be written. The
processes exchange those in `Processes.together`, once a chunk of steps. The exchange goes through the key-value store
of jax.distributed, not over the devices, so that it works whatever the devices do.

An error outside `together` may find the other processes in a collective of the devices, which waits half an hour for
the failed process. The failed process therefore posts its error in the store, where a thread of every process looks
once a second.
"""

import contextlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax

from vmapbn_flax.errors import Interrupted, RunError, UsageError, UserError, described, first_line
from vmapbn_flax.multihost import distributed

_FAILURE = "vmapbn_flax/failure"
_LOOK_SECONDS = 1.0  # between two looks for a failure
_NOTICE_SECONDS = 5.0  # that process 0 waits for the others to notice a failure
_EXPLANATION_SECONDS = 1.0  # after a broken connection, in which a posted failure may explain it


class SharedError(RunError):
    """A `UserError` of one process, raised in every process by `Processes.together`."""


class Agreement:
    """What the processes tell one another in one block of `together`.

    Attributes:
      said: by this process.
      heard: what each process said, in the order of their indices; set when the block ends.
    """

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.heard: list[dict[str, Any]] = []

    def say(self, **said: Any) -> None:
        """Tells the other processes values by name: numbers, strings, lists and dictionaries."""
        self.said |= said


class Processes:
    """The processes of a run or sweep, seen from this one, which may be the only one.

    Attributes:
      index: of this process.
      count: of all processes.
      first: whether this process is the one that writes files and prints.
    """

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.first = self.index == 0
        self._round = 0
        self._left = threading.Event()
        if self.count > 1:
            from jax._src.distributed import global_state  # the client has no public name

            self._client: Any = global_state.client
            threading.Thread(target=self._look_for_failure, name="look_for_failure", daemon=True).start()

    @contextlib.contextmanager
    def together(self) -> Iterator[Agreement]:
        """A block at whose end every process knows what each one said.

        The block must not wait for other processes. If it raises a UserError in one process, every process raises a
        SharedError. A process that is alone raises its error unchanged.
        """
        agreement, error = Agreement(), None
        try:
            yield agreement
        except UserError as raised:
            if self.count == 1:
                raise
            error = raised
        agreement.heard = self._gather(agreement.said | {"error": error and [error.exit_status, str(error)]})
        for index, heard in enumerate(agreement.heard):
            if heard["error"]:
                raise self._shared_error(index, *heard["error"]) from error

    def _shared_error(self, index: int, exit_status: int, message: str) -> SharedError:
        shared = SharedError(message if index == self.index else f"process {index}: {message}")
        shared.exit_status = exit_status
        return shared

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Compares facts between the processes.

        Raises:
          UsageError: a fact differs; every process raises the error, with the fact's name and two of its values.
        """
        with self.together() as agreement:
            agreement.say(facts=dict(facts))
        first = agreement.heard[0]["facts"]
        for index, heard in enumerate(agreement.heard):
            for name in {**first, **heard["facts"]}:
                here, there = first.get(name), heard["facts"].get(name)
                if here != there:
                    raise UsageError(
                        f"{name}: got {here} in process 0 and {there} in process {index}; expected the same in all. "
                        f"Give every process the same command line but for config.distributed.process_id, the same "
                        f"data and the same packages."
                    )

    def _gather(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        if self.count == 1:
            return [said]
        self._round += 1
        place = f"vmapbn_flax/{self._round}"
        self._client.key_value_set(f"{place}/{self.index}", json.dumps(said))
        if not self.first:
            return json.loads(self._wait_for(f"{place}/all"))
        everything = [json.loads(self._wait_for(f"{place}/{index}")) for index in range(self.count)]
        self._client.key_value_set(f"{place}/all", json.dumps(everything))
        self._client.key_value_delete(f"vmapbn_flax/{self._round - 1}/")  # read by all: each has written again
        return everything

    def _wait_for(self, key: str, seconds: float = float("inf")) -> str:
        """The value of `key`, as soon as there is one; signals are handled in the meantime."""
        end = time.monotonic() + seconds
        while True:
            try:
                return self._client.blocking_key_value_get(key, 500)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > end:
                    raise

    def _look_for_failure(self) -> None:
        """Ends this process when another process has posted a failure."""
        while not self._left.wait(_LOOK_SECONDS):
            if (failure := self._posted()) is not None and failure["index"] != self.index:
                self._leave(failure, f"process {failure['index']}: {failure['message']}")

    def _posted(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._client.key_value_try_get(_FAILURE))
        except jax.errors.JaxRuntimeError:  # nothing is posted, or process 0 is gone
            return None

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of `error`.

        If `error` is a broken connection, the failure of the process behind it takes its place, once it is posted.
        """
        status, message = _status_and_line(error)
        if status is None:  # a connection broke
            end = time.monotonic() + _EXPLANATION_SECONDS
            while (failure := self._posted()) is None and time.monotonic() < end:
                time.sleep(0.1)
            if failure is None:
                distributed.leave(message, 1)
            self._leave(failure, f"process {failure['index']}: {failure['message']}")
        failure = {"index": self.index, "status": status, "message": message}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            self._client.key_value_set(_FAILURE, json.dumps(failure))
        self._leave(failure, message)

    def _leave(self, failure: dict[str, Any], message: str) -> NoReturn:
        """Ends this process. Process 0, which has the store, waits until the others know."""
        self._left.set()
        distributed.when_aborted(message, failure["status"])
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_FAILURE}_seen/{self.index}", "", True)
            end = time.monotonic() + _NOTICE_SECONDS
            for index in range(self.count) if self.first else ():
                self._wait_for(f"{_FAILURE}_seen/{index}", end - time.monotonic())
        distributed.leave(message, failure["status"])

    def part(self) -> None:
        """Disconnects this process, at an end that all processes come to."""
        jax.distributed.shutdown()  # waits for the other processes
        self._left.set()


@contextlib.contextmanager
def joined(coordinator: str, num_processes: int, process_id: int) -> Iterator[Processes]:
    """Connects this process to the others for its block; the arguments are the fields of `config.distributed`.

    An error in the block ends every process with that error's line and status. An `Interrupted`, which all processes
    raise together, is raised here.

    Raises:
      RunError: the processes cannot connect.
    """
    if not coordinator:
        yield Processes()
        return
    distributed.initialize(coordinator, num_processes, process_id)
    processes = Processes()
    try:
        yield processes
    except Interrupted as stop:
        processes.part()
        stop.said = processes.first
        raise
    except BaseException as error:
        processes.fail(error)
    processes.part()


def _status_and_line(error: BaseException) -> tuple[int | None, str]:
    """The exit status and the message of `error`; the status is None if a connection to another process broke."""
    if isinstance(error, KeyboardInterrupt):
        signum = (error.args or (signal.SIGINT,))[0]
        return 128 + signum, "stopped; the same command in every process starts again"
    if isinstance(error, UserError):
        return error.exit_status, str(error)
    if isinstance(error, OSError):
        return 1, described(error)
    # What XLA raises for a broken connection depends on the device.
    if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
        return None, f"{distributed.LOST} ({first_line(error)})"
    return 1, "".join(traceback.format_exception(error))
