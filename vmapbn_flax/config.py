"""The table of the config's fields, and the checks that read it: before any data loads, and before a run resumes."""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.defaults import default_config
from vmapbn_flax.errors import RunError, UsageError

_NORMS = ("vmap", "batched", "none")
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


def _devices(expected: str) -> Field:
    return Field(
        f"{expected}, at most {_MOST_DEVICES}", lambda value, config: 0 <= value <= _MOST_DEVICES, resumable=True
    )


def _is_path(path: str, config: ConfigDict) -> bool:
    return b"\0" not in os.fsencode(path)


def _is_ghost_batch(size: int, config: ConfigDict) -> bool:
    divides = config.model.norm != "none" and size >= 2 and config.train.batch_size % size == 0
    return size == 0 or divides


def _are_widths(widths: tuple, config: ConfigDict) -> bool:
    return len(widths) > 0 and all(isinstance(width, int) and 1 <= width <= _WIDEST for width in widths)


# By dotted name, in the order of the checks.
FIELDS = {
    "train.num_epochs": _positive("a positive number; it may be a fraction", traced=np.int32),
    "seed": Field("an integer in [0, 2**32)", lambda value, config: 0 <= value < 2**32, traced=np.uint32),
    "data.name": Field("mnist, idx, npz, folder, or a set of tensorflow-datasets", lambda value, config: bool(value)),
    "data.dir": Field("a directory, or '' for the usual one", _is_path, resumable=True),
    "data.test_fraction": Field("a fraction in [0, 1)", lambda value, config: 0 <= value < 1),
    "data.validation_size": _at_least(0, "a number of examples, 0 for none"),
    "data.memory_limit": _positive("a positive number of gigabytes", resumable=True),
    "model.norm": _one_of(*_NORMS),
    "model.hidden": Field(f"at least one width, each an integer from 1 to {_WIDEST}, such as (100, 100)", _are_widths),
    "model.batch_norm_momentum": _below_one("a decay in [0, 1)"),
    "model.batch_norm_epsilon": _positive("a positive number, such as 1e-5", traced=np.float32),
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
    "sweep_options.mode": _one_of("product", "zip", "random", resumable=True),
    "sweep_options.size": Field(
        f"1 to {MOST_MEMBERS} draws", lambda value, config: 1 <= value <= MOST_MEMBERS, resumable=True
    ),
    "sweep_options.seed": _at_least(0, "an integer of 0 or more", resumable=True),
    "sweep_options.chunk": _at_least(0, "a number of members, 0 for automatic", resumable=True),
    "sweep_options.on_failure": _one_of("continue", "stop", resumable=True),
}


def is_sweep(config: ConfigDict) -> bool:
    """Whether `config` has values to sweep."""
    return "sweep" in config and bool(flat(config.sweep))


def validate(config: ConfigDict) -> None:
    """Checks every field of a run's config that does not need the data.

    Raises:
      UsageError: a value is out of range or contradicts another, a field is missing, or the config is a sweep's.
    """
    if is_sweep(config):
        raise UsageError(
            f"config.sweep: got values of {', '.join(flat(config.sweep))}, expected none for a single run. Only the "
            f"command train takes sweeps. Leave config.sweep empty, or choose the workdir of one member."
        )
    values = flat(config)
    if missing := [name for name in FIELDS if name not in values]:
        raise UsageError(
            f"config.{missing[0]}: got a config without this field, expected every field of "
            f"vmapbn_flax.default_config(). Start from that and change what differs."
        )
    for name, field in FIELDS.items():
        if not (_has_type(values[name], _types().get(name)) and _is_valid(field, values[name], config)):
            expected = field.expected.format_map(config)
            raise UsageError(
                f"config.{name}: got {values[name]!r}, expected {expected}. Change it with --config.{name}=..."
            )


@functools.cache
def _types() -> dict[str, type]:
    """The types of the defaults."""
    return {name: type(value) for name, value in flat(default_config()).items()}


def _has_type(value: Any, expected: type | None) -> bool:
    """Whether `value` has the type that its field `expected`, or could be written for one, as 1 for 1.0."""
    if expected is None or isinstance(value, bool):
        return expected in (None, bool)
    return isinstance(value, (float, int) if expected is float else expected)


def _is_valid(field: Field, value: Any, config: ConfigDict) -> bool:
    try:
        if field.traced is np.float32:
            with np.errstate(over="ignore"):
                value = float(np.float32(value))  # as training sees it
        return field.valid(value, config)
    except (AttributeError, ArithmeticError, TypeError, ValueError):  # no such value
        return False


def validate_sizes(config: ConfigDict, num_train: int) -> None:
    """Checks the fields that depend on the number of training examples.

    Raises:
      UsageError: a batch is larger than the training set, or training would take no step.
    """
    if config.train.batch_size > num_train:
        raise UsageError(
            f"config.train.batch_size: got {config.train.batch_size}, expected at most the {num_train} training "
            f"examples of {config.data.name}. Change it with --config.train.batch_size=..."
        )
    steps_per_epoch = num_train // config.train.batch_size
    if not 0.5 < config.train.num_epochs * steps_per_epoch < 2**31 - 1:
        raise UsageError(
            f"config.train.num_epochs: got {config.train.num_epochs}, expected at least one step, "
            f"{1 / steps_per_epoch:.3g} epochs here, and fewer than 2**31. Change it with --config.train.num_epochs=..."
        )


def without_distributed(config: ConfigDict) -> ConfigDict:
    """A copy of `config` with a single process in `config.distributed`: the number of processes is no part of a run."""
    config = config.copy_and_resolve_references()
    config.distributed.update(coordinator="", num_processes=1, process_id=0)
    return config


def resume_changes(old: dict, config: ConfigDict) -> list[str]:
    """How `config` differs from `old`, the config that a run was made with: one line a field.

    Raises:
      RunError: a field differs that a resume cannot change, or `old` is not a config.
    """
    try:
        before, now = flat(ConfigDict(old)), flat(config)
        changes = {
            name: f"config.{name}: {before.get(name)!r} -> {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        }
        refused = [change for name, change in changes.items() if not _may_change(name, before, now)]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"got a damaged config in the workdir ({error}); expected the config that the run wrote. "
            f"Restore it from a copy, or start afresh in another --workdir."
        ) from None
    if refused:
        raise RunError(
            f"got a config that differs from the one this run was made with ({'; '.join(refused)}); expected "
            f"the same but for a longer train.num_epochs and cadences. Use the old values, or another --workdir."
        )
    return list(changes.values())


def _may_change(name: str, before: dict, now: dict) -> bool:
    if name == "train.num_epochs":
        return now[name] > before.get(name, math.inf)
    return name in FIELDS and FIELDS[name].resumable


def flat(config: ConfigDict) -> dict[str, Any]:
    """The fields of `config` by dotted name."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= {f"{name}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def restore_config(config: ConfigDict, saved: Any, source: str) -> ConfigDict:
    """`config` with the values in `saved`, JSON that was read from the file `source`, in a single process.

    Raises:
      RunError: `saved` has a field that `config` lacks, or a value of another type.
    """
    try:
        config.lock()  # an unknown field raises
        saved = dict(saved)
        with config.sweep.unlocked():  # its fields are those that a sweep names
            config.sweep.update(_tuples(saved.pop("sweep", {})))
        config.update(saved)
        config = without_distributed(config)  # no file says which machines to connect to
        if None in flat(config).values():
            raise ValueError("a field is null")
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{source}: got a config that does not fit ({reason}); expected one that a run wrote.") from None
    return config


def _tuples(saved: Any) -> Any:
    """`saved` with tuples in place of JSON's lists."""
    if isinstance(saved, dict):
        return {name: _tuples(value) for name, value in saved.items()}
    return tuple(_tuples(value) for value in saved) if isinstance(saved, list) else saved
