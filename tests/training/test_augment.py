"""Augmentation: what each change does, by hand, and that it depends on nothing but seed, step and place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from tests.helpers.quick import jit
from vmapbn_flax.errors import UsageError
from vmapbn_flax.training import mesh
from vmapbn_flax.training.augment import make_augment
from vmapbn_flax.training.programs import Programs

ALL = ("shift:1", "flip", "cutout:2")
KEY = jax.random.key(3)


def images(shape=(6, 7), count=500):
    return np.random.default_rng(0).integers(1, 256, (count, *shape)).astype(np.uint8)


def augmented(names, before):
    return np.asarray(jit(make_augment(names, before.shape[1:]))(KEY, jnp.array(before)))


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3)])
def test_shift_takes_every_offset_equally_often(shape):
    before = images(shape)
    after, counts = augmented(("shift:2",), before), {}
    padded = np.pad(before, ((0, 0), (2, 2), (2, 2), *((0, 0) for _ in shape[2:])))
    for image, around in zip(after, padded, strict=True):
        (offset,) = [(i, j) for i in range(5) for j in range(5) if np.array_equal(image, around[i : i + 6, j : j + 7])]
        counts[offset] = counts.get(offset, 0) + 1
    assert len(counts) == 25
    assert max(counts.values()) < 45  # 20 on average, with a deviation of 4.4


def test_flip_is_half_of_the_images():
    before = images()
    after = augmented(("flip",), before)
    flipped = [np.array_equal(a, b[:, ::-1]) for a, b in zip(after, before, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(after, before, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 200 < sum(flipped) < 300


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3)])
def test_cutout_is_a_square_around_any_pixel(shape):
    before = images(shape)
    after, centres = augmented(("cutout:3",), before), set()
    for image, original in zip(after, before, strict=True):
        gone = (image == 0).reshape(6, 7, -1).all(-1)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        expected = original.copy()
        expected[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        np.testing.assert_array_equal(image, expected)
        assert 2 <= len(rows) <= 3
        assert 2 <= len(columns) <= 3  # cut at the border
        centres.add((rows[-1], columns[-1]))
    assert len(centres) == 6 * 7 - 6 - 7 + 1  # two centres share their square at each border


def test_nothing_changes_without_names():
    before = images()
    np.testing.assert_array_equal(augmented((), before), before)


def test_a_change_that_does_not_fit_the_images():
    with pytest.raises(
        UsageError, match=r"config\.data\.augment: got 'shift:6', expected less than 6, .* 6 x 7 pixels"
    ):
        make_augment(("shift:6",), (6, 7))


# In training.


def trained(programs, steps):
    state = programs.create()
    for step, count in steps:
        state = programs.advance(state, step, count)
    return programs.split(state)


def make(*configs, devices=None, streamed=False):
    return Programs(list(configs), dataclasses.replace(small.dataset(), streamed=streamed), devices)


@pytest.mark.usefixtures("compiled_quickly")
def test_every_step_changes_its_batch_anew():
    config, plain = small.config(data__augment=ALL), small.config()
    first = make(config)
    state = first.create()
    gradients = [first.gradients(state.replace(step=jnp.int32(step)), 0)[1] for step in (0, 1)]
    unchanged = make(plain).gradients(state, 0)[1]
    kernels = [tree["dense_0"]["kernel"] for tree in (*gradients, unchanged)]
    assert not any(np.array_equal(a, b) for a, b in ((kernels[0], kernels[1]), (kernels[0], kernels[2])))


def test_the_same_bits_in_parts_and_streamed():
    config = small.config(data__augment=ALL)
    in_memory = make(config)
    (whole,) = trained(in_memory, [(0, 6), (6, 4)])
    (parts,) = trained(in_memory, [(0, 1), (1, 5), (6, 3), (9, 1)])
    small.assert_same_bits(parts, whole)
    config.data.memory_limit = 4.1 * small.BATCH * (small.FEATURES + 4) / 1e9
    streamed = make(config, streamed=True)
    (read,) = trained(streamed, [(0, 6), (6, 4)])
    streamed.close()
    small.assert_same_bits(read, whole)


@pytest.mark.slow
def test_the_same_images_alone_and_in_a_sweep():
    """Members of other seeds have other images; the bits of a member are its group's, so that they are only close."""
    sgd = {"optimizer__name": "sgd", "data__augment": ALL}
    configs = [small.config(seed=seed, **sgd) for seed in (0, 1)]
    for config, member in zip(configs, trained(make(*configs), [(0, 5)]), strict=True):
        (alone,) = trained(make(config), [(0, 5)])
        small.assert_close(member.params, alone.params)


@pytest.mark.slow
def test_the_same_images_on_many_devices():
    sgd = {"optimizer__name": "sgd", "data__augment": ALL}
    (alone,) = trained(make(small.config(**sgd)), [(0, 5)])
    config = small.config(**sgd, mesh__data=3, mesh__replicate_limit=0)
    (split,) = trained(make(config, devices=mesh.solo_mesh(config.mesh)), [(0, 5)])
    small.assert_close(split.params, alone.params)
