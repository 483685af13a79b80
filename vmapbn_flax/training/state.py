"""What training carries from step to step, and how it starts: state, network, optimizer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.nn import MLP, BatchedMLP, VmapBatch
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.training.hyperparameters import Hyperparameters
from vmapbn_flax.training.metrics import TrainMetrics

# Scalar fields of a pytree: one number to a step, a stack of them around a vmap, and whatever else JAX
# rebuilds the tree with. A field cannot be annotated as an array.
Count = Any


class TrainState(struct.PyTreeNode):
    """All that a checkpoint has to hold; everything random is a function of (seed, step)."""

    step: Count
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    metrics: TrainMetrics  # of the steps since the last training row
    skipped_steps: Count  # non-finite steps, since the start
    skipped_in_a_row: Count


def make_network(model: ConfigDict, num_classes: int, hyper: Hyperparameters, *, ghost: bool = False) -> nn.Module:
    """The network of `config.model`, on `(batch, features)`, or `(group, batch, features)` with `ghost`."""
    sizes = {"hidden": tuple(model.hidden), "num_classes": num_classes}
    numbers = {
        "momentum": hyper["model.batch_norm_momentum"],
        "epsilon": hyper["model.batch_norm_epsilon"],
        "replica_axis_name": "group" if ghost else (),
    }
    if model.norm == "none":
        return VmapBatch(MLP(**sizes, norm=None))
    if model.norm == "vmap":
        network = MLP(**sizes, norm=partial(BatchNorm, **numbers))
        return VmapBatch(network, axis_name=("group", "batch") if ghost else "batch")
    network = BatchedMLP(**sizes, norm=partial(BatchedBatchNorm, **numbers))
    return VmapBatch(network, axis_name="group") if ghost else network


def learning_rate(optimizer: ConfigDict, hyper: Hyperparameters, step: Int[Array, ""]) -> Float[Array, ""]:
    """The learning rate of the update that leads from `step` to `step + 1`.

    optax's schedules, in units of a phase rather than of a step: that leaves the lengths of the phases
    to be traced numbers, which a program is not compiled for.
    """
    warmup, total = hyper["optimizer.warmup_steps"], hyper["train.num_steps"]
    shape = optax.linear_schedule(0.0, 1.0, transition_steps=1)(step / jnp.maximum(warmup, 1))
    after = jnp.ones(())
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(1.0, decay_steps=1)((step - warmup) / jnp.maximum(total - warmup, 1))
    return hyper["optimizer.learning_rate"] * jnp.where(step < warmup, shape, after)


def make_optimizer(
    optimizer: ConfigDict, hyper: Hyperparameters, learning_rate: Float[Array, ""] | float
) -> optax.GradientTransformation:
    """`config.optimizer` at one learning rate; its state does not depend on any number.

    The moments of all parameters lie in one vector, which a CPU goes through in one pass.
    """
    decay = optax.add_decayed_weights(
        hyper["optimizer.weight_decay"], mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    adam = optax.flatten(optax.scale_by_adam(hyper["optimizer.adam_b1"], hyper["optimizer.adam_b2"]))
    transformations = {
        "adam": (decay, adam),
        "adamw": (adam, decay),
        "sgd": (decay, optax.flatten(optax.trace(hyper["optimizer.sgd_momentum"]))),
    }
    return optax.chain(*transformations[optimizer.name], optax.scale_by_learning_rate(learning_rate))


def create_state(
    model: ConfigDict, optimizer: ConfigDict, num_classes: int, num_features: int, hyper: Hyperparameters
) -> TrainState:
    """The state before the first step; to be jitted, which takes a second less than running it as is."""
    network = make_network(model, num_classes, hyper)
    variables = network.init(jax.random.key(hyper["seed"]), jnp.zeros((1, num_features)), train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=make_optimizer(optimizer, hyper, 0.0).init(params),
        metrics=TrainMetrics.empty(),
        skipped_steps=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )
