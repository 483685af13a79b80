"""What the members of a sweep share."""

import numpy as np

from tests.helpers import small
from tests.helpers.own import examples
from vmapbn_flax.sweeps.plan import Datasets


def test_members_with_other_test_splits_have_other_data(tmp_path):
    train = examples(40, seed=1)
    np.savez(tmp_path / "own.npz", train_images=train.images, train_labels=train.labels)
    datasets, sizes = Datasets(), []
    for fraction in (0.1, 0.5, 0.5):
        config = small.config(data__name="npz", data__dir=str(tmp_path), data__test_fraction=fraction)
        sizes.append(len(datasets.load(config).test))
    assert sizes == [4, 20, 20]
