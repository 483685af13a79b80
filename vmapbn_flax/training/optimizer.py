"""The optimizer that a config names, and its learning rate at each step."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vmapbn_flax.training.hyperparameters import Hyperparameters


def learning_rate(optimizer: ConfigDict, hyper: Hyperparameters, step: Int[Array, ""]) -> Float[Array, ""]:
    """The learning rate of the update that leads from `step` to `step + 1`.

    optax's schedules run in units of a phase, not of a step. The lengths of the phases thereby stay traced numbers, so
    that one program serves every length.
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
    """`config.optimizer` at one learning rate. The form of its state does not depend on the hyperparameters.

    The moments of all parameters lie in one vector, which a CPU updates in one pass.
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
