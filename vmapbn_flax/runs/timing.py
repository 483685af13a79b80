"""Where the time of a run goes: clocks, the speed of its loop, and a profile of a few steps."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax

from vmapbn_flax.errors import RunError
from vmapbn_flax.training.compiler import Compiler


class Clock:
    """The time of one block.

    Attributes:
      seconds: set when the block ends.
    """

    seconds = 0.0


class Timing:
    """The seconds of a run.

    Args:
      compiler: of the run's programs.
      started: `time.monotonic()` when the program started.
    """

    def __init__(self, compiler: Compiler, started: float):
        self._compiler, self._started = compiler, started
        self._seconds: dict[str, float] = defaultdict(float)

    def started_up(self) -> None:
        """Counts all time so far, without compiling, as `startup`."""
        self._seconds["startup"] = time.monotonic() - self._started - self._compiler.compile_seconds

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[Clock]:
        """Adds the seconds of its block, without compiling, to `name`."""
        clock, started, compiled = Clock(), time.monotonic(), self._compiler.compile_seconds
        yield clock
        clock.seconds = time.monotonic() - started - (self._compiler.compile_seconds - compiled)
        self._seconds[name] += clock.seconds

    def seconds(self) -> dict[str, float]:
        """The seconds by activity, and their total."""
        seconds = {"compile": self._compiler.compile_seconds, **self._seconds}
        return {**seconds, "total": time.monotonic() - self._started}

    def speed(self, examples: int) -> dict[str, int | float]:
        """The speed of the training loop, which ends now, on so many `examples`; empty without examples.

        The loop's time is the total without startup, compiling, evaluation, checkpoints and profiles. The part of it
        outside the compiled training program is `fraction_outside_device_program`.
        """
        if not examples:
            return {}
        seconds = self.seconds()
        loop = seconds.pop("total") - sum(value for name, value in seconds.items() if name != "train")
        in_program = sum(value for name, value in self._compiler.device_seconds.items() if name.startswith("train"))
        return {
            "examples_per_second": round(examples / loop),
            "fraction_outside_device_program": round(1 - in_program / loop, 4),
        }

    @contextlib.contextmanager
    def profile(self, directory: Path) -> Iterator[None]:
        """Writes a trace of its block into `directory`, for TensorBoard and Perfetto.

        Raises:
          RunError: the trace cannot be written.
        """
        with self._profiler(directory):
            jax.profiler.start_trace(directory)
        try:
            yield
        finally:
            with self._profiler(directory):
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _profiler(self, directory: Path) -> Iterator[None]:
        try:
            with self.clock("profile"):
                yield
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"{directory}: got no profile ({error}); expected to write one there. "
                f"Make room for it, or leave out config.train.profile."
            ) from error
