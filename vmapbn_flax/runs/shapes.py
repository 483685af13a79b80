"""The shapes that a checkpoint says it has, compared with those that are wanted, before anything is allocated."""

import re
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import RunError
from vmapbn_flax.training.trees import named_leaves

_MOST_PADDING = 2**12  # members; there is less than a row a device


def require_fit(saved_as: Any, template: Any, count: int, path: Path) -> None:
    """Checks the shapes and types that a checkpoint says it has.

    Args:
      saved_as: orbax's metadata of the arrays, by name.
      template: the state that is wanted.
      count: of the members that are saved, whose rows padding may follow.
      path: of the checkpoint.

    Raises:
      RunError: they are not those of `template`.
      ValueError: an array is stored in pieces larger than itself.
    """
    expected = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in named_leaves(template).items()}
    got = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in saved_as.items()}
    if any(re.match(r"opt_state/\d", name) for name in got):
        raise RunError(
            f"{path}: got the optimizer's moments in one vector, as earlier versions kept them. Continue with the "
            f"version that trained this checkpoint, or train again in another --workdir."
        )
    for name in dict.fromkeys([*expected, *got]):
        if not _fits(got.get(name), expected.get(name), count):
            describe = {key: _describe(side.get(name)) for key, side in (("got", got), ("expected", expected))}
            raise RunError(
                f"{path}: {name}: got {describe['got']}, expected {describe['expected']}: a checkpoint of "
                f"another model. Use the config it was made with, or another --workdir."
            )
        pieces = saved_as[name].storage.chunk_shape
        if any(size > max(1, most) for size, most in zip(pieces, got[name][0], strict=True)):
            raise ValueError(f"{name} is stored in pieces of {list(pieces)}")


def _fits(got: tuple | None, expected: tuple | None, count: int) -> bool:
    if count < 2 or got is None or expected is None:
        return got == expected
    (rows, *shape), (members, *own) = got[0] or (0,), expected[0] or (0,)
    return (shape, got[1]) == (own, expected[1]) and members <= rows < members + _MOST_PADDING


def _describe(spec: tuple | None) -> str:
    return f"{spec[1]}{list(spec[0])}" if spec else "nothing"
