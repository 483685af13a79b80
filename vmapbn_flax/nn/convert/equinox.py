"""Conversion to and from Equinox."""

from typing import Any

import jax
import jax.numpy as jnp

from vmapbn_flax.nn.convert.layers import Layer, Variables, join, require_fit, split, to_kernel, to_weight

# 1 - momentum**_SETTLED is 1 for every momentum that float32 can tell from 1.
_SETTLED = 2**30


def from_equinox(model: Any, state: Any) -> dict[str, Any]:
    """Variables of `MLP` or `ConvNet` from an Equinox network and its `State`.

    A trained network evaluates the same in both libraries, whatever the `mode` of its batch norms: the result
    holds the running statistics that Equinox would normalise by. With `mode="batch"` it also trains the same;
    `mode="ema"` normalises a training batch by running statistics.

    Args:
      model: of `Linear` and `BatchNorm` layers, or of `Conv2d` and `BatchNorm` layers and a `Linear`.
      state: of `model`.

    Returns:
      `{"params": ..., "batch_stats": ...}`; without `batch_stats` if the network has no batch norm.

    Raises:
      ValueError: the layers are not those of such a network.
    """
    import equinox as eqx

    linear, norm = [], []
    for layer in _layers(model):
        if isinstance(layer, eqx.nn.BatchNorm):
            mean, var = _statistics(layer, state)
            norm.append(_present(scale=layer.weight, bias=layer.bias, mean=mean, var=var))
        else:
            bias = None if layer.bias is None else layer.bias.reshape(-1)  # (features, 1, 1) of a convolution
            linear.append(_present(kernel=to_kernel(layer.weight), bias=bias))
    return join(linear, norm)


def to_equinox(variables: Variables, model: Any, state: Any) -> tuple[Any, Any]:
    """The inverse of `from_equinox`: the Equinox `model` and `state` with the numbers of `variables`.

    In `mode="batch"` Equinox divides its running statistics by 1 - momentum**steps before it uses them.
    Our statistics need no such correction, so the step counters are set so high that the divisor is 1.

    Args:
      variables: of `MLP` or `ConvNet`.
      model: the target network, from `equinox.nn.make_with_state`; not changed.
      state: of that network, from the same call; not changed.

    Returns:
      A new model and a new state.

    Raises:
      ValueError: `model` is not such a network, or `variables` do not fit it.
    """
    import equinox as eqx

    require_fit(variables, from_equinox(model, state))
    linear, norm = map(iter, split(variables))
    state = jax.tree.map(lambda leaf: leaf, state)  # `State.set` spoils the object it is called on
    replaced = []
    for layer in _layers(model):
        if isinstance(layer, eqx.nn.BatchNorm):
            fields = next(norm)
            weights = (fields.get("scale"), fields.get("bias"))
            statistics = (fields["mean"], fields["var"])
            if layer.mode == "batch":
                state = state.set(layer.batch_state_index, statistics)
                state = state.set(layer.batch_counter, jnp.array(_SETTLED))
            else:
                state = state.set(layer.ema_state_index, statistics)
                state = state.set(layer.ema_first_time_index, jnp.array(False))
        else:
            fields = next(linear)
            zeros = None if layer.bias is None else jnp.zeros_like(layer.bias)
            bias = fields["bias"].reshape(layer.bias.shape) if "bias" in fields else zeros
            weights = (to_weight(fields["kernel"]), bias)
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, weights, is_leaf=lambda leaf: leaf is None)
        replaced.append(layer)
    return eqx.tree_at(_layers, model, replaced), state


def _layers(model: Any) -> list[Any]:
    import equinox as eqx

    def is_layer(node: Any) -> bool:
        return isinstance(node, eqx.nn.Linear | eqx.nn.Conv | eqx.nn.BatchNorm)

    return [leaf for leaf in jax.tree.leaves(model, is_leaf=is_layer) if is_layer(leaf)]


def _statistics(layer: Any, state: Any) -> tuple[jax.Array, jax.Array]:
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
