import numpy as np

from tests.helpers import small

# Where a run starts.


def test_variants_start_alike():
    vmap, batched, plain = (
        programs.create()
        for programs in (small.programs(), small.programs(model__norm="batched"), small.programs(model__norm="none"))
    )
    small.assert_same_bits(batched, vmap)
    assert plain.batch_stats == {}
    for layer, params in plain.params.items():
        small.assert_same_bits(params["kernel"], vmap.params[layer]["kernel"])


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
            alone, _ = small.train_step()(alone, hyper, small.batch(seed=i))
        small.assert_close(small.member(member, together), alone)
