"""A sweep's config expanded to members, and the members divided into groups that train together."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vmapbn_flax.config import flat, restore_config, validate, without_distributed
from vmapbn_flax.defaults import default_config
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.fields import FIELDS, MOST_MEMBERS
from vmapbn_flax.networks import choose_network
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.space import Choices, Range, Space, draw, find, plain, read_space

_LONGEST_NAME = 200  # characters; file systems end at 255
_DIGITS = range(4, 18)  # of a drawn number in a name, the fewest that do; 17 tell all numbers apart


class Member(NamedTuple):
    """One run of a sweep."""

    name: str  # its values, as `learning_rate=0.003,seed=1`; also the name of its workdir
    config: ConfigDict  # of a run, without a sweep
    values: dict[str, Any]  # of the swept fields, by their dotted names


def expand(config: ConfigDict, proposals: Sequence[Any] | None = None) -> list[Member]:
    """The members of the sweep that `config` describes, in a fixed order.

    Args:
      config: with values in `config.sweep`.
      proposals: of the mode "optuna", the values of its members so far, as the ledger has them. By default members are
        drawn as in the mode "random", which shows whether the config can be used.

    Raises:
      UsageError: a swept field does not exist, its values cannot be used, or two members are the same.
    """
    base, space = read_sweep(config)
    labels = _labels(space)
    members: list[Member] = []
    taken: set[str] = set()
    for values in _COMBINE[base.sweep_options.mode](space, base.sweep_options, proposals):
        member_config = with_values(base, values)
        values = {name: plain(value) for name, value in values.items()}
        for digits in _DIGITS:  # later members yield: more draws leave the names of the first ones as they are
            spelled = {field: _spell(value, space[field], digits) for field, value in values.items()}
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


def read_sweep(config: ConfigDict) -> tuple[ConfigDict, Space]:
    """What the members of the sweep have in common, a config without a sweep; and what they choose from.

    Raises:
      UsageError: a field or its values cannot be used.
    """
    base = config.copy_and_resolve_references()
    with base.unlocked():
        base.sweep = ConfigDict()
    sweep = flat(config.sweep)
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
    return without_distributed(base), read_space(sweep, flat(base), base.sweep_options.mode)


def read_members(workdir: Workdir) -> list[Member]:
    """The members of the sweep whose config is saved in `workdir`.

    Raises:
      RunError: the config is missing or damaged, or not that of a sweep.
    """
    config = restore_config(default_config(), workdir.read_config(), str(workdir.config))
    try:
        return expand(config, Ledger(workdir).proposed)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise RunError(f"{workdir.config}: got a config that does not fit ({error}), expected a sweep's") from None


def _product(space: Space, options: ConfigDict, proposals: Any) -> Iterator[dict[str, Any]]:
    choices = _choices(space)
    if (count := math.prod(map(len, choices.values()))) > MOST_MEMBERS:
        raise UsageError(f"config.sweep: got {count} members, expected at most {MOST_MEMBERS}. Sweep fewer values.")
    for values in itertools.product(*choices.values()):
        yield dict(zip(space, values, strict=True))


def _zip(space: Space, options: ConfigDict, proposals: Any) -> Iterator[dict[str, Any]]:
    choices = _choices(space)
    lengths = {name: len(values) for name, values in choices.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"config.sweep: got {lengths} values to zip, expected as many of each field")
    for values in zip(*choices.values(), strict=True):
        yield dict(zip(space, values, strict=True))


def random_draws(space: Space, options: ConfigDict, proposals: Any = None) -> Iterator[dict[str, Any]]:
    """Distinct draws; more draws, or a further field, leave the first ones as they are."""
    drawn: set[str] = set()
    for number in range(100 * options.size):
        values = draw(space, (options.seed, number))
        if repr(values) not in drawn:
            drawn.add(repr(values))
            yield values
        if len(drawn) == options.size:
            return
    raise UsageError(
        f"config.sweep_options.size: got {options.size} draws, expected at most as many as differ, {len(drawn)} here"
    )


def _optuna(space: Space, options: ConfigDict, proposals: Any) -> Iterator[dict[str, Any]]:
    if proposals is None:
        yield from random_draws(space, options)
    else:
        yield from (find(space, proposed) for proposed in proposals[: options.size])


def _choices(space: Space) -> dict[str, tuple]:
    return {name: dimension.values for name, dimension in space.items() if isinstance(dimension, Choices)}


_COMBINE = {"product": _product, "zip": _zip, "random": random_draws, "optuna": _optuna}


def with_values(base: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """The config of the member with these `values`."""
    config = base.copy_and_resolve_references()
    choose_network(config, values.get("model.name", config.model.name))
    config.update_from_flattened_dict(values)
    return config


def _labels(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """The last part of each dotted name, or the whole name if two have the same last part."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: label if last.count(label) == 1 else name for name, label in zip(names, last, strict=True)}


def _spell(value: Any, dimension: Choices | Range, digits: int) -> str:
    """`value` as a part of a file's name: no separators, quotes or blanks.

    A number drawn from a range is rounded to `digits` digits, or the fewest more that keep it within its bounds.
    """
    if isinstance(dimension, Range) and isinstance(value, float):
        rounded = (float(f"{value:.{more}g}") for more in range(digits, _DIGITS.stop))
        value = next(number for number in rounded if dimension.low <= number <= dimension.high)
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
