"""Compiling in a fifth of the time (jaxlib 0.10; 0.12: two thirds), for tests that compile for longer than they run.

The code is slower, and rounds differently. Whatever asserts equal bits of two runs, the last digits of a
layer or the instructions of a program compiles as users do.
"""

import contextlib
from functools import partial

import jax
import pytest

from tests.helpers import small
from vmapbn_flax.training import compiler


def _known(option, value):
    """Whether this compiler has the option."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.jit(lambda: 0, compiler_options={option: value})()
        return True
    return False


# The second one generates the code of fused operations by way of MLIR; jaxlib 0.12 knows no other way.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
OPTIONS = {option: value for option, value in OPTIONS.items() if _known(option, value)}

jit = partial(jax.jit, compiler_options=OPTIONS)


@contextlib.contextmanager
def programs():
    """All that `Programs` compile within is compiled in this way, `small.programs` included."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_CPU_OPTIONS", "_UNOPTIMISED"):
            patch.setattr(compiler, name, OPTIONS)
        small.programs.cache_clear()
        yield
        small.programs.cache_clear()
