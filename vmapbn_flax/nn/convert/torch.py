"""Conversion to and from PyTorch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vmapbn_flax.nn.conv_net import ConvNet
from vmapbn_flax.nn.convert.layers import Variables, join, require_fit, split, to_kernel, to_weight
from vmapbn_flax.nn.mlp import MLP

_LINEAR = {"weight": "kernel", "bias": "bias"}  # or without the bias
_STATISTICS = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
_NORM = {"weight": "scale", "bias": "bias", **_STATISTICS}

_Made = tuple[str, tuple[int, ...], dict[str, Any]]  # the class of a layer, its sizes and its keywords


def from_torch(state_dict: Mapping[str, Any], *, cumulative: bool = False) -> dict[str, Any]:
    """Variables of `MLP` or `ConvNet` from the state dict of a PyTorch network.

    Args:
      state_dict: of a network of Linear and BatchNorm1d layers, or of Conv2d and BatchNorm2d layers and a Linear;
        tensors by name, on any device; copied.
      cumulative: whether the layers average over all steps (`momentum=None`, in PyTorch and here). Then
        `num_batches_tracked` becomes the statistic `count`. Otherwise it is left out.

    Returns:
      `{"params": ..., "batch_stats": ...}`; without `batch_stats` if the network has no batch norm.

    Raises:
      ValueError: the entries are not those of such a network.
    """
    linear, norm = [], []
    for prefix, names in _layers(state_dict).items():
        layer = {ours: _from_tensor(state_dict[prefix + theirs]) for theirs, ours in names.items()}
        if "kernel" in layer:
            linear.append({**layer, "kernel": to_kernel(layer["kernel"])})
        else:
            count = {"count": layer.pop("count").astype(jnp.int32)}
            norm.append({**layer, **count} if cumulative else layer)
    return join(linear, norm)


def to_torch(variables: Variables, like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `from_torch`: the state dict `like` with the numbers of `variables`.

    Args:
      variables: of `MLP` or `ConvNet`.
      like: `network.state_dict()` of the target network; not changed. It gives the names, dtypes and
        devices, and `num_batches_tracked` unless the statistics have a `count`.

    Returns:
      A new state dict, for `network.load_state_dict`.

    Raises:
      ValueError: `like` is not of such a network, or `variables` do not fit it.
    """
    cumulative = any("count" in layer for layer in variables.get("batch_stats", {}).values())
    require_fit(variables, from_torch(like, cumulative=cumulative))
    linear, norm = map(iter, split(variables))
    state_dict = dict(like)
    for prefix, names in _layers(like).items():
        layer = dict(next(linear) if "kernel" in names.values() else next(norm))
        if "kernel" in layer:
            layer["kernel"] = to_weight(layer["kernel"])
        for theirs, ours in names.items():
            tensor = like[prefix + theirs]
            if ours in layer:
                state_dict[prefix + theirs] = _to_tensor(layer[ours], tensor)
            elif ours == "bias":
                state_dict[prefix + theirs] = tensor.new_zeros(tensor.shape)
    return state_dict


def make_torch(network: nn.Module, variables: Variables) -> tuple[Any, str]:
    """A `torch.nn.Sequential` that computes what `network` does with `variables`, for evaluation, and its code.

    It takes a batch of floats and returns logits.

    Args:
      network: an `MLP`, or a `ConvNet`, whose images are `(batch, channels, height, width)` there.
      variables: of the network.

    Raises:
      ValueError: another network, or variables that do not fit it.
    """
    import torch

    if type(network) not in (MLP, ConvNet):
        raise ValueError(
            f"{type(network).__name__}: got a network that has no form for PyTorch; expected an MLP or a ConvNet."
        )
    calls = _sequential(network, variables)
    sequential = torch.nn.Sequential(*(getattr(torch.nn, name)(*sizes, **named) for name, sizes, named in calls))
    sequential.load_state_dict(to_torch(variables, sequential.state_dict()))
    lines = [
        f"    nn.{name}({', '.join([*map(str, sizes), *(f'{key}={value}' for key, value in named.items())])}),"
        for name, sizes, named in calls
    ]
    return sequential.eval(), "\n".join(["nn.Sequential(", *lines, ")"])


def _sequential(network: Any, variables: Variables) -> list[_Made]:
    """The layers of `make_torch`, in order."""
    linear, norms = split(variables)
    convolutional = isinstance(network, ConvNet)
    between: list[_Made] = [("MaxPool2d", (2,), {}), ("ReLU", (), {})] if convolutional else [("Sigmoid", (), {})]
    hidden: list[_Made] = []
    for i, layer in enumerate(linear[:-1]):
        *_, inputs, outputs = layer["kernel"].shape
        bias = {"bias": "bias" in layer}
        hidden.append(
            ("Conv2d", (inputs, outputs, 3), {"padding": 1, **bias})
            if convolutional
            else ("Linear", (inputs, outputs), bias)
        )
        if norms:
            norm = network.norm()  # for its attributes
            momentum = None if norm.momentum is None else round(1 - float(norm.momentum), 9)
            named = {"eps": float(norm.epsilon), "momentum": momentum, "affine": "scale" in norms[i]}
            hidden.append((f"BatchNorm{2 if convolutional else 1}d", (outputs,), named))
        hidden += between
    flatten: list[_Made] = [("Flatten", (), {})]
    logits: _Made = ("Linear", linear[-1]["kernel"].shape, {})
    return [*hidden, *flatten, logits] if convolutional else [*flatten, *hidden, logits]


def _layers(state_dict: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Our name of each entry in the state dict, by the prefix of its layer."""
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in state_dict.items():
        prefix, dot, entry = key.rpartition(".")
        tensors.setdefault(prefix + dot, {})[entry] = tensor
    layers = {}
    for prefix, entries in tensors.items():
        linear = entries.keys() in ({"weight"}, _LINEAR.keys()) and entries["weight"].ndim in (2, 4)
        if not linear and entries.keys() not in (_NORM.keys(), _STATISTICS.keys()):
            raise ValueError(
                f"got {prefix + '*'!r} with {', '.join(entries)}; expected {', '.join(_LINEAR)} of a Linear or a "
                f"Conv2d, whose bias may be missing before a batch norm, or {', '.join(_NORM)} of a batch norm."
            )
        names = _LINEAR if linear else _NORM
        layers[prefix] = {entry: names[entry] for entry in entries}
    return layers


def _from_tensor(tensor: Any) -> jax.Array:
    # A copy: jax may otherwise share the tensor's memory, and PyTorch trains in place.
    return jnp.array(tensor.detach().cpu().numpy(), copy=True)


def _to_tensor(array: Any, like: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array)).to(like)
