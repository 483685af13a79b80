import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small
from vmapbn_flax.training.optimizer import apply_gradients, initial_state, learning_rate
from vmapbn_flax.training.programs import Programs

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
    """Steps that are not allowed change nothing."""
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
        update = partial(apply_gradients, config.optimizer, hyper, jnp.float32(0.1))
        ours, state = params, initial_state(config.optimizer, params)
        for gradient in gradients:
            ours, state = update(ours, state, gradient, jnp.bool_(True))
            ours, state = update(ours, state, jax.tree.map(lambda g: g * jnp.nan, gradient), jnp.bool_(False))

        optimizer = OPTAX[name](weight_decay)
        theirs, state = params, optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        return ours, theirs

    small.assert_close(*train(hyper), rtol=1e-6)


@pytest.mark.parametrize(("name", "passes"), [("adam", 3), ("adamw", 3), ("sgd", 2)])
def test_passes_over_a_kernel(name, passes):
    """One for each moment, and one for the parameters that reads the new moments; nothing is copied."""
    config = small.config(optimizer__name=name, model__hidden=(24, 40))
    programs = Programs([config], small.dataset())
    programs.advance(programs.create(), 0, 1)
    body = programs.compiler["train"].as_text()
    found = re.findall(r"^  (?:ROOT )?(%\S+) = f32\[24,40\]\S* (fusion|copy|dot)\((.*?)\)", body, re.MULTILINE)
    assert Counter(operation for _, operation, _ in found) == {"dot": 1, "fusion": passes}
    *moments, (_, _, read) = [one for one in found if one[1] == "fusion"]
    assert all(f"{moment}," in read for moment, _, _ in moments)
