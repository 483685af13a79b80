from fractions import Fraction
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import oracle, small
from tests.helpers.quick import jit
from vmapbn_flax.training import steps
from vmapbn_flax.training.evaluation import make_evaluate
from vmapbn_flax.training.metrics import TrainMetrics, compute
from vmapbn_flax.training.optimizer import initial_state
from vmapbn_flax.training.steps import Batch, epoch_permutation, make_loss

NORMS = ("vmap", "batched", "none")
variants = pytest.mark.parametrize("norm", NORMS)
with_norm = pytest.mark.parametrize("norm", ["vmap", "batched"])


def without_norm(state):
    """`state`, before any step, of the plain network with the same weights."""
    params = {name: layer for name, layer in state.params.items() if not name.startswith("norm")}
    params |= {name: {"bias": jnp.zeros(layer["kernel"].shape[1]), **layer} for name, layer in params.items()}
    return state.replace(params=params, batch_stats={})


# One step, by hand.


def step_in_float64(params, hyper, batch, normed):
    """Loss, correct answers, and what SGD and momentum make of parameters and statistics, in numpy alone."""
    params = jax.tree.map(partial(np.asarray, dtype=np.float64), params)
    x, labels = np.asarray(batch.images, np.float64).reshape(len(batch.labels), -1) / 255, np.asarray(batch.labels)
    hidden = sum(name.startswith("dense") for name in params)
    inputs, pre, norms, stats = [], [], {}, {}
    for i in range(hidden):
        inputs.append(x)
        pre.append(x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"].get("bias", 0))
        y = pre[-1]
        if normed:
            norms[i] = params[f"norm_{i}"] | {"epsilon": float(hyper["model.batch_norm_epsilon"])}
            result = oracle.batch_norm(y, **norms[i])
            keep = float(hyper["model.batch_norm_momentum"])
            stats[f"norm_{i}"] = {
                "mean": (1 - keep) * result.mean,
                "var": keep + (1 - keep) * result.var,
            }
            y = result.y
        x = 1 / (1 + np.exp(-y))
    inputs.append(x)
    logits = x @ params["logits"]["kernel"] + params["logits"]["bias"]

    smoothing = float(hyper["train.label_smoothing"])
    targets = (1 - smoothing) * np.eye(small.CLASSES)[labels] + smoothing / small.CLASSES
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -(targets * log_p).sum(1).mean()

    gradients = {}
    g = (np.exp(log_p) - targets) / len(labels)
    gradients["logits"] = {"kernel": x.T @ g, "bias": g.sum(0)}
    g = g @ params["logits"]["kernel"].T
    for i in reversed(range(hidden)):
        g = g * inputs[i + 1] * (1 - inputs[i + 1])
        if normed:
            result = oracle.batch_norm(pre[i], g, **norms[i])
            gradients[f"norm_{i}"] = {"scale": result.dscale, "bias": result.dbias}
            g = result.dx
        gradients[f"dense_{i}"] = {"kernel": inputs[i].T @ g} | ({} if normed else {"bias": g.sum(0)})
        g = g @ params[f"dense_{i}"]["kernel"].T
    moved = jax.tree.map(lambda p, g: p - float(hyper["optimizer.learning_rate"]) * g, params, gradients)
    return loss, (logits.argmax(1) == labels).sum(), moved, stats


@variants
def test_one_step_by_hand(norm):
    changes = {"model__hidden": (6, 5), "optimizer__name": "sgd", "optimizer__schedule": "constant"}
    hyper = small.hyper(
        small.config(**changes),
        optimizer__learning_rate=0.7,
        optimizer__sgd_momentum=0.0,
        optimizer__warmup_steps=0,
        train__label_smoothing=0.1,
        model__batch_norm_momentum=0.6,
    )
    state = small.programs(**changes).create()
    state = state if norm != "none" else without_norm(state)
    state = state.replace(opt_state=initial_state(small.config(**changes).optimizer, state.params))
    batch = small.batch()
    new, metrics = jit(small.step_of(small.config(**changes, model__norm=norm)))(state, hyper, batch)

    loss, correct, params, stats = step_in_float64(state.params, hyper, batch, norm != "none")
    small.assert_close(new.params, params, rtol=1e-5, atol=1e-6)
    small.assert_close(new.batch_stats, stats, rtol=1e-5, atol=1e-6)
    figures = compute(metrics)
    np.testing.assert_allclose(figures["loss"], loss, rtol=1e-6)
    assert Fraction(figures["accuracy"]).limit_denominator(small.BATCH) == Fraction(int(correct), small.BATCH)
    assert compute(new.metrics) == figures
    assert (new.step, new.skipped_steps, new.skipped_in_a_row) == (1, 0, 0)


# Padding and ghost batches.


def gradient(config):
    """`(loss, statistics, gradients)` of a batch."""
    value_and_grad = jax.value_and_grad(make_loss(config.model, small.CLASSES), has_aux=True)

    def measure(state, hyper, batch):
        (loss, (_, _, stats)), grads = value_and_grad(state.params, state.batch_stats, hyper, batch, state.step)
        return loss, stats, grads

    return measure


@variants
def test_padded_batch_is_the_batch(norm):
    config = small.config(model__norm=norm)
    hyper = small.hyper(config, train__label_smoothing=0.1)
    state = small.start() if norm != "none" else without_norm(small.start())
    measure, batch = jit(gradient(config)), small.batch()
    small.assert_close(measure(state, hyper, small.pad(batch, 24)), measure(state, hyper, batch), atol=1e-7)


def test_metrics_leave_padding_out():
    measure = TrainMetrics.single_from_model_output
    losses, logits = jnp.arange(4.0), jnp.eye(4)
    labels = jnp.array([0, 1, 0, 0])
    padded = measure(loss=losses, logits=logits, labels=labels, mask=jnp.array([True, True, True, False]))
    assert compute(padded) == {"loss": 1.0, "accuracy": pytest.approx(2 / 3)}


@with_norm
def test_ghost_batches_are_groups_of_their_own(norm):
    """The mean of the groups' losses, gradients and statistics, padded with whole groups or not."""
    ghost, plain = small.config(model__norm=norm, model__ghost_batch_size=4), small.config(model__norm=norm)
    hyper, state, batch = small.hyper(ghost, train__label_smoothing=0.1), small.start(), small.batch()
    groups = Batch(batch.images.reshape(4, 4, *small.IMAGE), batch.labels.reshape(4, 4))
    each = jit(jax.vmap(gradient(plain), in_axes=(None, None, 0)))(state, hyper, groups)
    expected = jax.tree.map(lambda leaf: leaf.mean(0), each)
    measure = jit(gradient(ghost))
    small.assert_close(measure(state, hyper, batch), expected, atol=1e-7)
    small.assert_close(measure(state, hyper, small.pad(batch, 24)), expected, atol=1e-7)


def test_ghost_batches_do_not_matter_to_evaluation():
    programs, ghost = small.programs(), small.programs(model__ghost_batch_size=4)
    state = small.start()
    assert len(small.dataset().test) % 4 != 0
    assert ghost.evaluate(state) == programs.evaluate(state)


# Steps that are not finite.


def poisoned():
    """A batch whose loss is NaN: the numbers of a step may be anything."""
    return small.hyper(small.config(), train__label_smoothing=np.nan)


def assert_stood_still(new, old):
    for field in ("params", "batch_stats", "opt_state", "metrics"):
        small.assert_same_bits(getattr(new, field), getattr(old, field))


def counters(state):
    return int(state.step), int(state.skipped_steps), int(state.skipped_in_a_row)


def test_loss_that_is_not_finite():
    step, good, batch = small.train_step(), small.hyper(small.config()), small.batch()
    before, _ = step(small.start(), good, batch)
    state = before
    for i in (1, 2):
        state, metrics = step(state, poisoned(), batch)
        assert np.isnan(compute(metrics)["loss"])
        assert_stood_still(state, before)
        assert counters(state) == (2 + i, i, i)
    after, _ = step(state, good, batch)
    assert counters(after) == (5, 2, 0)
    # As if the two had not been, but for the learning rate.
    again, _ = step(before.replace(step=state.step), good, batch)
    small.assert_same_bits(after.replace(skipped_steps=again.skipped_steps), again)


def test_gradient_that_is_not_finite():
    state = small.start()
    params = dict(state.params)
    # Loss 1e30; its gradient is that times the inverse deviation, 1e18.
    params["dense_0"] = jax.tree.map(lambda p: 1e-25 * p, params["dense_0"])
    params["logits"] = params["logits"] | {"kernel": jnp.zeros((6, 4)).at[0, 0].set(1e30)}
    state = state.replace(params=params)
    hyper = small.hyper(small.config(), model__batch_norm_epsilon=1e-37)
    new, metrics = small.train_step()(state, hyper, small.batch())
    assert np.isfinite(compute(metrics)["loss"])
    assert_stood_still(new, state)
    assert counters(new) == (2, 1, 1)


def test_every_gradient_is_looked_at():
    """Whatever is too large, wherever: in arrays that eighths divide, and that they do not."""
    bound = np.float32(3)
    tree = {"scalar": np.float32(1), "short": -np.ones(5, np.float32), "long": np.full((3, 7), 2, np.float32)}
    below = jax.jit(lambda tree: steps._all_below(bound, tree))
    assert below(tree)
    for number in (np.nan, -np.nan, np.inf, -np.inf, bound, -bound, np.finfo(np.float32).max):
        for name, leaf in tree.items():
            for position in np.ndindex(leaf.shape):
                changed = np.array(leaf)
                changed[position] = number
                assert not below(tree | {name: changed}), (number, name, position)
    for number in (np.nextafter(bound, np.float32(0)), -np.nextafter(bound, np.float32(0)), 0.0, -0.0, 1e-45):
        assert below(tree | {"long": np.full((3, 7), number, np.float32)}), number


def test_frozen_after_too_many():
    most = small.config().train.max_skipped_steps
    step, batch, state = small.train_step(), small.batch(), small.start()
    for _ in range(most):
        state, _ = step(state, poisoned(), batch)
    assert counters(state) == (1 + most, most, most)
    for hyper in (poisoned(), small.hyper(small.config())):
        frozen, _ = step(state, hyper, batch)
        small.assert_same_bits(frozen, state)


def test_one_member_s_nan_is_its_own():
    config, hypers, states, step = small.members()
    good, batch = small.stack(hypers), small.batch()
    bad = good | {"train.label_smoothing": np.array([0, np.nan, 0], np.float32)}
    healthy = sick = states
    for _ in range(config.train.max_skipped_steps + 2):
        healthy, _ = step(healthy, good, batch)
        sick, _ = step(sick, bad, batch)
    for i in (0, 2):
        small.assert_same_bits(small.member(i, sick), small.member(i, healthy))
    assert_stood_still(small.member(1, sick), small.member(1, states))
    assert counters(small.member(1, sick)) == (10, 10, 10)
    assert counters(small.member(1, healthy)) == (12, 0, 0)


# Many steps.


def advance(cuts, **changes):
    """The state after these numbers of steps in a row; a cut never crosses an epoch."""
    programs, step = small.programs(**changes), 0
    state = programs.create()
    for count in cuts:
        state = programs.advance(state, step, count)
        step += count
    return state


def cuts_of_an_epoch(points):
    edges = [0, *sorted(points), small.STEPS_PER_EPOCH]
    return [b - a for a, b in pairwise(edges)]


@settings(max_examples=15)
@given(st.lists(st.sets(st.integers(1, small.STEPS_PER_EPOCH - 1)), min_size=2, max_size=2))
def test_any_cut_gives_the_same_bits(points):
    whole = advance([small.STEPS_PER_EPOCH] * 2)
    compiled = small.programs().compiler.compile_seconds
    small.assert_same_bits(advance([cut for epoch in points for cut in cuts_of_an_epoch(epoch)]), whole)
    assert small.programs().compiler.compile_seconds == compiled  # one program, whatever the length


def test_no_steps_change_nothing():
    small.assert_same_bits(advance([0]), small.programs().create())


def test_batches_are_those_of_the_epoch_s_permutation():
    sgd = {"optimizer__name": "sgd"}  # for Adam two programs of one step are not the same, as `small.members` says
    programs, train = small.programs(**sgd), small.dataset().train
    images, state, train_step = train.images, programs.create(), jit(small.step_of(small.config(**sgd)))
    for epoch in range(2):
        order = epoch_permutation(0, epoch, len(train))
        for i in range(small.STEPS_PER_EPOCH):
            rows = order[i * small.BATCH : (i + 1) * small.BATCH]
            batch = Batch(jnp.array(images[rows]), jnp.array(train.labels[rows]))
            state, _ = train_step(state, programs.hyper, batch)
    # The metrics are sums over exactly those examples.
    got = advance([small.STEPS_PER_EPOCH] * 2, **sgd)
    assert got.metrics.loss.count == 2 * small.STEPS_PER_EPOCH * small.BATCH
    small.assert_close(got, state, rtol=1e-4, atol=1e-5)


def test_permutations():
    first, again, other_epoch, other_seed = (
        epoch_permutation(seed, epoch, 100) for seed, epoch in ((0, 3), (0, 3), (0, 4), (1, 3))
    )
    for order in (first, other_epoch, other_seed):
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    np.testing.assert_array_equal(again, first)
    for other in (other_epoch, other_seed):
        assert (other == first).mean() < 0.1  # one in 100 by chance


# Evaluation.

SIZES = (1000, 999, 7, 1, 2500, 3000)


def four_pixels():
    """A network that answers with the brightest of four pixels, its logit 5 and the others 0."""
    params = {
        "dense_0": {"kernel": 200 * jnp.eye(4), "bias": jnp.full(4, -100.0)},  # sigmoids of 0 and 1
        "logits": {"kernel": 5 * jnp.eye(4), "bias": jnp.zeros(4)},
    }
    rng = np.random.default_rng(0)
    answers, labels = rng.integers(0, 4, (2, 2500)).astype(np.int32)
    return params, 255 * np.eye(4, dtype=np.uint8)[answers].reshape(-1, 2, 2), labels, answers


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_by_hand(size):
    params, images, labels, answers = four_pixels()
    config = small.config(model__norm="none", model__hidden=(4,), train__eval_batch_size=size)
    evaluate = jit(make_evaluate(config.model, config.train.eval_batch_size, 4))
    metrics, _ = evaluate(params, {}, small.hyper(config), jnp.array(images), jnp.array(labels))
    correct = (answers == labels).sum()
    assert metrics.loss.count == metrics.accuracy.count == 2500
    assert metrics.accuracy.total == correct
    figures = compute(metrics)
    assert figures["accuracy"] == np.float32(correct / 2500)
    # -log softmax: of the answer log(e^5 + 3) - 5, of another class log(e^5 + 3).
    expected = np.log(np.exp(5.0) + 3) - 5 * correct / 2500
    np.testing.assert_allclose(figures["loss"], expected, rtol=2e-5 if size == 1 else 2e-6)


def test_evaluation_by_hand_of_sixteen():
    params, images, _, answers = four_pixels()
    labels = (answers[:16] + 1) % 4
    labels[[3, 11]] = answers[[3, 11]]
    config = small.config(model__norm="none", model__hidden=(4,), train__eval_batch_size=5)
    evaluate = jit(make_evaluate(config.model, config.train.eval_batch_size, 4))
    metrics, _ = evaluate(params, {}, small.hyper(config), jnp.array(images[:16]), jnp.array(labels))
    assert compute(metrics)["accuracy"] == 2 / 16


@with_norm
def test_evaluation_uses_running_statistics(norm):
    """So that its batches do not matter: against a float64 network on all the examples at once."""
    state, test = advance([small.STEPS_PER_EPOCH]), small.dataset().test
    params, stats = jax.tree.map(partial(np.asarray, dtype=np.float64), (state.params, state.batch_stats["norm_0"]))
    x = test.images.reshape(len(test), -1) / 255 @ params["dense_0"]["kernel"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + np.float64(np.float32(1e-5)))
    x = 1 / (1 + np.exp(-(x * params["norm_0"]["scale"] + params["norm_0"]["bias"])))
    logits = x @ params["logits"]["kernel"] + params["logits"]["bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(test)), test.labels]
    for size in (5, 1000):
        figures = small.programs(model__norm=norm, train__eval_batch_size=size).evaluate(state)
        assert figures["test_count"] == 37
        assert figures["test_accuracy"] == np.float32((logits.argmax(1) == test.labels).mean())
        np.testing.assert_allclose(figures["test_loss"], losses.mean(), rtol=1e-6)
