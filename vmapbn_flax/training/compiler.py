"""Programs compiled once, ahead of the first call where there is time, and how long that and their calls take."""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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


class Compiler:
    """Compiles functions, whose results lie as `sharding` says, when they are first called, or ahead of that.

    Attributes:
      compile_seconds: how long was waited for compilation in all.
      device_seconds: how long each program ran, by name.
    """

    def __init__(self, sharding: NamedSharding | None):
        self._sharding = sharding
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

    def call(
        self,
        name: str,
        function: Callable,
        *arguments: Any,
        donate: Sequence[int] = (),
        once: bool = False,
        here: bool = False,
    ) -> Any:
        """Calls `function`, compiled under `name`.

        Args:
          donate: which of the arguments it uses up.
          once: spares the optimising of what hardly runs.
          here: the result need not lie as `sharding` says, and no other process makes the same call.
        """
        program = self._programs.get(name)
        if program is None or not program.done():
            started = time.monotonic()
            program = program or self.start(name, function, arguments, donate, once, here)
            program.exception()  # waits
            self.compile_seconds += time.monotonic() - started
        started = time.monotonic()
        # Several programs under way at once can wait for one another's collectives for ever; a lack of memory that a
        # second program is the first to meet hangs; and a window of streamed data is let go once it was trained on.
        result = jax.block_until_ready(program.result()(*arguments))
        self.device_seconds[name] += time.monotonic() - started
        return result

    def start(
        self,
        name: str,
        function: Callable,
        arguments: Sequence[Any],
        donate: Sequence[int] = (),
        once: bool = False,
        here: bool = False,
        trace_too: bool = False,
    ) -> Future:
        """Traces `function` and hands it to a thread, or with `trace_too` has that trace it; see `call`."""
        out = None if here else self._sharding
        options = _UNOPTIMISED if once else _CPU_OPTIONS
        lower = partial(jax.jit(function, donate_argnums=donate, out_shardings=out).lower, *arguments)
        # Tracing holds the interpreter: while something waits for a program, two at a time only hold it up.
        lowered = None if trace_too else lower()
        self._programs[name] = self._threads.submit(lambda: _compile(lowered or lower(), options))
        return self._programs[name]


def _compile(lowered: Lowered, cpu_options: Mapping[str, Any]) -> Compiled:
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(cpu_options)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        return lowered.compile()  # a compiler that no longer has one of them
