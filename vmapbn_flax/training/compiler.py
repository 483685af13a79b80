"""Compiling each program once, ahead of its first call where there is time, and timing compilation and calls."""

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

# In this order: fewer copies of the optimizer's moments in the loop; whole vectors where there is AVX-512; code of the
# compiler's own for reductions and products, in place of a library's. docs/speed.md has the gains.
_CPU_OPTIONS = {
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_experimental_ynn_fusion_type": "",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, and how.

    Attributes:
      name: of the compiled program; programs of one name are compiled once.
      donate: the positions of the arguments whose buffers a call uses up.
      sharding: of the results on the devices; None is the default device.
      optimise: False saves compilation time, for a program that hardly runs.
      trace_in_thread: whether `Compiler.start` also traces in a thread. Tracing holds the interpreter's lock, so that a
        thread would only delay a program that something waits for.
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
      compile_seconds: the time spent waiting for compilation.
      device_seconds: the time spent in calls of each program, by name.
    """

    def __init__(self):
        self._programs: dict[str, Future] = {}
        self._threads = ThreadPoolExecutor(2)
        self.reset_clocks()

    def reset_clocks(self) -> None:
        self.compile_seconds = 0.0
        self.device_seconds: dict[str, float] = defaultdict(float)

    def __contains__(self, name: str) -> bool:
        return name in self._programs

    def __getitem__(self, name: str) -> Compiled:
        return self._programs[name].result()

    def call(self, program: Program, *arguments: Any) -> Any:
        """The result of `program`, on the devices; returns when it is computed."""
        compiled = self._programs.get(program.name)
        if compiled is None or not compiled.done():
            started = time.monotonic()
            compiled = compiled or self.start(program, arguments)
            compiled.exception()  # waits
            self.compile_seconds += time.monotonic() - started
        started = time.monotonic()
        # Blocks, for three reasons. (1) Programs that run at once can wait for one another's collectives for ever.
        # (2) Out of memory hangs where the second of two programs runs out. (3) A window of streamed data must be freed
        # when its steps are done, not when they are queued.
        result = jax.block_until_ready(compiled.result()(*arguments))
        self.device_seconds[program.name] += time.monotonic() - started
        return result

    def start(self, program: Program, arguments: Sequence[Any]) -> Future:
        """Compiles `program` in a thread, for arguments of these shapes and shardings."""
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
        return lowered.compile()  # this compiler lacks one of the options
