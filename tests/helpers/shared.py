"""Compiling once for many runs and sweeps of one kind, as a sweep does for its groups."""

import contextlib

import pytest

from vmapbn_flax.config import flat
from vmapbn_flax.fields import FIELDS
from vmapbn_flax.runs import train as run
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.training import compiler
from vmapbn_flax.training import programs as programs_module
from vmapbn_flax.training.programs import Programs


class SharedPrograms:
    """Makes `Programs` whose compiled code is that of the first ones for as many configs of the same kind.

    They are those of the call before, with other members, if the data and the length are the same, too: whatever makes
    `Programs` through it makes them one after the other. Those compiled quickly, see the module `quick`, are of another
    kind.
    """

    def __init__(self):
        self.forget()

    def __call__(self, configs, dataset, devices=None):
        fields, shapes = _compiled_fields(configs[0]), _shapes(dataset)
        kind = len(configs), fields, shapes, devices, repr(compiler._CPU_OPTIONS)
        same = kind, id(dataset.train), configs[0].train.num_epochs
        if same not in self._programs:
            with pytest.MonkeyPatch.context() as patch:
                if kind in self._compilers:
                    patch.setattr(programs_module, "Compiler", lambda: self._compilers[kind])
                programs = Programs(configs, dataset, devices)
            self._compilers[kind] = programs.compiler
            self._programs[same] = programs, dataset  # which lives as long as its id is in a key
        programs, _ = self._programs[same]
        programs.set_members(configs)
        return programs

    def forget(self):
        """Has the next ones compile."""
        self._compilers, self._programs = {}, {}


def _compiled_fields(config):
    """What of a config may be compiled in: not what programs take as an argument, and not what Python alone reads."""

    def is_compiled(name):
        is_argument = name in FIELDS and FIELDS[name].traced is not None
        by_python = ("sweep_options.", "train.log_every", "train.eval_every", "data.name", "data.dir")
        return not is_argument and not name.startswith(by_python)

    return repr(sorted((name, value) for name, value in flat(config).items() if is_compiled(name)))


def _shapes(dataset):
    splits = (dataset.train, dataset.validation, dataset.test)
    sizes = [(len(split), split.image_shape) for split in splits if split is not None]
    return dataset.streamed, dataset.num_classes, *sizes


@contextlib.contextmanager
def programs():
    """Within, runs and sweeps make shared `Programs`."""
    shared = SharedPrograms()
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, sweep):
            patch.setattr(module, "Programs", shared)
        yield shared
