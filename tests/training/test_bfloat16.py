"""What computing in bfloat16 costs in exactness: the figures of docs/your-network.md."""

import jax
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax import default_config
from vmapbn_flax.data import Dataset
from vmapbn_flax.training.programs import Programs


def make(name, dtype, dataset, **attributes):
    config = default_config(name)
    config.model.update(dtype=dtype, **attributes)
    config.train.num_epochs, config.optimizer.warmup_epochs = 1.0, 0.2
    return Programs([config], dataset)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attributes"), [("mlp", {}), ("conv", {"features": (8, 16, 16)})])
def test_after_an_epoch(name, attributes):
    """Logits of the same weights, before and after; loss and accuracy of a run in each type."""
    mnist = small.mnist()
    first = Dataset("first", 10, mnist.train[:12_800], mnist.test[:2_000])
    full, half = (make(name, dtype, first, **attributes) for dtype in ("float32", "bfloat16"))
    start = full.create()
    small.assert_same_bits(half.create(), start)

    def apart(state):
        """The largest difference of the logits of a batch, as a share of the largest logit; the gradients' likewise."""
        (expected, grads), (got, half_grads) = (programs.gradients(state, 0) for programs in (full, half))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
        worst = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (half_grads, grads)), strict=True))
        return np.abs(got - expected).max() / np.abs(expected).max(), worst / largest

    found = [apart(start)]
    states = [programs.advance(programs.create(), 0, programs.steps_per_epoch) for programs in (full, half)]
    found.append(apart(states[0]))
    figures = [programs.evaluate(state) for programs, state in zip((full, half), states, strict=True)]
    print(f"\n{name}: logits and gradients apart before {found[0]}, after {found[1]}; {figures}")
    for logits, gradients in found:
        assert logits < 1e-2
        assert gradients < 0.2
    assert abs(figures[1]["test_loss"] / figures[0]["test_loss"] - 1) < 1e-2
    assert abs(figures[1]["test_accuracy"] - figures[0]["test_accuracy"]) < 1e-2
