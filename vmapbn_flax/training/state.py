"""What training carries from step to step, and how it starts: state, hyperparameters, optimizer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.nn import MLP, BatchedMLP, VmapBatch
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.training.metrics import TrainMetrics

# Scalar fields of a pytree: one number to a step, a stack of them around a vmap, and whatever else JAX
# rebuilds the tree with. A field cannot be annotated as an array.
Number = Any
Count = Any


class Hyperparameters(struct.PyTreeNode):
    """The numbers of a run that its compiled program takes as arguments."""

    seed: Count
    batch_norm_momentum: Number
    batch_norm_epsilon: Number
    learning_rate: Number
    weight_decay: Number
    adam_b1: Number
    adam_b2: Number
    sgd_momentum: Number
    label_smoothing: Number
    warmup_steps: Count
    total_steps: Count


# The fields of a config that `make_hyperparameters` reads and no program is compiled for: runs that differ
# in nothing else train in one program. (It reads `train.num_epochs` too, but that many epochs are looped over.)
TRACED_FIELDS = (
    "seed",
    "model.batch_norm_momentum",
    "model.batch_norm_epsilon",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.adam_b1",
    "optimizer.adam_b2",
    "optimizer.sgd_momentum",
    "optimizer.warmup_epochs",
    "train.label_smoothing",
)


class TrainState(struct.PyTreeNode):
    """All that a checkpoint has to hold; everything random is a function of (seed, step)."""

    step: Count
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    metrics: TrainMetrics  # of the steps since the last training row
    skipped_steps: Count  # non-finite steps, since the start
    skipped_in_a_row: Count


def steps_in(epochs: float, steps_per_epoch: int) -> int:
    """Epochs, which may be fractions, as a whole number of steps."""
    return round(epochs * steps_per_epoch)


def make_hyperparameters(config: ConfigDict, steps_per_epoch: int) -> Hyperparameters:
    """The traced numbers of `config`."""
    return Hyperparameters(
        seed=np.uint32(config.seed),
        batch_norm_momentum=np.float32(config.model.batch_norm_momentum),
        batch_norm_epsilon=np.float32(config.model.batch_norm_epsilon),
        learning_rate=np.float32(config.optimizer.learning_rate),
        weight_decay=np.float32(config.optimizer.weight_decay),
        adam_b1=np.float32(config.optimizer.adam_b1),
        adam_b2=np.float32(config.optimizer.adam_b2),
        sgd_momentum=np.float32(config.optimizer.sgd_momentum),
        label_smoothing=np.float32(config.train.label_smoothing),
        warmup_steps=np.int32(steps_in(config.optimizer.warmup_epochs, steps_per_epoch)),
        total_steps=np.int32(steps_in(config.train.num_epochs, steps_per_epoch)),
    )


def make_network(model: ConfigDict, num_classes: int, hyper: Hyperparameters, *, ghost: bool = False) -> nn.Module:
    """The network of `config.model`, on `(batch, features)`, or `(group, batch, features)` with `ghost`."""
    sizes = {"hidden": tuple(model.hidden), "num_classes": num_classes}
    numbers = {
        "momentum": hyper.batch_norm_momentum,
        "epsilon": hyper.batch_norm_epsilon,
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
    warmup, total = hyper.warmup_steps, hyper.total_steps
    shape = optax.linear_schedule(0.0, 1.0, transition_steps=1)(step / jnp.maximum(warmup, 1))
    after = jnp.ones(())
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(1.0, decay_steps=1)((step - warmup) / jnp.maximum(total - warmup, 1))
    return hyper.learning_rate * jnp.where(step < warmup, shape, after)


def make_optimizer(
    optimizer: ConfigDict, hyper: Hyperparameters, learning_rate: Float[Array, ""] | float
) -> optax.GradientTransformation:
    """`config.optimizer` at one learning rate; its state does not depend on any number.

    The moments of all parameters lie in one vector, which a CPU goes through in one pass.
    """
    decay = optax.add_decayed_weights(
        hyper.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    adam = optax.flatten(optax.scale_by_adam(hyper.adam_b1, hyper.adam_b2))
    transformations = {
        "adam": (decay, adam),
        "adamw": (adam, decay),
        "sgd": (decay, optax.flatten(optax.trace(hyper.sgd_momentum))),
    }
    return optax.chain(*transformations[optimizer.name], optax.scale_by_learning_rate(learning_rate))


def create_state(
    model: ConfigDict, optimizer: ConfigDict, num_classes: int, num_features: int, hyper: Hyperparameters
) -> TrainState:
    """The state before the first step; to be jitted, which takes a second less than running it as is."""
    network = make_network(model, num_classes, hyper)
    variables = network.init(jax.random.key(hyper.seed), jnp.zeros((1, num_features)), train=False)
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
