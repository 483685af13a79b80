import os

import jax
import jaxtyping
import pytest
from hypothesis import settings

# Before anything imports the package: every annotated signature is a shape contract, checked at each call.
jaxtyping.install_import_hook("vmapbn_flax", "beartype.beartype")

# Nothing is kept in the user's cache directory, neither by these processes nor by those they start.
jax.config.update("jax_compilation_cache_dir", "")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# The same examples at every run; a first example pays for a compilation, so none has a deadline.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def unchecked():
    """What a user sees, who has no import hook: our own errors in place of jaxtyping's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Compiles a program once that many tests run: nearly all of their time otherwise."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", "")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
