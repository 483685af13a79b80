"""Percentiles of what layers give, over the first test examples: `config.train.watch`."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Int, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.errors import UsageError
from vmapbn_flax.training.hyperparameters import Hyperparameters, make_hyperparameters
from vmapbn_flax.training.layout import ONE_DEVICE, Layout
from vmapbn_flax.training.network import in_compute_dtype, make_network, to_inputs
from vmapbn_flax.training.state import create_state

LOGGED = (15, 50, 85)  # percentiles, as in figure 1 of Ioffe & Szegedy (2015)

Percentiles = dict[str, Any]  # from the 0th to the 100th, `(101,)`, by the name in `config.train.watch`


def make_watch(
    model: ConfigDict, names: Sequence[str], count: int, batch_size: int, num_classes: int, layout: Layout = ONE_DEVICE
) -> Callable[..., Percentiles]:
    """`watch(params, batch_stats, hyper, images, labels) -> Percentiles` of what layers give in evaluation.

    Args:
      names: of layers, as in `config.train.watch`.
      count: the first so many examples are watched, at most `batch_size`.
    """
    size = layout.padded(batch_size)

    def watch(
        params: Any,
        batch_stats: Any,
        hyper: Hyperparameters,
        images: UInt8[Array, "*stored"],
        labels: Int[Array, "*labels"],
    ) -> Percentiles:
        rows = jnp.minimum(jnp.arange(size), count - 1)
        batch, _ = layout.take(images, labels, rows, jnp.zeros((), jnp.int32))
        variables = {"params": in_compute_dtype(model, params), "batch_stats": batch_stats}
        outputs = _outputs(make_network(model, num_classes, hyper), variables, to_inputs(model, batch))
        found = {}
        for name in names:
            layer, unit = _parse(name)
            x = jnp.concatenate([each[:count].reshape(-1, each.shape[-1]) for each in outputs[layer]])
            x = x if unit is None else x[:, unit]
            found[name] = jnp.percentile(x.astype(jnp.float32), np.arange(101.0))
        return found

    return watch


def percentile_figures(watched: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation row, such as `dense_0_p15`."""
    return {f"{name}_p{number}": float(values[number]) for name, values in watched.items() for number in LOGGED}


def require_watched(config: ConfigDict, num_classes: int, image_shape: tuple[int, ...]) -> None:
    """Checks that the network has what `config.train.watch` names.

    Raises:
      UsageError: it has no such layer, or a layer has no such unit.
    """
    if not config.train.watch:
        return
    model = config.model

    def outputs(hyper: Hyperparameters) -> PyTree:
        state = create_state(model, config.optimizer, num_classes, image_shape, hyper)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        images = jnp.zeros((1, *image_shape), jnp.uint8)
        return _outputs(make_network(model, num_classes, hyper), variables, to_inputs(model, images))

    found = jax.eval_shape(outputs, make_hyperparameters(config, 1))
    for name in config.train.watch:
        layer, unit = _parse(name)
        if layer not in found:
            raise UsageError(
                f"config.train.watch: got {layer!r}, which the network does not have; expected one of "
                f"{', '.join(found)}. Change it with --config.train.watch=..."
            )
        units = found[layer][0].shape[-1]
        if unit is not None and unit >= units:
            raise UsageError(
                f"config.train.watch: got {name!r}, expected a unit from 0 to {units - 1}, the last axis of {layer}. "
                f"Change it with --config.train.watch=..."
            )


def _parse(name: str) -> tuple[str, int | None]:
    """The layer and the unit of a name such as `norm_2[5]`."""
    layer, unit = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", name).groups()  # type: ignore[union-attr]
    return layer, None if unit is None else int(unit)


def _outputs(network: nn.Module, variables: dict[str, PyTree], x: Array) -> dict[str, list[Array]]:
    """What each layer gives in each of its calls, `(batch, ..., units)`, and what the network sows, by path."""
    _, kept = network.apply(variables, x, train=False, capture_intermediates=True)
    found: dict[str, list[Array]] = {}
    for path, values in flatten_dict(kept["intermediates"]).items():
        name = "/".join(path[:-1] if path[-1] == "__call__" else path)
        arrays = [value for value in values if isinstance(value, jax.Array) and value.ndim > 1]
        if name and len(arrays) == len(values):
            found[name] = arrays
    return found
