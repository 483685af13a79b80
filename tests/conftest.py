import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jaxtyping
import pytest
from hypothesis import settings

# What is imported and what JAX traces is not searched for garbage again and again, which made a twentieth of the time.
gc.set_threshold(200_000, 20, 100)

# Before anything imports the package: a signature with a shape is a contract, checked at each call. The hook wraps all
# functions of a module, so only of those with shapes; mypy checks the types of the others.
_PACKAGE = Path(__file__).parents[1] / "vmapbn_flax"
_SHAPED = [path for path in _PACKAGE.rglob("*.py") if "jaxtyping" in path.read_text()]
jaxtyping.install_import_hook(
    [".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts) for path in _SHAPED], "beartype.beartype"
)

# For the tests on many devices; those that name no mesh use one of these, and what the tests start divides its own CPU.
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # before a run under test can ask for another number

# What a process here compiles is for it and for those it starts, most of whose time it takes otherwise; not for the
# user's cache, nor for all of a parallel run: JAX writes an entry in place, where others might read a part of it.
_COMPILED = tempfile.mkdtemp(prefix="vmapbn_flax_compiled_")
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
for _name, _value in (("compilation_cache_dir", _COMPILED), ("persistent_cache_min_compile_time_secs", 0.1)):
    jax.config.update(f"jax_{_name}", _value)
    os.environ[f"JAX_{_name.upper()}"] = str(_value)

# The same examples at every run; a first example pays for a compilation, so none has a deadline.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


collect_ignore = ["helpers/payload.py"]  # its import fails, on purpose

# Half a minute each or more: a worker that began one of these last would keep the others waiting.
LONGEST = (
    "multihost/test_processes.py",
    "runs/test_resume.py",
    "nn/test_batch_norm.py",
    "test_commands.py",
    "training/test_devices.py",
    "faults/test_signals.py",
    "cli/test_cli.py",
    "faults/test_kills.py",
    "nn/test_batch_norm_properties.py",
    "sweeps/test_sweep.py",
    "sweeps/test_halving.py",
)


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish():
    gc.freeze()  # JAX and the other imports are not searched for garbage at all


@pytest.fixture(autouse=True)
def torch_again():
    """The import of torch, which a `train` of an earlier test has forgone in this process; others would be skipped."""
    if sys.modules.get("torch", ...) is None:
        del sys.modules["torch"]


@pytest.fixture
def unchecked():
    """What a user sees, who has no import hook: our own errors in place of jaxtyping's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiled_quickly():
    """All that `Programs` compile; see `tests/helpers/quick.py` for the tests that must not use it."""
    from tests.helpers import quick  # imports the package, after the hook

    with quick.programs():
        yield
