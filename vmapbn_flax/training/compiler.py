"""Programs compiled once, ahead of the first call where there is time, and how long that and their calls take."""

import copy
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.stages import Compiled, Lowered

# Compiles the initialisation in a fifth of the time.
_UNOPTIMISED = {"xla_backend_optimization_level": 0}

# Fewer copies of the optimizer's moments in the loop, whole vectors where there is AVX-512, and the compiler's own code
# for reductions and products instead of a library's; docs/speed.md has what that is worth.
_CPU_OPTIONS = {
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_experimental_ynn_fusion_type": "",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, and how.

    Attributes:
      name: of the compiled program; those of one name are compiled once.
      donate: the positions of the arguments that a call uses up.
      sharding: how the results lie on the devices; None is the default device.
      optimise: False saves compiling time where the program hardly runs.
      trace_in_thread: whether `Compiler.start` leaves the tracing to a thread, too. Tracing holds the interpreter:
        while something waits for a program, two at a time only delay it.
    """

    name: str
    function: Callable
    donate: tuple[int, ...] = ()
    sharding: NamedSharding | None = None
    optimise: bool = True
    trace_in_thread: bool = False


class Compiler:
    """Compiles programs when they are first called, or ahead of that.

    Attributes:
      compile_seconds: how long was waited for compilation in all.
      device_seconds: how long each program ran, by name.
    """

    def __init__(self):
        self._programs: dict[str, Future] = {}
        self._threads = ThreadPoolExecutor(2)
        self._reset()

    def _reset(self) -> None:
        self.compile_seconds = 0.0
        self.device_seconds: dict[str, float] = defaultdict(float)

    def with_clocks_at_zero(self) -> "Compiler":
        """One with the same programs."""
        other = copy.copy(self)
        other._reset()
        return other

    def __contains__(self, name: str) -> bool:
        return name in self._programs

    def __getitem__(self, name: str) -> Compiled:
        return self._programs[name].result()

    def call(self, program: Program, *arguments: Any) -> Any:
        """The result of `program`, which is on the devices when this returns."""
        compiled = self._programs.get(program.name)
        if compiled is None or not compiled.done():
            started = time.monotonic()
            compiled = compiled or self.start(program, arguments)
            compiled.exception()  # waits
            self.compile_seconds += time.monotonic() - started
        started = time.monotonic()
        # Several programs under way at once can wait for one another's collectives for ever; a lack of memory that a
        # second program is the first to meet hangs; and a window of streamed data is let go once it was trained on.
        result = jax.block_until_ready(compiled.result()(*arguments))
        self.device_seconds[program.name] += time.monotonic() - started
        return result

    def start(self, program: Program, arguments: Sequence[Any]) -> Future:
        """Has a thread compile `program` for arguments of these shapes and shardings."""
        function = jax.jit(program.function, donate_argnums=program.donate, out_shardings=program.sharding)
        lower = partial(function.lower, *arguments)
        lowered = None if program.trace_in_thread else lower()
        options = _CPU_OPTIONS if program.optimise else _UNOPTIMISED
        self._programs[program.name] = self._threads.submit(lambda: _compile(lowered or lower(), options))
        return self._programs[program.name]


def _compile(lowered: Lowered, cpu_options: dict[str, Any]) -> Compiled:
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(cpu_options)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        return lowered.compile()  # a compiler that no longer has one of them
