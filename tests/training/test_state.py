from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small
from vmapbn_flax.training.state import learning_rate, make_optimizer

TOTAL = 4 * small.STEPS_PER_EPOCH


# The schedule.


def rates(schedule, peak, warmup, total=TOTAL):
    """Our learning rates at every step, and some after the last."""
    config = small.config(optimizer__schedule=schedule)
    changes = {"optimizer__warmup_steps": warmup, "train__num_steps": total}
    hyper = small.hyper(config, optimizer__learning_rate=peak, **changes)
    return jax.vmap(partial(learning_rate, config.optimizer, hyper))(jnp.arange(TOTAL + 5))


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL - 1])
def test_cosine_is_optax_s(warmup):
    expected = optax.warmup_cosine_decay_schedule(0.0, 0.3, warmup, TOTAL)
    got = rates("cosine", 0.3, warmup)
    np.testing.assert_allclose(got, [expected(i) for i in range(TOTAL + 5)], rtol=1e-5, atol=1e-8)
    assert got[warmup] == np.float32(0.3)
    assert got[TOTAL] == 0


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL])
def test_constant_is_optax_s(warmup):
    expected = optax.warmup_constant_schedule(0.0, 0.3, warmup) if warmup else optax.constant_schedule(0.3)
    np.testing.assert_allclose(rates("constant", 0.3, warmup), [expected(i) for i in range(TOTAL + 5)], rtol=1e-6)


def test_warm_up_to_the_end_is_a_line():
    np.testing.assert_allclose(rates("cosine", 0.24, TOTAL)[:TOTAL], 0.01 * np.arange(TOTAL), rtol=1e-6)


# The optimizer.

KERNELS = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}}


def decay(weight_decay):
    return optax.add_decayed_weights(weight_decay, mask=KERNELS)


OPTAX = {
    "adam": lambda wd: optax.chain(decay(wd), optax.adam(0.1, 0.8, 0.95)),
    "adamw": lambda wd: optax.adamw(0.1, 0.8, 0.95, weight_decay=wd, mask=KERNELS),
    "sgd": lambda wd: optax.chain(decay(wd), optax.sgd(0.1, 0.7)),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", OPTAX)
def test_optimizer_is_optax_s(name, weight_decay):
    rng = np.random.default_rng(0)

    def tree():
        draw = {"dense": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}, "norm": {"scale": [1.5, 2]}}
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw, is_leaf=lambda x: isinstance(x, list))

    config = small.config(optimizer__name=name)
    numbers = {"weight_decay": weight_decay, "adam_b1": 0.8, "adam_b2": 0.95, "sgd_momentum": 0.7}
    hyper = small.hyper(config, **{f"optimizer__{name}": number for name, number in numbers.items()})
    params, gradients = tree(), [tree() for _ in range(3)]

    @jax.jit
    def train(hyper):
        results = []
        for optimizer in (make_optimizer(config.optimizer, hyper, 0.1), OPTAX[name](weight_decay)):
            moved, state = params, optimizer.init(params)
            for gradient in gradients:
                updates, state = optimizer.update(gradient, state, moved)
                moved = optax.apply_updates(moved, updates)
            results.append(moved)
        return results

    small.assert_close(*train(hyper), rtol=1e-6)


# Where a run starts.


def test_variants_start_alike():
    vmap, batched, plain = (
        programs.create()
        for programs in (small.programs(), small.programs(model__norm="batched"), small.programs(model__norm="none"))
    )
    small.assert_same_bits(batched, vmap)
    assert plain.batch_stats == {}
    for layer, params in plain.params.items():
        small.assert_same_bits(params, vmap.params[layer])


def test_start():
    state = small.programs().create()
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (0, 0, 0)
    for stats in state.batch_stats.values():
        np.testing.assert_array_equal(stats["mean"], 0)
        np.testing.assert_array_equal(stats["var"], 1)
    assert state.metrics.loss.count == 0


# Numbers are arguments of a program.


def test_one_program_for_every_number():
    config, step, start, batch = small.config(), small.train_step(), small.start(), small.batch()
    different = [
        small.hyper(config, **numbers)
        for numbers in (
            {},
            {"optimizer__learning_rate": 0.3, "model__batch_norm_momentum": 0.5},
            {
                "train__label_smoothing": 0.2,
                "optimizer__weight_decay": 0.1,
                "optimizer__adam_b1": 0.5,
                "model__batch_norm_epsilon": 0.1,
            },
            {"optimizer__warmup_steps": 9, "train__num_steps": 99, "seed": 5},
        )
    ]
    step(start, different[0], batch)
    programs = step._cache_size()
    results = [step(start, hyper, batch)[0] for hyper in different]
    assert step._cache_size() == programs
    kernels = [np.asarray(state.params["dense_0"]["kernel"]) for state in results]
    assert all(not np.array_equal(a, b) for i, a in enumerate(kernels) for b in kernels[:i])


def test_vmap_over_seeds_and_learning_rates_is_each_alone():
    _, hypers, start, step = small.members()
    small.assert_close(small.member(0, start).params, small.programs().create().params)
    small.assert_same_bits(small.member(0, start), small.member(2, start))
    together = start
    for i in range(3):
        together, _ = step(together, small.stack(hypers), small.batch(seed=i))
    for member, hyper in enumerate(hypers):
        alone = small.member(member, start)
        for i in range(3):
            alone, _ = small.train_step(optimizer__name="sgd")(alone, hyper, small.batch(seed=i))
        small.assert_close(small.member(member, together), alone)
