"""Compiling once for many runs and sweeps of one kind, as a sweep does for its groups."""

import contextlib

import pytest

from vmapbn_flax.runs import train as run
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.sweeps.expand import program_key
from vmapbn_flax.training import compiler
from vmapbn_flax.training.programs import Programs


class SharedPrograms:
    """Makes `Programs` whose compiled code is that of the first ones for as many configs of the same kind.

    Those compiled quickly, see the module `quick`, are others.
    """

    def __init__(self):
        self._made = {}

    def __call__(self, configs, dataset, devices=None):
        key = len(configs), program_key(configs[0]), id(dataset.train), devices, repr(compiler._CPU_OPTIONS)
        if key not in self._made:
            self._made[key] = Programs(configs, dataset, devices), dataset  # which lives as long as its id is a key
        return self._made[key][0].with_members(configs)

    def forget(self):
        """Has the next ones compile."""
        self._made.clear()


@contextlib.contextmanager
def programs():
    """Within, runs and sweeps make shared `Programs`."""
    shared = SharedPrograms()
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, sweep):
            patch.setattr(module, "Programs", shared)
        yield shared
