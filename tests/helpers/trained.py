"""Runs as training leaves them, written without training: to load, and to predict with."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import quick, small
from vmapbn_flax.data import Dataset, Split
from vmapbn_flax.networks import choose_network
from vmapbn_flax.runs.checkpoints import Checkpoints
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs

NAMES = ("cat", "dog", "eel", "fox")


def in_colour(split):
    return Split(np.repeat(split.images[..., None], 3, axis=-1), split.labels)


def dataset(*, colour=False, validation_size=0):
    found = small.dataset(validation_size)
    train, test = map(in_colour, (found.train, found.test)) if colour else (found.train, found.test)
    return Dataset("small", small.CLASSES, train, test, found.validation, class_names=NAMES)


def write(path, config, data, steps=(1,)):
    """A run in the workdir `path`, as training leaves it, of weights that differ from step to step."""
    workdir, programs = Workdir(path), Programs([config], data)
    workdir.write(workdir.config, config.to_dict())
    with quick.programs(), contextlib.closing(Checkpoints(workdir.checkpoints)) as checkpoints:
        created, rows = programs.create(), []
        for step in steps:
            rng = np.random.default_rng(step)

            def moved(leaf, rng=rng):  # statistics too, whose variances stay positive
                return leaf + rng.uniform(0, 0.5, leaf.shape).astype(leaf.dtype)

            params, batch_stats = (jax.tree.map(moved, tree) for tree in (created.params, created.batch_stats))
            state = created.replace(step=jnp.int32(step), params=params, batch_stats=batch_stats)
            rows += [{"step": step, "train_loss": 1.0}, {"step": step, **programs.evaluate(state)}]
            workdir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
            meta = {"data": programs.described, "runs": [{"name": "", "config": config.to_dict(), "rows": len(rows)}]}
            checkpoints.save(step, programs.snapshot(state), meta, best_steps=steps)
    return path


def conv(**changes):
    config = small.config()
    choose_network(config.unlock(), "conv")
    config.model.features = (3,)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config
