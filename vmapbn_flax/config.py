"""Checks of a whole config before any data loads, and of a changed one before a run resumes."""

import math
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.errors import RunError, UsageError

_NORMS = ("vmap", "batched", "none")
_OPTIMIZERS = ("adam", "adamw", "sgd")
_SCHEDULES = ("cosine", "constant")
_SWEEP_MODES = ("product", "zip", "random")
_ON_FAILURE = ("continue", "stop")
_WIDEST = 2**16  # units: between two layers of that many lie 17 GB of weights

# What a resumed run may say differently: how often it reports, what it runs on, where its data lies, and a later end.
_MAY_CHANGE = (
    "mesh.data",
    "mesh.member",
    "mesh.cpu_devices",
    "mesh.replicate_limit",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "sweep_options.mode",
    "sweep_options.size",
    "sweep_options.seed",
    "sweep_options.chunk",
    "sweep_options.on_failure",
    "data.dir",
    "data.memory_limit",
    "train.log_every",
    "train.eval_every",
    "train.eval_batch_size",
    "train.max_skipped_steps",
    "train.profile",
)


def is_sweep(config: ConfigDict) -> bool:
    """Whether `config` has values to sweep."""
    return "sweep" in config and bool(flat(config.sweep))


def validate(config: ConfigDict) -> None:
    """Checks every field of a run's config that does not need the data.

    Raises:
      UsageError: a value is out of range, two do not go together, a field is missing, or it is a sweep.
    """
    if is_sweep(config):
        raise UsageError(
            f"config.sweep: got values of {', '.join(flat(config.sweep))}, expected none for a single run. Only "
            f"python train.py takes sweeps; each member of one is a run in a workdir of its own."
        )
    try:
        checks = _checks(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"config: got one with a field that is missing or of another type ({error}); expected every field of "
            f"configs/default.py. Start from default.get_config() and change what differs."
        ) from None
    for name, valid, expected in checks:
        if not valid:
            raise UsageError(
                f"config.{name}: got {_get(config, name)!r}, expected {expected}. Change it with --config.{name}=..."
            )


def _checks(config: ConfigDict) -> list[tuple[str, bool, str]]:
    """Names of fields, whether they are valid, and what would be."""
    model, optimizer, train, sweep = config.model, config.optimizer, config.train, config.sweep_options
    distributed, norm = config.distributed, model.norm != "none"
    return [
        ("train.num_epochs", 0 < train.num_epochs < math.inf, "a positive number; it may be a fraction"),
        ("seed", 0 <= config.seed < 2**32, "an integer in [0, 2**32)"),
        ("data.name", bool(config.data.name), "the name of a data set, such as mnist"),
        ("data.validation_size", config.data.validation_size >= 0, "a number of examples, 0 for none"),
        ("data.memory_limit", 0 < config.data.memory_limit < math.inf, "a positive number of gigabytes"),
        ("model.norm", model.norm in _NORMS, f"one of {', '.join(_NORMS)}"),
        (
            "model.hidden",
            len(model.hidden) > 0 and all(isinstance(width, int) and 1 <= width <= _WIDEST for width in model.hidden),
            f"at least one width, each an integer from 1 to {_WIDEST}, such as (100, 100)",
        ),
        ("model.batch_norm_momentum", 0 <= _single(model.batch_norm_momentum) < 1, "a decay in [0, 1)"),
        (
            "model.batch_norm_epsilon",
            0 < _single(model.batch_norm_epsilon) < math.inf,
            "a positive number, such as 1e-5",
        ),
        (
            "model.ghost_batch_size",
            model.ghost_batch_size == 0
            or (norm and model.ghost_batch_size >= 2 and train.batch_size % model.ghost_batch_size == 0),
            f"0, or with a norm a divisor of train.batch_size={train.batch_size} of 2 or more",
        ),
        ("optimizer.name", optimizer.name in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}"),
        (
            "optimizer.learning_rate",
            0 < _single(optimizer.learning_rate) < math.inf,
            "a positive number, such as 1e-3",
        ),
        ("optimizer.schedule", optimizer.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
        (
            "optimizer.warmup_epochs",
            0 <= optimizer.warmup_epochs <= train.num_epochs,
            f"between 0 and train.num_epochs={train.num_epochs}",
        ),
        ("optimizer.weight_decay", 0 <= _single(optimizer.weight_decay) < math.inf, "0 or a positive number"),
        ("optimizer.adam_b1", 0 <= _single(optimizer.adam_b1) < 1, "a decay in [0, 1)"),
        ("optimizer.adam_b2", 0 <= _single(optimizer.adam_b2) < 1, "a decay in [0, 1)"),
        ("optimizer.sgd_momentum", 0 <= _single(optimizer.sgd_momentum) < 1, "a decay in [0, 1)"),
        (
            "train.batch_size",
            train.batch_size >= (2 if norm else 1),
            "2 or more examples, for batch norm to have a variance" if norm else "1 or more examples",
        ),
        ("train.label_smoothing", 0 <= _single(train.label_smoothing) < 1, "a probability in [0, 1)"),
        ("train.log_every", train.log_every >= 1, "1 or more steps"),
        ("train.eval_every", 0 < train.eval_every < math.inf, "a positive number of epochs"),
        ("train.eval_batch_size", 1 <= train.eval_batch_size < 2**31, "1 or more examples"),
        ("train.max_skipped_steps", 1 <= train.max_skipped_steps < 2**31, "1 or more steps"),
        ("train.profile", isinstance(train.profile, bool), "True or False"),
        ("mesh.data", config.mesh.data >= 0, "a number of devices, 0 for automatic"),
        ("mesh.member", config.mesh.member >= 0, "a number of devices, 0 for all"),
        ("mesh.cpu_devices", config.mesh.cpu_devices >= 0, "a number of devices, 0 for automatic"),
        ("mesh.replicate_limit", config.mesh.replicate_limit >= 0, "a number of bytes, 0 to divide any data set"),
        (
            "distributed.coordinator",
            re.fullmatch(r"|slurm|.+:\d+", distributed.coordinator) is not None,
            "'host:port' of process 0, 'slurm', or '' for one process",
        ),
        (
            "distributed.num_processes",
            distributed.num_processes >= 1 and (distributed.num_processes == 1 or ":" in distributed.coordinator),
            "1, or with a 'host:port' as distributed.coordinator a number of processes",
        ),
        (
            "distributed.process_id",
            0 <= distributed.process_id < distributed.num_processes,
            f"an integer in [0, distributed.num_processes={distributed.num_processes})",
        ),
        ("sweep_options.mode", sweep.mode in _SWEEP_MODES, f"one of {', '.join(_SWEEP_MODES)}"),
        ("sweep_options.size", sweep.size >= 1, "1 or more draws"),
        ("sweep_options.seed", sweep.seed >= 0, "an integer of 0 or more"),
        ("sweep_options.chunk", sweep.chunk >= 0, "a number of members, 0 for automatic"),
        ("sweep_options.on_failure", sweep.on_failure in _ON_FAILURE, f"one of {', '.join(_ON_FAILURE)}"),
    ]


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


def of_one_process(config: ConfigDict) -> ConfigDict:
    """A copy of `config` without the processes of `config.distributed`: how it is run is not what is run."""
    config = config.copy_and_resolve_references()
    config.distributed.update(coordinator="", num_processes=1, process_id=0)
    return config


def resume_changes(old: dict, config: ConfigDict) -> list[str]:
    """How `config` differs from the one a run was made with, `old`, a line each.

    Raises:
      RunError: it differs in something that a run cannot change on the way.
    """
    try:
        before, now = flat(ConfigDict(old)), flat(config)
        changes = {
            name: f"config.{name}: {before.get(name)!r} -> {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        }
        refused = [change for name, change in changes.items() if not _may_change(name, before, now)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"got what is not a config where the run keeps its own ({error}); expected what the run wrote there. "
            f"Put it back from a copy, or start afresh in another --workdir."
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
    return name in _MAY_CHANGE


def flat(config: ConfigDict) -> dict[str, Any]:
    """Every field by its dotted name."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= {f"{name}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def restore_config(config: ConfigDict, saved: Any, source: str) -> ConfigDict:
    """`config` with every value that the JSON `saved`, read from `source`, holds.

    Raises:
      RunError: `saved` has a field that `config` lacks, or one of another type.
    """
    try:
        config.lock()  # against fields that it lacks
        saved = dict(saved)
        with config.sweep.unlocked():  # which has those that a sweep gives it
            config.sweep.update(_tuples(saved.pop("sweep", {})))
        config.update(saved)
        if None in flat(config).values():
            raise ValueError("a field is null")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{source}: got a config that does not fit ({reason}); expected one a run wrote.") from None
    return config


def _tuples(saved: Any) -> Any:
    """What JSON made lists of, as the tuples that they were."""
    if isinstance(saved, dict):
        return {name: _tuples(value) for name, value in saved.items()}
    return tuple(_tuples(value) for value in saved) if isinstance(saved, list) else saved


def _single(number: float) -> float:
    """`number` as training sees it, rounded to a float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def _get(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
