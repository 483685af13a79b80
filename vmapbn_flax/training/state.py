"""The state of training, and its start."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vmapbn_flax.errors import UsageError
from vmapbn_flax.networks import BUILT_IN
from vmapbn_flax.training.hyperparameters import Hyperparameters
from vmapbn_flax.training.metrics import TrainMetrics
from vmapbn_flax.training.network import make_network, to_inputs
from vmapbn_flax.training.optimizer import initial_state

# A scalar inside a step, an array with one entry a member around a vmap. JAX may rebuild the tree with other leaves, so
# that no field can be annotated as an array.
Count = Any


class TrainState(struct.PyTreeNode):
    """All that a checkpoint must hold: everything random is a function of (seed, step)."""

    step: Count
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    metrics: TrainMetrics  # of the steps since the last training row
    skipped_steps: Count  # steps with a non-finite loss or gradient, since the start
    skipped_in_a_row: Count


def create_state(
    model: ConfigDict, optimizer: ConfigDict, num_classes: int, image_shape: tuple[int, ...], hyper: Hyperparameters
) -> TrainState:
    """The state before the first step; to be jitted, which saves a second.

    Raises:
      UsageError: the network does not give `num_classes` logits, or does not take images of that shape.
    """
    inputs = to_inputs(model, jnp.zeros((1, *image_shape), jnp.uint8)).astype(jnp.float32)
    network = make_network(model, num_classes, hyper)
    try:
        logits, variables = network.init_with_output(jax.random.key(hyper["seed"]), inputs, train=False)
    except ValueError as error:
        if model.name not in BUILT_IN:
            raise  # with the traceback, which its author needs
        raise UsageError(f"config.model: {error}") from error
    if getattr(logits, "shape", None) != (1, num_classes):
        raise UsageError(
            f"config.model.name: got logits of shape {jnp.shape(logits)[1:]} for one image from {model.name}, expected "
            f"({num_classes},), as many as its num_classes"
        )
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=initial_state(optimizer, params),
        metrics=TrainMetrics.empty(),
        skipped_steps=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )
