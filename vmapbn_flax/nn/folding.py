"""Folding: each batch norm moves into the dense layer or the convolution beside it, for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict

from vmapbn_flax.nn.batch_norm import BatchNorm

_FOLDED = ("params", "batch_stats")

Path = tuple[str, ...]
Leaves = dict[Path, np.ndarray]


class _Call(NamedTuple):
    """One call of a layer: the layer, where its variables are, and its input and output, compared by identity."""

    layer: nn.Module
    path: Path
    x: Any
    y: Any


def fold(network: nn.Module, variables: Mapping[str, Any], x: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network without its batch norms, equal in evaluation.

    In evaluation a batch norm multiplies each feature by a number and adds another. Both move into the dense layer or
    the convolution before it, with m = scale / sqrt(var + epsilon):

        kernel' = kernel * m,    bias' = (bias - mean) * m + the norm's bias

    A norm with neither before it moves into the one after it, unless that is a convolution which has zeros around its
    input: the norm does not shift those.

    Layers are not found by their names. `network` is traced, and a norm belongs to the layer whose output is its input,
    unchanged. At the end the network and the folded one are computed in float64 on random numbers, and have to agree.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from vmapbn_flax import MLP, fold
      >>> model, image = MLP(hidden=(100,), num_classes=10), jnp.ones(784)
      >>> variables = model.init(jax.random.key(0), image, train=False)
      >>> folded, folded_variables = fold(model, variables, image)
      >>> jax.tree.map(jnp.shape, folded_variables["params"]["dense_0"])
      {'bias': (100,), 'kernel': (784, 100)}
      >>> folded.apply(folded_variables, image, train=False).shape
      (10,)

    Args:
      network: for one example, or a batched twin; not in a `VmapBatch`. It has an attribute `norm`, and with
        `norm=None` the same layers by the same names, with biases and without norms.
      variables: of the network.
      x: an input of the network, in float; only its shape matters.

    Returns:
      The network with `norm=None`, and its variables on the host, in the types of `variables`.

    Raises:
      ValueError: the network cannot be folded; says why.
    """
    label = type(network).__name__
    if not hasattr(network, "norm"):
        raise ValueError(f"{label}: got a network without an attribute norm; expected one, which None leaves out.")
    folded = network.clone(norm=None)
    calls = _trace(network, variables, x)
    params, statistics = (_wide(variables.get(collection, {})) for collection in _FOLDED)
    for norm in dict.fromkeys(call.path for call in calls if isinstance(call.layer, BatchNorm)):
        linear, before = _neighbour(label, calls, norm)
        multiplier, shift = _affine(label, next(call for call in calls if call.path == norm), params, statistics)
        kernel = params[*linear, "kernel"]
        bias = params.get((*linear, "bias"), np.zeros(kernel.shape[-1]))
        if before:
            kernel, bias = kernel * multiplier, bias * multiplier + shift
        else:
            shifts = kernel * shift[:, None]
            kernel, bias = kernel * multiplier[:, None], bias + shifts.sum(tuple(range(kernel.ndim - 1)))
        params |= {(*linear, "kernel"): kernel, (*linear, "bias"): bias}
    if statistics:
        left = _spell(min(statistics)[:-1])
        raise ValueError(
            f"{label}: got statistics of {left}; expected only those of a BatchNorm that evaluation calls."
        )

    others = {name: tree for name, tree in variables.items() if name not in _FOLDED}
    _require_same_layers(folded, others, params, x)
    _require_agreement(network, variables, folded, {**others, "params": unflatten_dict(params)}, x)
    types = {path: leaf.dtype for path, leaf in flatten_dict(dict(variables["params"])).items()}
    narrow = {path: leaf.astype(types.get(path, types[*path[:-1], "kernel"])) for path, leaf in params.items()}
    return folded, {**others, "params": unflatten_dict(narrow)}


def _trace(network: nn.Module, variables: Mapping[str, Any], x: Any) -> list[_Call]:
    """The calls of dense layers, convolutions and batch norms in evaluation, in order."""
    calls = []

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Dense | nn.Conv | BatchNorm):
            calls.append(_Call(layer, layer.path, [*args, *kwargs.values()][0], y))
        return y

    with nn.intercept_methods(record):
        shape = jax.ShapeDtypeStruct(np.shape(x), np.float32)
        jax.eval_shape(lambda variables, x: network.apply(variables, x, train=False), variables, shape)
    return calls


def _neighbour(label: str, calls: list[_Call], norm: Path) -> tuple[Path, bool]:
    """The layer that `norm` moves into, and whether that comes before it."""
    own = [call for call in calls if call.path == norm]
    if linear := _partner(own, calls, lambda linear, norm: linear.y is norm.x):
        return linear.path, True
    refused = f"{label}: cannot fold {_spell(norm)}"
    linear = _partner(own, calls, lambda linear, norm: linear.x is norm.y)
    if linear is None:
        raise ValueError(
            f"{refused}: got an input that is not the output of one dense layer or convolution, and an output that is "
            f"not the input of one; expected one of these, with nothing between."
        )
    if _pads(linear.layer):
        raise ValueError(
            f"{refused} into {_spell(linear.path)} after it: got a convolution that pads its input with zeros, which "
            f"the norm would have shifted; expected one with padding='VALID', or the norm after a convolution."
        )
    if getattr(linear.layer, "feature_group_count", 1) != 1:
        raise ValueError(f"{refused} into {_spell(linear.path)} after it: got groups of features, expected one.")
    return linear.path, False


def _partner(own: list[_Call], calls: list[_Call], joined: Callable[[_Call, _Call], bool]) -> _Call | None:
    """The layer that every call of `own` is joined to, if none of its calls is joined to something else."""
    linear = [call for call in calls if not isinstance(call.layer, BatchNorm)]
    paths = {call.path for call in linear for norm in own if joined(call, norm)}
    partners = [call for call in linear if call.path in paths]
    alone = all(any(joined(call, norm) for norm in own) for call in partners)
    complete = all(any(joined(call, norm) for call in partners) for norm in own)
    return partners[0] if len(paths) == 1 and alone and complete else None


def _pads(layer: nn.Module) -> bool:
    """Whether `layer` is a convolution that has zeros around its input."""
    if not isinstance(layer, nn.Conv):
        return False
    if isinstance(layer.padding, str):
        return layer.padding in ("SAME", "CAUSAL") and bool(np.max(layer.kernel_size) > 1)
    return bool(np.any(layer.padding))


def _affine(label: str, call: _Call, params: Leaves, statistics: Leaves) -> tuple[np.ndarray, np.ndarray]:
    """What a norm multiplies by and adds in evaluation, `(features,)` each; its variables are taken out."""
    found = {path[-1]: leaves.pop(path) for leaves in (params, statistics) for path in _below(call.path, leaves)}
    if found["mean"].shape != call.x.shape[-1:]:
        raise ValueError(
            f"{label}: cannot fold {_spell(call.path)}: got statistics of shape {found['mean'].shape} for "
            f"{call.x.shape[-1]} features; expected those of one layer, not of several in a stack."
        )
    variances = found["var"] + float(call.layer.epsilon)
    if not np.all(variances > 0):
        raise ValueError(
            f"{label}: cannot fold {_spell(call.path)}: got variances, with epsilon, down to {variances.min()}; "
            f"expected positive ones."
        )
    multiplier = found.get("scale", 1) / np.sqrt(variances)
    return multiplier, found.get("bias", 0) - found["mean"] * multiplier


def _below(path: Path, leaves: Leaves) -> list[Path]:
    return [leaf for leaf in leaves if leaf[:-1] == path]


def _wide(tree: Any) -> Leaves:
    """The leaves of a tree, in float64 where they are floats."""

    def widen(leaf: np.ndarray) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, np.complexfloating):
            return leaf.astype(np.complex128)
        return leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, np.floating) else leaf

    return {path: widen(np.asarray(leaf)) for path, leaf in flatten_dict(dict(tree)).items()}


def _require_same_layers(folded: nn.Module, others: Mapping[str, Any], params: Leaves, x: Any) -> None:
    """Refuses a network with `norm=None` that has other layers than those of `params`, or no biases."""
    label = f"{type(folded).__name__} with norm=None"
    try:
        calls = _trace(folded, {**others, "params": unflatten_dict(params)}, x)
    except (TypeError, ValueError, FlaxError) as error:
        reason = str(error).splitlines()[0].partition(" (https:")[0]  # Flax adds a link
        raise ValueError(
            f"{label}: got {reason!r}; expected the same layers by the same names, without norms."
        ) from error
    for call in calls:
        if (*call.path, "bias") in params and not call.layer.use_bias:
            raise ValueError(
                f"{label}: got {_spell(call.path)} without a bias; expected one, to hold what the norm adds. Write "
                f"use_bias=self.norm is None."
            )


def _require_agreement(
    network: nn.Module, variables: Mapping[str, Any], folded: nn.Module, wide: Mapping[str, Any], x: Any
) -> None:
    """Refuses a network whose form with `norm=None` does not compute the same."""
    whole = {**variables, **{name: unflatten_dict(_wide(variables[name])) for name in variables if name in _FOLDED}}
    with jax.enable_x64(True):
        probe = np.random.default_rng(0).uniform(size=np.shape(x))
        for a, b in zip(_evaluate(network, whole, probe), _evaluate(folded, wide, probe), strict=True):
            tolerance = float(np.sqrt(jnp.finfo(a.dtype).eps)) * np.max(np.abs(a))
            if not np.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
                raise ValueError(
                    f"{type(network).__name__}: got results that differ by {np.max(np.abs(a - b)):.1e} of "
                    f"{np.max(np.abs(a)):.1e} without the norms; expected a network in which nothing but the norm uses "
                    f"the output of the layer before it, and in which norm=None changes nothing else."
                )


def _evaluate(network: nn.Module, variables: Mapping[str, Any], x: Any) -> list[np.ndarray]:
    y = jax.jit(lambda variables, x: network.apply(variables, x, train=False))(variables, x)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(y)]


def _spell(path: Path) -> str:
    return "/".join(path)
