import os

import jaxtyping
import pytest
from hypothesis import settings

# Before anything imports the package: every annotated signature is a shape contract, checked at each call.
jaxtyping.install_import_hook("vmapbn_flax", "beartype.beartype")

# Each test compiles for itself, and so do the commands that it runs.
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
