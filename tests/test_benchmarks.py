"""The peers that the benchmark compares ours with do train."""

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import small

BENCHMARKS = Path(__file__).parent / "benchmarks"
EXAMPLES = 20 * 128 + 5  # twenty batches, and a few that no epoch needs


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("peers", "measure")]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["haiku", "nnx", "linen", "equinox", "torch"])
def test_peers_learn(name):
    if not importlib.util.find_spec(name if name in ("haiku", "equinox", "torch") else "flax"):
        pytest.skip(f"{name} is not installed")
    train, test = small.mnist().train, small.mnist().test
    images, labels = train.images[:EXAMPLES].reshape(EXAMPLES, -1), train.labels[:EXAMPLES]
    epoch, predict = importlib.import_module(f"peers.{name}_mlp").make(images, labels)

    def accuracy():
        return np.mean(predict(test.images.reshape(len(test), -1)) == test.labels)

    before = accuracy()
    for _ in range(15):
        epoch()
    assert before < 0.3
    assert accuracy() > 0.6
