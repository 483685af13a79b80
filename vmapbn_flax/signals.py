"""SIGTERM and SIGINT: an orderly end where there is something to save or to undo, a plain one elsewhere."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STOPPED = "stopped; the same command starts again"

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def deferred(received: list[int] | None = None) -> Iterator[list[int]]:
    """Collects the signals that arrive in its block in `received`, to be acted on when there is something to save.

    A second one ends the process at once; what others put in `received` does not count.
    """
    received = [] if received is None else received
    first = True

    def receive(signum: int, frame: object) -> None:
        nonlocal first
        if not first:
            os._exit(128 + signum)
        first = False
        received.append(signum)

    with _handled(receive):
        yield received


@contextlib.contextmanager
def fatal() -> Iterator[None]:
    """Ends the process, with a line, where one arrives in its block.

    Not by an exception: in the midst of an import of JAX or orbax that may be lost, or end in a crash.
    """

    def receive(signum: int, frame: object) -> None:
        os.write(2, f"note: {STOPPED}\n".encode())
        os._exit(128 + signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises a KeyboardInterrupt, with the signal's number, where one arrives in its block."""

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
