"""The table of the config's fields: their valid values, and what may change or be traced."""

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.networks import NORMS

_WIDEST = 2**16  # units; the weights between two such layers take 17 GB
_MOST_DEVICES = 2**12  # that a CPU is divided into; each has threads of its own
MOST_MEMBERS = 10_000  # of a sweep


class Field(NamedTuple):
    """The rules for one field of the config; its default is in `defaults.py`.

    Attributes:
      expected: the valid values in words; `{train.batch_size}` stands for the value of that field.
      valid: `valid(value, config)` says whether a value of the default's type is valid; a traced float arrives rounded
        to float32.
      resumable: whether a resume may change the field: it sets how often a run reports, where it runs, or where its
        data lies.
      traced: the type of the field as an argument of compiled programs, where epochs arrive as steps; None if a
        program is compiled for its value.
    """

    expected: str
    valid: Callable[[Any, ConfigDict], bool] = lambda value, config: True
    resumable: bool = False
    traced: type[np.number] | None = None


def _one_of(*choices: str, **more: Any) -> Field:
    return Field(f"one of {', '.join(choices)}", lambda value, config: value in choices, **more)


def _at_least(least: int, expected: str, **more: Any) -> Field:
    return Field(f"{expected}, below 2**63", lambda value, config: least <= value < 2**63, **more)


def _positive(expected: str, **more: Any) -> Field:
    return Field(expected, lambda value, config: 0 < value < math.inf, **more)


def _count(unit: str, **more: Any) -> Field:
    return Field(f"1 or more {unit}", lambda value, config: 1 <= value < 2**31, **more)


def _below_one(expected: str) -> Field:
    return Field(expected, lambda value, config: 0 <= value < 1, traced=np.float32)


def _epochs() -> Field:
    return Field("0 or more epochs", lambda value, config: 0 <= value < math.inf, traced=np.int32)


def _devices(expected: str) -> Field:
    return Field(
        f"{expected}, at most {_MOST_DEVICES}", lambda value, config: 0 <= value <= _MOST_DEVICES, resumable=True
    )


def _is_path(path: str, config: ConfigDict) -> bool:
    return b"\0" not in os.fsencode(path)


def _is_ghost_batch(size: int, config: ConfigDict) -> bool:
    divides = config.model.norm != "none" and size >= 2 and config.train.batch_size % size == 0
    return size == 0 or divides


def _is_before_the_end(epochs: float, config: ConfigDict) -> bool:
    return epochs == 0 or (0 < epochs < config.train.num_epochs and config.model.norm != "none")


def _is_rung(epochs: float, config: ConfigDict) -> bool:
    if not config.sweep_options.halving:
        return 0 < epochs < math.inf
    evaluations = epochs / config.train.eval_every
    multiple = evaluations > 0.5 and abs(evaluations - round(evaluations)) < 1e-6
    return multiple and epochs < config.train.num_epochs


def _are_widths(widths: tuple, config: ConfigDict) -> bool:
    return len(widths) > 0 and all(isinstance(width, int) and 1 <= width <= _WIDEST for width in widths)


def _are_augmentations(names: tuple | list, config: ConfigDict) -> bool:
    return not isinstance(names, str) and all(re.fullmatch(r"flip|(shift|cutout):[1-9]\d{0,3}", name) for name in names)


def _are_watched(names: tuple | list, config: ConfigDict) -> bool:
    return not isinstance(names, str) and all(re.fullmatch(r"[^\[\]]+(\[\d{1,9}\])?", name) for name in names)


def _widths() -> Field:
    return Field(f"at least one number, each an integer from 1 to {_WIDEST}, such as (100, 100)", _are_widths)


# By dotted name, in the order of the checks.
FIELDS = {
    "train.num_epochs": _positive("a positive number; it may be a fraction", traced=np.int32),
    "seed": Field("an integer in [0, 2**32)", lambda value, config: 0 <= value < 2**32, traced=np.uint32),
    "data.name": Field("mnist, idx, npz, folder, or a set of tensorflow-datasets", lambda value, config: bool(value)),
    "data.dir": Field("a directory, or '' for the usual one", _is_path, resumable=True),
    "data.test_fraction": Field("a fraction in [0, 1)", lambda value, config: 0 <= value < 1),
    "data.validation_size": _at_least(0, "a number of examples, 0 for none"),
    "data.memory_limit": _positive("a positive number of gigabytes", resumable=True),
    "data.threshold": Field("a brightness in [0, 1], 0 for none", lambda value, config: 0 <= value <= 1),
    "data.augment": Field(
        "a tuple of 'shift:N', 'flip' and 'cutout:N', such as ('shift:2', 'flip')", _are_augmentations
    ),
    "model.name": Field("mlp, or package.module:Class"),  # `networks.check_network` looks closer
    "model.norm": _one_of(*NORMS, *NORMS.values(), "none"),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.batch_norm_momentum": _below_one("a decay in [0, 1)"),
    "model.batch_norm_epsilon": _positive("a positive number, such as 1e-5", traced=np.float32),
    "model.renorm_r_max": Field("a limit of 1 or more", lambda value, config: 1 <= value < math.inf, traced=np.float32),
    "model.renorm_d_max": Field("a limit of 0 or more", lambda value, config: 0 <= value < math.inf, traced=np.float32),
    "model.renorm_warmup_epochs": _epochs(),
    "model.renorm_full_epochs": _epochs(),
    "model.freeze_norm_after": Field(
        "0, or with a norm a number of epochs below train.num_epochs={train.num_epochs}", _is_before_the_end
    ),
    "model.ghost_batch_size": Field(
        "0, or with a norm a divisor of train.batch_size={train.batch_size} of 2 or more", _is_ghost_batch
    ),
    "optimizer.name": _one_of("adam", "adamw", "sgd"),
    "optimizer.learning_rate": _positive("a positive number, such as 1e-3", traced=np.float32),
    "optimizer.schedule": _one_of("cosine", "constant"),
    "optimizer.warmup_epochs": Field(
        "between 0 and train.num_epochs={train.num_epochs}",
        lambda value, config: 0 <= value <= config.train.num_epochs,
        traced=np.int32,
    ),
    "optimizer.weight_decay": Field(
        "0 or a positive number", lambda value, config: 0 <= value < math.inf, traced=np.float32
    ),
    "optimizer.adam_b1": _below_one("a decay in [0, 1)"),
    "optimizer.adam_b2": _below_one("a decay in [0, 1)"),
    "optimizer.sgd_momentum": _below_one("a decay in [0, 1)"),
    "train.batch_size": Field(
        "2 or more examples, for batch norm to have a variance; without a norm 1 or more",
        lambda value, config: value >= (1 if config.model.norm == "none" else 2),
    ),
    "train.label_smoothing": _below_one("a probability in [0, 1)"),
    "train.log_every": _at_least(1, "1 or more steps", resumable=True),
    "train.eval_every": _positive("a positive number of epochs", resumable=True),
    "train.eval_batch_size": _count("examples", resumable=True),
    "train.watch": Field(
        "a tuple of names of layers, with [N] for a unit, such as ('dense_0', 'norm_2[5]')",
        _are_watched,
        resumable=True,
    ),
    "train.max_skipped_steps": _count("steps", resumable=True),
    "train.profile": Field("True or False", lambda value, config: isinstance(value, bool), resumable=True),
    "mesh.data": _devices("a number of devices, 0 for automatic"),
    "mesh.member": _devices("a number of devices, 0 for all"),
    "mesh.cpu_devices": _devices("a number of devices, 0 for automatic"),
    "mesh.replicate_limit": _at_least(0, "a number of bytes, 0 to divide any data set", resumable=True),
    "distributed.coordinator": Field(
        "'host:port' of process 0, 'slurm', or '' for one process",
        lambda value, config: re.fullmatch(r"|slurm|.+:\d+", value) is not None,
        resumable=True,
    ),
    "distributed.num_processes": Field(
        "1, or with a 'host:port' as distributed.coordinator a number of processes",
        lambda value, config: value == 1 or (value > 1 and ":" in config.distributed.coordinator),
        resumable=True,
    ),
    "distributed.process_id": Field(
        "an integer in [0, distributed.num_processes={distributed.num_processes})",
        lambda value, config: 0 <= value < config.distributed.num_processes,
        resumable=True,
    ),
    "sweep_options.mode": _one_of("product", "zip", "random", "optuna", resumable=True),
    "sweep_options.size": Field(
        f"1 to {MOST_MEMBERS} members", lambda value, config: 1 <= value <= MOST_MEMBERS, resumable=True
    ),
    "sweep_options.batch": _count("members", resumable=True),
    "sweep_options.seed": _at_least(0, "an integer of 0 or more", resumable=True),
    "sweep_options.chunk": _at_least(0, "a number of members, 0 for automatic", resumable=True),
    "sweep_options.on_failure": _one_of("continue", "stop", resumable=True),
    "sweep_options.halving": Field(
        "0 for no rungs, or a factor of 2 or more", lambda value, config: value == 0 or 2 <= value < 2**31
    ),
    "sweep_options.first_rung": Field(
        "a positive number of epochs; with sweep_options.halving a multiple of train.eval_every={train.eval_every} "
        "that is below train.num_epochs={train.num_epochs}",
        _is_rung,
    ),
}

# The attributes of the networks of this package, by the network's name.
NETWORK_FIELDS = {
    "mlp": {
        "model.hidden": _widths(),
        "model.kernel_std": Field("a standard deviation, or 0", lambda value, config: 0 <= value < math.inf),
    },
    "conv": {"model.features": _widths()},
    "resnet": {
        "model.blocks": _widths(),
        "model.width": _count("channels"),
        "model.bottleneck": Field("True or False"),
        "model.imagenet": Field("True or False"),
        "model.zero_scale": Field(
            "True or False, with model.norm=none False", lambda value, config: not value or config.model.norm != "none"
        ),
    },
}
