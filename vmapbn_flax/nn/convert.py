"""Conversion of the variables of `MLP` to and from PyTorch and Equinox, number for number.

flax.linen needs no conversion: our `{"params": ..., "batch_stats": ...}` has the tree of
`flax.linen.BatchNorm`. The PyTorch or Equinox network may use any names, as long as it registers its linear
layers and its batch norms in the order in which it applies them:

    variables = from_torch(network.state_dict())
    network.load_state_dict(to_torch(variables, network.state_dict()))

    variables = from_equinox(model, state)
    model, state = to_equinox(variables, model, state)

A linear layer that a batch norm follows has no bias in `MLP`. If it has one in the other network, it is converted
without a change of what the network computes, in training or evaluation: from there, the running mean takes it in
(mean - bias); to there, it is zero. So variables of `MLP` come back bit for bit from either form of network. A
network comes back bit for bit if these layers have `bias=False` (`use_bias=False`), else with their biases zero.

Activations, epsilon and momentum are not variables and are not converted. PyTorch's `momentum` is 1 minus
ours. Its running variance is that of `unbiased_running_var=True`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Variables = Mapping[str, Mapping[str, Any]]
Layer = dict[str, Any]  # parameters and statistics of one layer, by our names

_TORCH_LINEAR = {"weight": "kernel", "bias": "bias"}  # or without the bias
_TORCH_STATISTICS = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
_TORCH_NORM = {"weight": "scale", "bias": "bias", **_TORCH_STATISTICS}

# 1 - momentum**_SETTLED is 1 for every momentum that float32 can tell from 1.
_SETTLED = 2**30


def from_torch(state_dict: Mapping[str, Any], *, cumulative: bool = False) -> dict[str, Any]:
    """Variables of `MLP` from the state dict of a PyTorch network of Linear and BatchNorm1d layers.

    Args:
      state_dict: tensors by name, on any device; copied.
      cumulative: whether the layers average over all steps (`momentum=None`, in PyTorch and here). Then
        `num_batches_tracked` becomes the statistic `count`. Otherwise it is left out.

    Returns:
      `{"params": ..., "batch_stats": ...}`; without `batch_stats` if the network has no batch norm.

    Raises:
      ValueError: the entries are not those of such a network.
    """
    dense, norm = [], []
    for prefix, names in _torch_layers(state_dict).items():
        layer = {ours: _from_tensor(state_dict[prefix + theirs]) for theirs, ours in names.items()}
        if "kernel" in layer:
            dense.append({**layer, "kernel": layer["kernel"].T})
        else:
            count = {"count": layer.pop("count").astype(jnp.int32)}
            norm.append({**layer, **count} if cumulative else layer)
    return _join(dense, norm)


def to_torch(variables: Variables, like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `from_torch`: the state dict `like` with the numbers of `variables`.

    Args:
      variables: of `MLP`.
      like: `network.state_dict()` of the target network; not changed. It gives the names, dtypes and
        devices, and `num_batches_tracked` unless the statistics have a `count`.

    Returns:
      A new state dict, for `network.load_state_dict`.

    Raises:
      ValueError: `like` is not of such a network, or `variables` do not fit it.
    """
    cumulative = any("count" in layer for layer in variables.get("batch_stats", {}).values())
    _require_fit(variables, from_torch(like, cumulative=cumulative))
    dense, norm = map(iter, _split(variables))
    state_dict = dict(like)
    for prefix, names in _torch_layers(like).items():
        layer = dict(next(dense) if "kernel" in names.values() else next(norm))
        if "kernel" in layer:
            layer["kernel"] = layer["kernel"].T
        for theirs, ours in names.items():
            tensor = like[prefix + theirs]
            if ours in layer:
                state_dict[prefix + theirs] = _to_tensor(layer[ours], tensor)
            elif ours == "bias":
                state_dict[prefix + theirs] = tensor.new_zeros(tensor.shape)
    return state_dict


def from_equinox(model: Any, state: Any) -> dict[str, Any]:
    """Variables of `MLP` from an Equinox network of `Linear` and `BatchNorm` layers and its `State`.

    A trained network evaluates the same in both libraries, whatever the `mode` of its batch norms: the result
    holds the running statistics that Equinox would normalise by. With `mode="batch"` it also trains the same;
    `mode="ema"` normalises a training batch by running statistics.

    Returns:
      `{"params": ..., "batch_stats": ...}`; without `batch_stats` if the network has no batch norm.

    Raises:
      ValueError: the layers are not those of an MLP.
    """
    import equinox as eqx

    dense, norm = [], []
    for layer in _equinox_layers(model):
        if isinstance(layer, eqx.nn.Linear):
            dense.append(_present(kernel=layer.weight.T, bias=layer.bias))
        else:
            mean, var = _equinox_statistics(layer, state)
            norm.append(_present(scale=layer.weight, bias=layer.bias, mean=mean, var=var))
    return _join(dense, norm)


def to_equinox(variables: Variables, model: Any, state: Any) -> tuple[Any, Any]:
    """The inverse of `from_equinox`: the Equinox `model` and `state` with the numbers of `variables`.

    In `mode="batch"` Equinox divides its running statistics by 1 - momentum**steps before it uses them.
    Our statistics need no such correction, so the step counters are set so high that the divisor is 1.

    Args:
      variables: of `MLP`.
      model: the target network, from `equinox.nn.make_with_state`; not changed.
      state: of that network, from the same call; not changed.

    Returns:
      A new model and a new state.

    Raises:
      ValueError: `model` is not an MLP, or `variables` do not fit it.
    """
    import equinox as eqx

    _require_fit(variables, from_equinox(model, state))
    dense, norm = map(iter, _split(variables))
    state = jax.tree.map(lambda leaf: leaf, state)  # `State.set` spoils the object it is called on
    replaced = []
    for layer in _equinox_layers(model):
        if isinstance(layer, eqx.nn.Linear):
            fields = next(dense)
            bias = None if layer.bias is None else fields.get("bias", jnp.zeros_like(layer.bias))
            weights = (fields["kernel"].T, bias)
        else:
            fields = next(norm)
            weights = (fields.get("scale"), fields.get("bias"))
            statistics = (fields["mean"], fields["var"])
            if layer.mode == "batch":
                state = state.set(layer.batch_state_index, statistics)
                state = state.set(layer.batch_counter, jnp.array(_SETTLED))
            else:
                state = state.set(layer.ema_state_index, statistics)
                state = state.set(layer.ema_first_time_index, jnp.array(False))
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, weights, is_leaf=lambda leaf: leaf is None)
        replaced.append(layer)
    return eqx.tree_at(_equinox_layers, model, replaced), state


def _join(dense: list[Layer], norm: list[Layer]) -> dict[str, Any]:
    """The variables of `MLP` from its layers in order."""
    if not dense or len(norm) not in (0, len(dense) - 1):
        raise ValueError(
            f"got {len(dense)} linear layers and {len(norm)} batch norms; expected an MLP: a batch norm "
            f"after every linear layer but the last, or none at all."
        )
    params, statistics = {}, {}
    names = [*(f"dense_{i}" for i in range(len(dense) - 1)), "logits"]
    width = None
    for i, (name, layer) in enumerate(zip(names, dense, strict=True)):
        if width not in (None, len(layer["kernel"])):
            raise ValueError(f"got {len(layer['kernel'])} inputs of {name}; expected {width}, as before it.")
        width = layer["kernel"].shape[1]
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
            raise ValueError(f"got no bias for {name}; expected one: only a linear layer before a batch norm has none.")
        params[name] = layer
    return {"params": params, "batch_stats": statistics} if norm else {"params": params}


def _split(variables: Variables) -> tuple[list[Layer], list[Layer]]:
    """The inverse of `_join`."""
    params, statistics = variables["params"], variables.get("batch_stats", {})
    hidden = sum(name.startswith("dense_") for name in params)
    dense = [params[f"dense_{i}"] for i in range(hidden)] + [params["logits"]]
    norm = [f"norm_{i}" for i in range(len(statistics))]
    return dense, [{**params.get(name, {}), **statistics[name]} for name in norm]


def _require_fit(variables: Variables, expected: Variables) -> None:
    """Refuses `variables` whose entries or shapes are not those of `expected`."""

    def shapes(tree: Variables) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(x) for path, x in leaves}

    ours, theirs = shapes(variables), shapes(expected)
    for entry in {**theirs, **ours}:
        got, wanted = ours.get(entry, "nothing"), theirs.get(entry, "nothing")
        if got != wanted:
            raise ValueError(f"got {got} for {entry} in the variables; the network they go to has {wanted}.")


def _torch_layers(state_dict: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Our name of each entry in the state dict, by the prefix of its layer."""
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in state_dict.items():
        prefix, dot, entry = key.rpartition(".")
        tensors.setdefault(prefix + dot, {})[entry] = tensor
    layers = {}
    for prefix, entries in tensors.items():
        linear = entries.keys() in ({"weight"}, _TORCH_LINEAR.keys()) and entries["weight"].ndim == 2
        if not linear and entries.keys() not in (_TORCH_NORM.keys(), _TORCH_STATISTICS.keys()):
            raise ValueError(
                f"got {prefix + '*'!r} with {', '.join(entries)}; expected {', '.join(_TORCH_LINEAR)} of a "
                f"Linear, whose bias may be missing before a batch norm, or {', '.join(_TORCH_NORM)} of a BatchNorm1d."
            )
        names = _TORCH_LINEAR if linear else _TORCH_NORM
        layers[prefix] = {entry: names[entry] for entry in entries}
    return layers


def _from_tensor(tensor: Any) -> jax.Array:
    # A copy: jax may otherwise share the tensor's memory, and PyTorch trains in place.
    return jnp.array(tensor.detach().cpu().numpy(), copy=True)


def _to_tensor(array: Any, like: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array)).to(like)


def _equinox_layers(model: Any) -> list[Any]:
    import equinox as eqx

    def is_layer(node: Any) -> bool:
        return isinstance(node, eqx.nn.Linear | eqx.nn.BatchNorm)

    return [leaf for leaf in jax.tree.leaves(model, is_leaf=is_layer) if is_layer(leaf)]


def _equinox_statistics(layer: Any, state: Any) -> tuple[jax.Array, jax.Array]:
    """The mean and variance that `layer` normalises by at inference; 0 and 1 before any training."""
    if layer.mode == "batch":
        mean, var = state.get(layer.batch_state_index)
        steps = state.get(layer.batch_counter)
        scale = jnp.where(steps == 0, 1, 1 - layer.momentum**steps)
        return mean / scale, var / scale
    mean, var = state.get(layer.ema_state_index)
    untrained = state.get(layer.ema_first_time_index)
    return jnp.where(untrained, 0, mean), jnp.where(untrained, 1, var)


def _present(**entries: Any) -> Layer:
    return {name: value for name, value in entries.items() if value is not None}
