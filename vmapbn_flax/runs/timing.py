"""Where the time of a run goes: clocks, its speed, and a profile of a few of its steps."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax

from vmapbn_flax.errors import RunError
from vmapbn_flax.training.compiler import Compiler


class Clock:
    """What one block took.

    Attributes:
      seconds: set when it ends.
    """

    seconds = 0.0


class Timing:
    """The seconds of a run of what `compiler` compiles, whose program started at `time.monotonic() == started`."""

    def __init__(self, compiler: Compiler, started: float):
        self._compiler, self._started = compiler, started
        self._seconds: dict[str, float] = defaultdict(float)

    def started_up(self) -> None:
        """Says that all so far, but for compiling, was `startup`."""
        self._seconds["startup"] = time.monotonic() - self._started - self._compiler.compile_seconds

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[Clock]:
        """Adds the seconds of its block to `name`, without those spent compiling."""
        clock, started, compiled = Clock(), time.monotonic(), self._compiler.compile_seconds
        yield clock
        clock.seconds = time.monotonic() - started - (self._compiler.compile_seconds - compiled)
        self._seconds[name] += clock.seconds

    def seconds(self) -> dict[str, float]:
        """How long each thing took."""
        seconds = {"compile": self._compiler.compile_seconds, **self._seconds}
        return {**seconds, "total": time.monotonic() - self._started}

    def speed(self, examples: int) -> dict[str, int | float]:
        """How fast the training loop, which ends now, went through `examples`; nothing if there were none.

        The loop's time is all that was not spent starting, compiling, evaluating, saving or writing a profile. What
        of it was not spent in calls of the compiled training step is `fraction_outside_device_program`.
        """
        if not examples:
            return {}
        seconds = self.seconds()
        loop = seconds.pop("total") - sum(value for name, value in seconds.items() if name != "train")
        return {
            "examples_per_second": round(examples / loop),
            "fraction_outside_device_program": round(1 - self._compiler.device_seconds["train"] / loop, 4),
        }

    @contextlib.contextmanager
    def profile(self, directory: Path) -> Iterator[None]:
        """Writes a trace of its block into `directory`, for TensorBoard and Perfetto.

        Raises:
          RunError: it cannot be written.
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
