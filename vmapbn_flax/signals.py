"""What SIGTERM and SIGINT do: they wait while there is a state to save, raise while there is something to undo, and
end the process elsewhere.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STOPPED = "stopped; the same command starts again"

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """Collects the signals that arrive in its block; the caller acts on them when it can save.

    A second signal ends the process at once.
    """
    received: list[int] = []

    def receive(signum: int, frame: object) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)

    with _handled(receive):
        yield received


@contextlib.contextmanager
def fatal() -> Iterator[None]:
    """Ends the process, with a line on standard error, when a signal arrives in its block.

    An exception would not do: during an import of JAX or orbax it may get lost, or crash.
    """

    def receive(signum: int, frame: object) -> None:
        os.write(2, f"note: {STOPPED}\n".encode())
        os._exit(128 + signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises a KeyboardInterrupt with the signal's number when a signal arrives in its block."""

    def receive(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def _handled(receive: Callable[[int, object], None]) -> Iterator[None]:
    previous = {signum: signal.signal(signum, receive) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
