"""Flax's own ImageNet ResNet-18 with our layer in it, one example under `VmapBatch`, against the same file as it is.

The file is Flax's `examples/imagenet/models.py`, which is in no package, and is not copied here:
FLAX_IMAGENET_MODELS=.../models.py python -m pytest -n0 -m slow -s tests/nn/test_flax_resnet.py
"""

import importlib.util
import os
import types
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.helpers.oracle import error
from vmapbn_flax import BatchNorm as OneExampleNorm
from vmapbn_flax import VmapBatch

SOURCE = os.environ.get("FLAX_IMAGENET_MODELS", "")
IMAGES, CLASSES = (8, 64, 64, 3), 1000

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SOURCE, reason="FLAX_IMAGENET_MODELS names no file")]


class BatchNorm(OneExampleNorm):
    """Our layer, called as the file calls Flax's; of its name, so that the variables have the same tree."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x):
        return super().__call__(x, train=not self.use_running_average)


class OneImage(nn.Module):
    """The file's network for one image, which it takes as a batch of one."""

    network: nn.Module

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        nn.share_scope(self, self.network)
        return self.network(x[jnp.newaxis], train)[0]


def load():
    """The module in the file."""
    spec = importlib.util.spec_from_file_location("imagenet_models", Path(SOURCE))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours():
    """Its ResNet-18 in which `nn.BatchNorm` is our layer, over a batch of images."""
    module = load()
    module.nn = types.SimpleNamespace(**vars(nn) | {"BatchNorm": BatchNorm})
    network = VmapBatch(OneImage(module.ResNet18(num_classes=CLASSES)))
    return lambda variables, x: network.apply(variables, x, train=True, mutable=["batch_stats"])


def theirs():
    """As it is, on the whole batch; a mapped axis of size one has the name that it asks for."""
    network = load().ResNet18(num_classes=CLASSES)

    def apply(variables, x):
        mapped = jax.vmap(
            lambda x: network.apply(variables, x, True, mutable=["batch_stats"]), out_axes=(0, None), axis_name="batch"
        )
        logits, updates = mapped(x[jnp.newaxis])
        return logits[0], updates

    return apply


def measured(apply, variables, x, labels):
    """Logits, gradients, and the statistics of the batch."""

    def loss(params):
        logits, updates = apply({**variables, "params": params}, x)
        chosen = jnp.take_along_axis(nn.log_softmax(logits), labels[:, jnp.newaxis], axis=1)
        return -chosen.mean(), (logits, updates["batch_stats"])

    grads, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return {"logits": logits, "gradients": grads, "statistics": stats}


def norms_in(call):
    """The result of `call()`, and how many of our layers took part in it."""
    found = set()

    def note(next_method, arguments, keywords, context):
        if isinstance(context.module, OneExampleNorm):
            found.add(context.module.path)
        return next_method(*arguments, **keywords)

    with nn.intercept_methods(note):
        return call(), len(found)


@pytest.mark.parametrize("deviation", [0.0, 0.3])
def test_resnet18(deviation):
    """At the initial scales, of which each block's last are zero, and at random ones."""
    x, labels = jax.random.normal(jax.random.key(0), IMAGES), jnp.arange(IMAGES[0])
    variables = load().ResNet18(num_classes=CLASSES).init(jax.random.key(1), x, True)
    flat = flatten_dict(variables["params"])
    for number, (path, leaf) in enumerate(flat.items()):
        if path[-1] == "scale":
            flat[path] = leaf + deviation * jax.random.normal(jax.random.key(number), leaf.shape)
    variables = {**variables, "params": unflatten_dict(flat)}
    got, count = norms_in(lambda: measured(ours(), variables, x, labels))
    expected, none = norms_in(lambda: measured(theirs(), variables, x, labels))
    assert (count, none) == (20, 0)
    print(f"\nflax {flax.__version__}, jax {jax.__version__}, scales that deviate by {deviation}")
    for name, tree in expected.items():
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))
        worst = max(jax.tree.leaves(jax.tree.map(error, got[name], tree)))
        print(f"{name}: {worst:.1e}, of up to {largest:.1e}; as a share of it {worst / largest:.1e}")
        assert worst <= 3e-6 * largest
