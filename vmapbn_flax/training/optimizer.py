"""The optimizer that a config names, and its learning rate at each step."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.training.hyperparameters import Hyperparameters

_ADAM_EPS = 1e-8


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


def initial_state(optimizer: ConfigDict, params: PyTree) -> optax.OptState:
    """The state of `config.optimizer` before the first update, in the form that optax gives it."""
    transformation = optax.trace(0.0) if optimizer.name == "sgd" else optax.scale_by_adam()
    return transformation.init(params)


def apply_gradients(
    optimizer: ConfigDict,
    hyper: Hyperparameters,
    learning_rate: Float[Array, ""],
    params: PyTree,
    state: optax.OptState,
    grads: PyTree,
    allowed: Bool[Array, ""],
) -> tuple[PyTree, optax.OptState]:
    """Parameters and state after an update by `config.optimizer`; as they were, unless it is `allowed`.

    It is optax's update, but from the moments that are kept. From new ones of which a later choice may keep the old,
    XLA's CPU code would compute them twice, and copy the old ones.
    """

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(partial(jnp.where, allowed), new, old)

    def decayed(updates: PyTree) -> PyTree:
        rate = hyper["optimizer.weight_decay"]
        return jax.tree.map(lambda update, param: update + rate * param if param.ndim > 1 else update, updates, params)

    decoupled = optimizer.name == "adamw"
    moments = _next_moments(hyper, state, grads if decoupled else decayed(grads))
    state = choose(moments, state)
    updates = decayed(_updates(hyper, state)) if decoupled else _updates(hyper, state)
    return choose(jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), params), state


def _next_moments(hyper: Hyperparameters, state: optax.OptState, grads: PyTree) -> optax.OptState:
    if isinstance(state, optax.TraceState):
        momentum = hyper["optimizer.sgd_momentum"]
        return optax.TraceState(jax.tree.map(lambda g, t: g + momentum * t, grads, state.trace))
    mu = optax.tree.update_moment(grads, state.mu, hyper["optimizer.adam_b1"], order=1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, hyper["optimizer.adam_b2"], order=2)
    return optax.ScaleByAdamState(state.count + 1, mu, nu)


def _updates(hyper: Hyperparameters, state: optax.OptState) -> PyTree:
    if isinstance(state, optax.TraceState):
        return state.trace
    # Scalars that correct the moments' bias; dividing the moments themselves, as optax does, takes longer.
    mu_scale, nu_scale = (1 / (1 - hyper[f"optimizer.adam_{b}"] ** state.count) for b in ("b1", "b2"))
    return jax.tree.map(lambda m, v: mu_scale * m / (jnp.sqrt(nu_scale * v) + _ADAM_EPS), state.mu, state.nu)
