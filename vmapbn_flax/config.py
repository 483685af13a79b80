"""Checks of a config, before any data loads and before a run resumes; and its way to JSON and back."""

import functools
import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax import networks
from vmapbn_flax.defaults import default_config
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.fields import FIELDS, NETWORK_FIELDS, Field


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
    networks.check_network(config.model)
    types = _types(config.model.name if config.model.name in networks.BUILT_IN else "mlp")
    for name, field in (FIELDS | NETWORK_FIELDS.get(config.model.name, {})).items():
        if not (_has_type(values[name], types.get(name)) and _is_valid(field, values[name], config)):
            expected = field.expected.format_map(config)
            raise UsageError(
                f"config.{name}: got {values[name]!r}, expected {expected}. Change it with --config.{name}=..."
            )


@functools.cache
def _types(network: str) -> dict[str, type]:
    """The types of the defaults."""
    return {name: type(value) for name, value in flat(default_config(network)).items()}


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
    freeze = config.model.freeze_norm_after
    if freeze and round(freeze * steps_per_epoch) == 0:
        raise UsageError(
            f"config.model.freeze_norm_after: got {freeze}, which is before the first step, when norms have no "
            f"statistics; expected 0 or at least a step, {1 / steps_per_epoch:.3g} epochs here. Change it with "
            f"--config.model.freeze_norm_after=..."
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
        before, now = flat(old), flat(config)
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


def flat(config: ConfigDict | dict) -> dict[str, Any]:
    """The fields of `config`, which may be one in JSON, by dotted name.

    Raises:
      ValueError: a field in JSON has a dot in its name.
    """
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if "." in name:  # only in JSON
            raise ValueError(f"a field called {name!r}")
        if isinstance(value, ConfigDict | dict):
            fields |= {f"{name}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def restore_config(config: ConfigDict, saved: Any, source: str) -> ConfigDict:
    """`config` with the values in `saved`, JSON that was read from the file `source`, in a single process.

    The name of a network that is not of this package becomes `networks.untrusted`.

    Raises:
      RunError: `saved` has a field that `config` lacks, or a value of another type.
    """
    try:
        config.lock()  # an unknown field raises
        saved = _tuples(dict(saved))
        sweep = saved.pop("sweep", {})
        if names := sweep.get("model", {}).get("name"):
            sweep["model"]["name"] = tuple(map(networks.untrusted, names))
        with config.sweep.unlocked():  # its fields are those that a sweep names
            config.sweep.update(sweep)
        if "name" in (model := saved.get("model", {})):
            networks.restore_network(config, model)
        config.update(saved)
        config = without_distributed(config)  # no file says which machines to connect to
        if None in flat(config).values():
            raise ValueError("a field is null")
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{source}: got a config that does not fit ({reason}); expected one that a run wrote.") from None
    return config


def _tuples(saved: Any) -> Any:
    """`saved` with tuples in place of JSON's lists."""
    if isinstance(saved, dict):
        return {name: _tuples(value) for name, value in saved.items()}
    return tuple(_tuples(value) for value in saved) if isinstance(saved, list) else saved
