"""The variables of `MLP` and `ConvNet` as layers in order, in which PyTorch and Equinox have them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Variables = Mapping[str, Mapping[str, Any]]
Layer = dict[str, Any]  # parameters and statistics of one layer, by our names

_WINDOW = (3, 3)  # of the convolutions of `ConvNet`


def to_kernel(weight: Any) -> Any:
    """`(out, in, *window)` to our `(*window, in, out)`."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def to_weight(kernel: Any) -> Any:
    """The inverse of `to_kernel`."""
    return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def join(linear: list[Layer], norm: list[Layer]) -> dict[str, Any]:
    """The variables of `MLP` or `ConvNet` from its linear layers, dense or convolutions, and its norms.

    Raises:
      ValueError: the layers are not those of such a network.
    """
    *hidden, last = [layer["kernel"].ndim for layer in linear] or [0]
    kinds = {2: "dense", 4: "conv"}
    if last != 2 or len(set(hidden)) > 1 or set(hidden) - set(kinds) or len(norm) not in (0, len(hidden)):
        raise ValueError(
            f"got {len(linear)} linear layers and {len(norm)} batch norms; expected an MLP or a ConvNet: linear "
            f"layers, or convolutions and a linear one, with a batch norm after each but the last, or none at all."
        )
    params, statistics = {}, {}
    names = [*(f"{kinds[axes]}_{i}" for i, axes in enumerate(hidden)), "logits"]
    width: int | None = None
    for i, (name, layer) in enumerate(zip(names, linear, strict=True)):
        *window, inputs, outputs = layer["kernel"].shape
        if name == "logits" and 4 in hidden and width and inputs % width == 0:
            layer = {**layer, "kernel": _channels_last(layer["kernel"], width)}
        elif width not in (None, inputs):
            raise ValueError(f"got {inputs} inputs of {name}; expected {width}, as before it.")
        if window and tuple(window) != _WINDOW:
            raise ValueError(f"got a window of {tuple(window)} for {name}; expected {_WINDOW}.")
        width = outputs
        if "bias" in layer and layer["bias"].shape != (width,):
            raise ValueError(f"got a bias of shape {layer['bias'].shape} for {name}; expected ({width},).")
        if i < len(norm):
            if norm[i]["mean"].shape != (width,):
                raise ValueError(f"got statistics of shape {norm[i]['mean'].shape} for norm_{i}; expected ({width},).")
            affine: Layer = {entry: norm[i][entry] for entry in ("scale", "bias") if entry in norm[i]}
            statistics[f"norm_{i}"] = {entry: norm[i][entry] for entry in norm[i] if entry not in affine}
            if "bias" in layer:  # norm(x + bias) is norm(x) with the mean of x
                statistics[f"norm_{i}"]["mean"] -= layer["bias"]
                layer = {"kernel": layer["kernel"]}
            if affine:
                params[f"norm_{i}"] = affine
        elif "bias" not in layer:
            raise ValueError(f"got no bias for {name}; expected one: only a layer before a batch norm has none.")
        params[name] = layer
    return {"params": params, "batch_stats": statistics} if norm else {"params": params}


def split(variables: Variables) -> tuple[list[Layer], list[Layer]]:
    """The inverse of `join`.

    Raises:
      ValueError: the variables are not those of `MLP` or `ConvNet`.
    """
    params, statistics = variables["params"], variables.get("batch_stats", {})
    kind = "conv" if "conv_0" in params else "dense"
    hidden = [f"{kind}_{i}" for i in range(sum(name.startswith(f"{kind}_") for name in params))]
    norm = [f"norm_{i}" for i in range(len(statistics))]
    if other := params.keys() - {*hidden, *norm} ^ {"logits"}:
        raise ValueError(f"got {', '.join(sorted(other))} in the variables; expected those of an MLP or a ConvNet.")
    linear = [dict(params[name]) for name in hidden]
    logits = dict(params["logits"])
    if kind == "conv":
        logits["kernel"] = _channels_first(logits["kernel"], linear[-1]["kernel"].shape[-1])
    return [*linear, logits], [{**params.get(name, {}), **statistics[name]} for name in norm]


def require_fit(variables: Variables, expected: Variables) -> None:
    """Refuses `variables` whose entries or shapes are not those of `expected`."""

    def shapes(tree: Variables) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(x) for path, x in leaves}

    ours, theirs = shapes(variables), shapes(expected)
    for entry in {**theirs, **ours}:
        got, wanted = ours.get(entry, "nothing"), theirs.get(entry, "nothing")
        if got != wanted:
            raise ValueError(f"got {got} for {entry} in the variables; the network they go to has {wanted}.")


def _channels_last(kernel: Any, channels: int) -> Any:
    """The rows of a dense layer, `(channels * positions, out)`, in the order in which `ConvNet` flattens positions."""
    return jnp.swapaxes(kernel.reshape(channels, -1, kernel.shape[-1]), 0, 1).reshape(kernel.shape)


def _channels_first(kernel: Any, channels: int) -> Any:
    """The inverse of `_channels_last`."""
    return jnp.swapaxes(kernel.reshape(-1, channels, kernel.shape[-1]), 0, 1).reshape(kernel.shape)
