"""`data.threshold`: images in black and white, in every split, in memory and in files."""

import numpy as np
import pytest

from tests.helpers import own, small
from vmapbn_flax.data.arrays import Split
from vmapbn_flax.data.binary import binarised
from vmapbn_flax.sweeps.plan import Datasets

GREYS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
LABELS = np.zeros(1, np.int32)


@pytest.mark.parametrize(("threshold", "first"), [(0.5, 128), (1 / 255, 1), (100 / 255, 100), (1.0, 255), (1e-9, 1)])
def test_white_from_the_threshold_on(threshold, first):
    got = binarised(Split(GREYS, LABELS), threshold)
    np.testing.assert_array_equal(got.images.reshape(-1), [0] * first + [255] * (256 - first))


def test_every_split_in_memory_and_in_files(tmp_path):
    """Streamed examples are those in memory; labels stay."""
    splits = {"train": own.examples(40, 1), "test": own.examples(12, 2)}
    own.write_folder(tmp_path, **splits)
    fields = {"threshold": 0.5, "validation_size": 8}
    loaded = own.load("folder", tmp_path, **fields)
    streamed = own.load("folder", tmp_path, memory_limit=1e-9, **fields)
    assert (loaded.streamed, streamed.streamed) == (False, True)
    grey = own.load("folder", tmp_path, validation_size=8)
    for name in ("train", "validation", "test"):
        original, got = getattr(grey, name), getattr(loaded, name)
        own.assert_equal(got, Split(np.where(original.images > 127, 255, 0).astype(np.uint8), original.labels))
        own.assert_equal(getattr(streamed, name).read(np.arange(len(got))), got)
        assert getattr(streamed, name).image_shape == got.image_shape


def test_members_of_a_sweep_with_other_thresholds_have_other_data(tmp_path):
    own.write_idx(tmp_path, train=own.examples(40, 1), test=own.examples(12, 2))
    datasets, whites = Datasets(), []
    for threshold in (0.25, 0.75):
        config = small.config(data__name="idx", data__dir=str(tmp_path), data__threshold=threshold)
        whites.append(np.mean(datasets.load(config).train.images == 255))
    np.testing.assert_allclose(whites, [0.75, 0.25], atol=0.05)
