"""A sweep's config expanded to members, and the members divided into groups that train together."""

import difflib
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vmapbn_flax.config import flat, restore_config, validate, without_distributed
from vmapbn_flax.defaults import default_config
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.fields import FIELDS, MOST_MEMBERS
from vmapbn_flax.networks import choose_network, displayed
from vmapbn_flax.runs.workdir import Workdir

_DISTRIBUTIONS = ("uniform", "log_uniform")
_LARGEST = 1e300  # number; the difference of two bounds is one, too
_LONGEST_NAME = 200  # characters; file systems end at 255
_DIGITS = range(4, 18)  # of a drawn number in a name, the fewest that do; 17 tell all numbers apart


class Member(NamedTuple):
    """One run of a sweep."""

    name: str  # its values, as `learning_rate=0.003,seed=1`; also the name of its workdir
    config: ConfigDict  # of a run, without a sweep
    values: dict[str, Any]  # of the swept fields, by their dotted names


def expand(config: ConfigDict) -> list[Member]:
    """The members of the sweep that `config` describes, in a fixed order.

    Raises:
      UsageError: a swept field does not exist, its values cannot be used, or two members are the same.
    """
    base = config.copy_and_resolve_references()
    with base.unlocked():
        base.sweep = ConfigDict()
    fields = flat(base)
    sweep = {name: _values(name, values, fields) for name, values in flat(config.sweep).items()}
    if not sweep:
        raise UsageError(
            "config.sweep: got nothing to sweep, expected at least one field, as in config.sweep.seed = (0, 1)"
        )
    validate(base)
    if base.sweep_options.halving and "train.num_epochs" in sweep:
        raise UsageError(
            "config.sweep.train.num_epochs: got values of it with sweep_options.halving, expected none: after as many "
            "epochs, members of different lengths cannot be compared. Sweep them without halving."
        )
    base = without_distributed(base)
    labels = _labels(sweep)
    members: list[Member] = []
    taken: set[str] = set()
    for values in _COMBINE[base.sweep_options.mode](sweep, fields, base.sweep_options):
        values = {name: _typed(name, value, fields[name]) for name, value in values.items()}
        member_config = _with(base, values)
        if "model.name" in values:
            values["model.name"] = displayed(values["model.name"])
        for digits in _DIGITS:  # later members yield: more draws leave the names of the first ones as they are
            spelled = {field: _spell(value, sweep[field], digits) for field, value in values.items()}
            name = ",".join(f"{labels[field]}={text}" for field, text in spelled.items())
            if name not in taken:
                break
        taken.add(name)
        members.append(Member(name, member_config, values))
        try:
            validate(members[-1].config)
        except UsageError as error:
            raise UsageError(f"config.sweep, member {name}: {error}") from None
        member_config.sweep_options.halving = 0  # a run alone has no rungs
    _check(members)
    return members


def read_members(workdir: Workdir) -> list[Member]:
    """The members of the sweep whose config is saved in `workdir`.

    Raises:
      RunError: the config is missing or damaged, or not that of a sweep.
    """
    config = restore_config(default_config(), workdir.read_config(), str(workdir.config))
    try:
        return expand(config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise RunError(f"{workdir.config}: got a config that does not fit ({error}), expected a sweep's") from None


def _values(name: str, values: Any, fields: Mapping[str, Any]) -> tuple:
    if name not in fields or name.startswith(("sweep", "mesh", "distributed")):
        close = difflib.get_close_matches(name, fields, n=1)
        raise UsageError(
            f"config.sweep.{name}: got a field that a run's config does not have, expected one of "
            f"vmapbn_flax.default_config(){f', such as {close[0]}' if close else ''}"
        )
    if not isinstance(values, tuple) or not values:
        raise UsageError(
            f"config.sweep.{name}: got {values!r}, expected a tuple of at least one value, such as ({fields[name]!r},)"
        )
    if not all(abs(value) < _LARGEST for value in values if isinstance(value, int | float)):
        raise UsageError(f"config.sweep.{name}: got {values!r}, expected numbers below {_LARGEST:g}")
    return values


def _product(sweep: Mapping[str, tuple], fields: Mapping[str, Any], options: ConfigDict) -> Iterator[dict[str, Any]]:
    if (count := math.prod(map(len, sweep.values()))) > MOST_MEMBERS:
        raise UsageError(f"config.sweep: got {count} members, expected at most {MOST_MEMBERS}. Sweep fewer values.")
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def _zip(sweep: Mapping[str, tuple], fields: Mapping[str, Any], options: ConfigDict) -> Iterator[dict[str, Any]]:
    lengths = {name: len(values) for name, values in sweep.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"config.sweep: got {lengths} values to zip, expected as many of each field")
    for values in zip(*sweep.values(), strict=True):
        yield dict(zip(sweep, values, strict=True))


def _random(sweep: Mapping[str, tuple], fields: Mapping[str, Any], options: ConfigDict) -> Iterator[dict[str, Any]]:
    """Distinct draws; more draws, or a further field, leave the first ones as they are."""
    drawn = set()
    for number in range(100 * options.size):
        values = {name: _draw(name, leaf, fields[name], (options.seed, number)) for name, leaf in sweep.items()}
        if (key := tuple(map(_hashable, values.values()))) not in drawn:
            drawn.add(key)
            yield values
        if len(drawn) == options.size:
            return
    raise UsageError(
        f"config.sweep_options.size: got {options.size} draws, expected at most as many as differ, {len(drawn)} here"
    )


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


_COMBINE = {"product": _product, "zip": _zip, "random": _random}


def _draw(name: str, leaf: tuple, field: Any, seed: tuple[int, int]) -> Any:
    """One value from `leaf`, drawn by `seed` and `name` alone."""
    rng = np.random.default_rng((*seed, zlib.crc32(name.encode())))
    if leaf[0] not in _DISTRIBUTIONS:
        return leaf[rng.integers(len(leaf))]
    kind, *bounds = leaf
    numbers = len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    if not (numbers and -math.inf < bounds[0] < bounds[1] < math.inf and (kind == "uniform" or bounds[0] > 0)):
        order = "low < high" if kind == "uniform" else "0 < low < high"
        raise UsageError(f"config.sweep.{name}: got {leaf!r}, expected ('{kind}', low, high) with {order}")
    if isinstance(field, bool) or not isinstance(field, int | float):
        raise UsageError(f"config.sweep.{name}: got {leaf!r}, expected choices, for {field!r} is no number")
    low, high = bounds
    value = rng.uniform(low, high) if kind == "uniform" else math.exp(rng.uniform(math.log(low), math.log(high)))
    value = min(max(value, low), high)  # exp and log may round out of the bounds
    return round(value) if isinstance(field, int) else float(value)


def _typed(name: str, value: Any, field: Any) -> Any:
    """`value` in the type of `field`, the value that it replaces."""
    if isinstance(field, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(field, tuple) and isinstance(value, list):
        return tuple(value)
    if type(value) is not type(field):
        hint = "; distributions are for sweep_options.mode=random" if value in _DISTRIBUTIONS else ""
        raise UsageError(
            f"config.sweep.{name}: got the value {value!r}, expected a {type(field).__name__} like {field!r}{hint}"
        )
    return value


def _with(base: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    config = base.copy_and_resolve_references()
    choose_network(config, values.get("model.name", config.model.name))
    config.update_from_flattened_dict(values)
    return config


def _labels(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """The last part of each dotted name, or the whole name if two have the same last part."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: label if last.count(label) == 1 else name for name, label in zip(names, last, strict=True)}


def _spell(value: Any, leaf: tuple, digits: int) -> str:
    """`value` as a part of a file's name: no separators, quotes or blanks.

    A number drawn from the distribution `leaf` is rounded to `digits` digits, or the fewest more that keep it within
    its bounds.
    """
    if leaf[0] in _DISTRIBUTIONS and isinstance(value, float):
        rounded = (float(f"{value:.{more}g}") for more in range(digits, _DIGITS.stop))
        value = next(number for number in rounded if leaf[1] <= number <= leaf[2])
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)


def _check(members: Sequence[Member]) -> None:
    names = [member.name for member in members]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"config.sweep: got the member {twice[0]} twice, expected members that differ")
    if longest := [name for name in names if len(name) > _LONGEST_NAME]:
        raise UsageError(
            f"config.sweep: got a member with a name of {len(longest[0])} characters, {longest[0][:50]}..., expected "
            f"at most {_LONGEST_NAME}, for it names a directory. Sweep fewer fields."
        )
    if unheld := [member.name for member in members if not member.config.data.validation_size]:
        raise UsageError(
            f"config.data.validation_size: got 0 for the member {unheld[0]}, expected the number of training examples "
            f"to hold out, on which members are ranked. Change it with --config.data.validation_size=5000"
        )


def program_key(config: ConfigDict) -> str:
    """A key that is the same for configs that one program serves: they differ only in its arguments."""

    def is_argument(name: str) -> bool:
        # Members of a group train for as many epochs: one loop advances them together.
        return name in FIELDS and FIELDS[name].traced is not None and name != "train.num_epochs"

    return repr(sorted((name, value) for name, value in flat(config).items() if not is_argument(name)))


def program_groups(members: Sequence[Member]) -> list[list[Member]]:
    """The members, grouped by the program that serves them."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(program_key(member.config), []).append(member)
    return list(groups.values())


def chunk(members: Sequence[Member], most: int) -> list[list[Member]]:
    """`members` in the fewest parts of at most `most`, as equal as possible: each size is a program of its own."""
    parts = -(-len(members) // most)
    cuts = [len(members) * i // parts for i in range(parts + 1)]
    return [list(members[a:b]) for a, b in itertools.pairwise(cuts)]
