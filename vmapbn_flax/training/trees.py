"""Trees of arrays by the names of their leaves."""

from typing import Any

import jax
from jaxtyping import PyTree


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a state, or of a part of one, by names such as `params/dense_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
