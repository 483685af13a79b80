"""`model.freeze_norm_after`: from there on, training normalises by the running statistics, and leaves them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small
from vmapbn_flax.training.network import make_network, to_inputs
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.steps import make_loss

FREEZE = {"model__freeze_norm_after": 1.5}  # 9 of 24 steps, in the middle of an epoch


def test_statistics_stay_and_the_rest_trains():
    programs, plain = small.programs(**FREEZE), small.programs()
    small.assert_same_bits(small.advanced(programs, 9), small.advanced(plain, 9))
    at, end = small.advanced(programs, 9), small.advanced(programs, 24)
    small.assert_same_bits(end.batch_stats, at.batch_stats)
    assert end.step == 24
    for before, after in zip(jax.tree.leaves(at.params), jax.tree.leaves(end.params), strict=True):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("counts", [(24,), (8, 1, 1, 14), (6, 6, 12)])
def test_any_chunks_have_the_same_bits(counts):
    """Whatever chunk the step lies in, and with two programs in all."""
    programs = small.programs(**FREEZE)
    small.assert_same_bits(small.advanced(programs, *counts), small.advanced(programs, 9, 15))
    assert {"train", "train_frozen"} < set(programs.compiler._programs)


def test_resumed_before_and_after():
    programs = small.programs(**FREEZE)
    whole = small.advanced(programs, 24)
    for step in (5, 9, 14):
        state = programs.place(small.advanced(programs, step))
        fresh = Programs([small.config(**FREEZE)], small.dataset())
        fresh.compile_ahead(step)
        assert list(fresh.compiler._programs) == ["train" if step < 9 else "train_frozen"]
        small.assert_same_bits(small.advanced(fresh, 24 - step, state=state, step=step), whole)


@pytest.mark.parametrize(
    "changes", [{}, {"model__norm": "batched"}, {"model__norm": "renorm"}, {"model__ghost_batch_size": 4}], ids=str
)
def test_gradients_are_those_of_evaluation(changes):
    """By autodiff of the evaluated network: its norms are affine maps."""
    config = small.config(**changes)
    state, hyper, batch = small.programs(**changes).create(), small.hyper(config), small.batch()
    frozen = jax.grad(make_loss(config.model, small.CLASSES, freeze_norm=True), has_aux=True)

    def evaluated(params, hyper):
        network = make_network(config.model, small.CLASSES, hyper)
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits = network.apply(variables, to_inputs(config.model, batch.images), train=False)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))

    grads, (_, _, stats) = jax.jit(frozen)(state.params, state.batch_stats, hyper, batch, state.step)
    small.assert_close(grads, jax.jit(jax.grad(evaluated))(state.params, hyper))
    small.assert_same_bits(stats, state.batch_stats)
