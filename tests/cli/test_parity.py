import copy

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax.cli import parity as module
from vmapbn_flax.cli.parity import compare, parity
from vmapbn_flax.errors import UsageError
from vmapbn_flax.training import network, steps
from vmapbn_flax.training.trees import named_leaves

NAN, INF = np.float32(np.nan), np.float32(np.inf)


def tree(*leaves):
    return {str(i): jnp.asarray(leaf, jnp.float32) for i, leaf in enumerate(leaves)}


def test_equal_trees():
    row = compare("equal", tree([1, -2], 3), tree([1, -2], 3), 0.0)
    assert row == ("equal", "0", 0.0, 0.0, 0.0, 0.0)
    assert row.within
    assert compare("zero", tree([0, 0]), tree([0, 0]), 0.0).within


def test_largest_difference_by_each_array_s_own_measure():
    first, second = tree([1, -8], [[2.0]], 4), tree([1, -8.5], [[2.5]], 4)
    for row in (compare("", first, second, 0.2), compare("", second, first, 0.2)):
        assert row.array == "1"  # a fifth of what it is there, a seventeenth in the first
        assert row.absolute == 0.5
        assert row.relative == 0.5 / 2.5
        assert row.ulps == 0.5 * 2**22  # floats from 2 on are 2**-22 apart
        assert row.within


def test_a_small_array_that_is_all_wrong():
    """Beside one that is a thousand times larger: its difference is 1e-6 of that one."""
    row = compare("", tree([1e3], [1e-3]), tree([1e3], [-1e-3]), 1e-5)
    assert row.array == "1"
    assert not row.within


def test_a_count_does_not_hide_statistics():
    """Batch renorm's count of steps is the largest entry, but no measure of rounding."""
    first, second = ({"count": jnp.int32(10_000), "mean": jnp.float32(mean)} for mean in (0.1, 0.2))
    row = compare("", first, second, 1e-3)
    assert (row.array, row.within) == ("mean", False)
    assert not compare("", first, first | {"count": jnp.int32(9_999)}, 1e-5).within


def test_an_array_that_is_rounding_alone():
    """Its difference is as large as it is, but only 1e-7 of the other's entries."""
    row = compare("", tree([1.0], [3e-8]), tree([1.0], [-7e-8]), 2e-5)
    assert row.array == "1"
    np.testing.assert_allclose(row.relative, 1e-7 / 0.01, rtol=1e-6)
    assert row.within


def test_one_unit_in_the_last_place():
    one = np.float32(1)
    row = compare("", tree(one), tree(np.nextafter(one, np.float32(2))), 1e-7)
    assert row.ulps == 1
    assert not row.within
    assert row._replace(tolerance=2**-23).within


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_never_within(bad, place):
    good = [1.0, 2.0, 3.0]
    spoilt = [bad if i == place else value for i, value in enumerate(good)]
    for first, second in ((good, spoilt), (spoilt, good), (spoilt, spoilt)):
        for as_tree in (lambda values: tree(*values), lambda values: tree(values)):
            row = compare("", as_tree(first), as_tree(second), 1e9)
            assert not row.within
            assert np.isnan(row.absolute)
            assert row.array in (str(place), "0")


def test_trees_of_other_shapes_do_not_compare():
    with pytest.raises(ValueError, match="zip"):
        compare("", tree(1, 2), tree(1), 1.0)


@pytest.mark.slow
def test_real_mnist():
    """100 steps: each step's loss within 1e-4, and evaluations the same."""
    compared, built = {}, set()

    def make_network(model, *arguments, **keywords):
        built.add(model.norm)
        return network.make_network(model, *arguments, **keywords)

    def spy(what, first, second, tolerance):
        compared[what] = np.asarray(first), np.asarray(second)
        return compare(what, first, second, tolerance)

    config = small.config(model__hidden=(16,), train__batch_size=128, train__num_epochs=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_dataset", lambda *arguments: small.mnist())
        patch.setattr(module, "compare", spy)
        patch.setattr(steps, "make_network", make_network)
        rows = parity(config)
    assert built == {"vmap", "batched"}
    assert [row.what for row in rows if not row.within] == []
    assert len(rows) == 7
    # On a CPU XLA makes the same program of both.
    assert [row.what for row in rows if row.absolute] == []
    ours, theirs = compared["losses of the first 100 steps"]
    assert len(ours) == 100
    assert ours[-10:].mean() < 0.7 * ours[:10].mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert config.model.norm == "vmap"  # the caller's config is as it was


def test_broken_variant_is_caught(monkeypatch):
    """One variant with another epsilon, which is nothing but an argument of its programs."""

    def broken(configs, dataset):
        (config,) = configs
        if config.model.norm == "vmap":
            return small.programs()
        programs = copy.copy(small.programs(model__norm="batched"))
        programs.hyper = programs.hyper | {"model.batch_norm_epsilon": np.float32(1e-2)}
        return programs

    monkeypatch.setattr(module, "load_dataset", lambda *arguments: small.dataset())
    monkeypatch.setattr(module, "Programs", broken)
    rows = parity(small.config())
    outside = {row.what for row in rows if not row.within}
    assert {row.array for row in rows if row.what.startswith("gradients")} <= set(named_leaves(small.start().params))
    assert {"outputs of the first batch", "gradients of the first batch", "losses of the first 6 steps"} <= outside


def test_no_norm_has_nothing_to_compare():
    with pytest.raises(UsageError, match=r"config\.model\.norm: got 'none', expected 'vmap' or 'batched'"):
        parity(small.config(model__norm="none"))


@pytest.mark.parametrize(("apart", "status"), [(0.0, 0), (2e-5, 1), (np.nan, 1)])
def test_exit_status(unchecked, monkeypatch, capsys, apart, status):
    from vmapbn_flax.cli.main import main

    row = module.Difference("gradients of the first batch", "dense_0/kernel", apart, apart / 1e-7, apart, 1e-5)
    monkeypatch.setattr(module, "parity", lambda config: [row._replace(relative=0.0), row])
    monkeypatch.setattr("vmapbn_flax.cli.flags.parse_config", lambda arguments: (small.config(), None))
    assert main(["parity", "--config=configs/tiny.py"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert sum(row.what in line and row.array in line for line in lines) == 2
    assert sum("NO" in line for line in lines) == status
