"""What a sweep can choose from: of each swept field, a tuple of values or a distribution of numbers."""

import difflib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vmapbn_flax.errors import UsageError
from vmapbn_flax.networks import displayed

_KINDS = ("uniform", "log_uniform")
_DRAWN = ("random", "optuna")  # modes that take distributions
_LARGEST = 1e300  # number; the difference of two bounds is one, too


class Choices(NamedTuple):
    """The values that a field takes, in the field's type."""

    values: tuple

    def draw(self, rng: np.random.Generator) -> Any:
        return self.values[rng.integers(len(self.values))]

    def find(self, saved: Any) -> Any:
        """The value that was saved as `saved`, JSON; a network's name is the one here, which may be `untrusted`.

        Raises:
          ValueError: no value was.
        """
        text = json.dumps(saved)
        for value in self.values:
            if json.dumps(plain(value)) == text:
                return value
        raise ValueError(f"the choices {self.values!r}")


class Range(NamedTuple):
    """A distribution of numbers, uniform in themselves or in their logarithms."""

    low: float
    high: float
    log: bool
    whole: bool  # whether the numbers are rounded to integers

    def draw(self, rng: np.random.Generator) -> float | int:
        bounds = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        drawn = rng.uniform(*bounds)
        return self.clip(math.exp(drawn) if self.log else drawn)

    def clip(self, value: float | int) -> float | int:
        """`value` within the bounds, where exponents and logarithms may round out of them."""
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else float(value)

    def find(self, saved: Any) -> float | int:
        """`saved`, JSON, as a number of the distribution.

        Raises:
          ValueError: it is none.
        """
        if type(saved) is (int if self.whole else float) and saved == self.clip(saved):
            return saved
        raise ValueError(f"numbers from {self.low!r} to {self.high!r}")


Space = dict[str, Choices | Range]  # by the dotted names of the fields


def plain(value: Any) -> Any:
    """`value` as the ledger and a member's name have it: the name of a network as a user says it."""
    return displayed(value) if isinstance(value, str) else value


def read_space(sweep: Mapping[str, Any], fields: Mapping[str, Any], mode: str) -> Space:
    """What the config of a sweep says to choose from.

    Args:
      sweep: `config.sweep`, by dotted names.
      fields: the config of a run, by dotted names.
      mode: `config.sweep_options.mode`.

    Raises:
      UsageError: a swept field does not exist, or its values cannot be used.
    """
    space: Space = {}
    for name, values in sweep.items():
        _check_values(name, values, fields)
        if mode in _DRAWN and values[0] in _KINDS:
            space[name] = _read_range(name, values, fields[name])
        else:
            space[name] = Choices(tuple(_typed(name, value, fields[name]) for value in values))
    return space


def draw(space: Space, seed: tuple[int, int]) -> dict[str, Any]:
    """A value of each field, drawn by `seed` and the field's name alone."""
    return {
        name: dimension.draw(np.random.default_rng((*seed, zlib.crc32(name.encode()))))
        for name, dimension in space.items()
    }


def find(space: Space, proposed: Any) -> dict[str, Any]:
    """The values of a member that were saved as `proposed`, JSON.

    Raises:
      UsageError: they are not of this space.
    """
    if not isinstance(proposed, dict) or proposed.keys() != space.keys():
        raise UsageError(
            f"config.sweep: got the fields {', '.join(space)}, expected those of its members so far, as in {proposed}"
        )
    values = {}
    for name, dimension in space.items():
        try:
            values[name] = dimension.find(proposed[name])
        except ValueError as error:
            raise UsageError(
                f"config.sweep.{name}: got {error}, expected the value {proposed[name]!r} of a member among them; "
                f"values may be added to a sweep, not taken away"
            ) from None
    return values


def _check_values(name: str, values: Any, fields: Mapping[str, Any]) -> None:
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


def _read_range(name: str, values: tuple, field: Any) -> Range:
    kind, *bounds = values
    numbers = len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    if not (numbers and -math.inf < bounds[0] < bounds[1] < math.inf and (kind == "uniform" or bounds[0] > 0)):
        order = "low < high" if kind == "uniform" else "0 < low < high"
        raise UsageError(f"config.sweep.{name}: got {values!r}, expected ('{kind}', low, high) with {order}")
    if isinstance(field, bool) or not isinstance(field, int | float):
        raise UsageError(f"config.sweep.{name}: got {values!r}, expected choices, for {field!r} is no number")
    low, high = bounds
    return Range(low, high, log=kind == "log_uniform", whole=isinstance(field, int))


def _typed(name: str, value: Any, field: Any) -> Any:
    """`value` in the type of `field`, the value that it replaces."""
    if isinstance(field, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(field, tuple) and isinstance(value, list):
        return tuple(value)
    if type(value) is not type(field):
        modes = " and ".join(_DRAWN)
        hint = f"; distributions are for the sweep_options.mode {modes}" if value in _KINDS else ""
        raise UsageError(
            f"config.sweep.{name}: got the value {value!r}, expected a {type(field).__name__} like {field!r}{hint}"
        )
    return value
