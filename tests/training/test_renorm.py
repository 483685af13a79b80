"""`model.norm` "renorm" and "batched_renorm" in the programs of a run."""

import jax
import numpy as np
import pytest

from tests.helpers import oracle, small
from vmapbn_flax.training.steps import epoch_permutation

SOON = {"model__renorm_warmup_epochs": 0.5, "model__renorm_full_epochs": 1.0}  # 3 and 6 of 24 steps


def close(state, other):
    small.assert_close((state.params, state.batch_stats), (other.params, other.batch_stats), rtol=1e-4, atol=1e-5)


def test_it_is_batch_norm_until_the_limits_grow_and_something_else_then():
    plain, programs = small.programs(), small.programs(model__norm="renorm", **SOON)
    for count in (3, 4):  # the limits grow after the third step, from 1 and 0 in the fourth
        state, other = small.advanced(programs, count), small.advanced(plain, count)
        assert state.batch_stats["norm_0"].pop("count") == count
        close(state, other)
    ours, theirs = (small.advanced(each, 8).params["logits"]["kernel"] for each in (programs, plain))
    assert np.abs(ours - theirs).max() > 1e-3


def test_the_vmapped_and_the_batched_one_train_alike():
    state, twin = (
        small.advanced(small.programs(model__norm=norm, **SOON), 24) for norm in ("renorm", "batched_renorm")
    )
    close(state, twin)


def test_a_step_normalises_by_the_formula():
    """The first layer's statistics and the logits, from the state after 12 steps, in float64."""
    programs = small.programs(model__norm="renorm", **SOON)
    state = programs.place(small.advanced(programs, 12))
    logits, _ = programs.gradients(state, 12)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    rows = epoch_permutation(0, 2, 100)[: small.BATCH]
    x = small.dataset().train.images[rows].reshape(small.BATCH, -1) / 255 @ params["dense_0"]["kernel"]
    correct = oracle.correction(state.batch_stats["norm_0"], r_max=3.0, d_max=5.0)
    y = oracle.batch_norm(x, **params["norm_0"], correct=correct).y
    want = 1 / (1 + np.exp(-y)) @ params["logits"]["kernel"] + params["logits"]["bias"]
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)


def test_population_statistics_leave_the_count():
    programs = small.programs(model__norm="renorm", **SOON)
    state = programs.place(small.advanced(programs, 5))
    found, plain = programs.population_statistics(state), small.programs()
    assert found["norm_0"].pop("count") == 5
    moments = {name: state.batch_stats["norm_0"][name] for name in ("mean", "var")}
    want = plain.population_statistics(state.replace(batch_stats={"norm_0": moments}))
    small.assert_close(found, want)


@pytest.mark.parametrize("norm", ["renorm", "batched_renorm"])
def test_ghost_batches_and_padding(norm):
    """Groups, each corrected on its own, on batches padded to the devices: as without."""
    changes = {"model__norm": norm, "model__ghost_batch_size": 4, **SOON}
    state = small.advanced(small.programs(**changes), 24)
    close(state, small.advanced(small.programs(**changes | {"model__norm": "renorm"}), 24))
    assert state.batch_stats["norm_0"]["count"] == 24
