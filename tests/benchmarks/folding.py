"""The time of evaluation without batch norms, `vmapbn_flax.fold`, against that with them, as a table in markdown.

python tests/benchmarks/folding.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from measure import median, ratio, spread, table, take_turns

from vmapbn_flax import MLP, ConvNet, ResNet, VmapBatch, fold

ROUNDS, BATCH = 40, 256
NETWORKS = {
    "MLP of 3 x 100, 28x28": (MLP((100, 100, 100), 10), (784,)),
    "ConvNet, 28x28": (ConvNet(10), (28, 28, 1)),
    "ResNet-20, 32x32": (ResNet(10), (32, 32, 3)),
}


def make_turns(network, shape):
    """The evaluation of a batch, with and without norms."""
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(BATCH, *shape)), jnp.float32)
    variables = network.init(jax.random.key(0), images[0], train=False)
    forms = {"with norms": (network, variables), "folded": fold(network, variables, images[0])}
    turns = {}
    for name, (form, its_variables) in forms.items():
        evaluate = jax.jit(lambda variables, x, form=form: VmapBatch(form).apply(variables, x, train=False))
        calls = 20 if len(shape) == 1 else 1  # a batch of the MLP takes less than a clock can tell
        its_variables = jax.device_put(its_variables)
        turns[name] = lambda evaluate=evaluate, its_variables=its_variables, calls=calls: [
            jax.block_until_ready(evaluate(its_variables, images)) for _ in range(calls)
        ]
    return turns, calls


if __name__ == "__main__":
    rows = []
    for label, network in NETWORKS.items():
        turns, calls = make_turns(*network)
        times = take_turns(turns, ROUNDS)
        milliseconds = [median(np.array(times[name]) / calls * 1e3) for name in turns]
        ratios = ratio(times, "folded", "with norms")
        rows.append((label, *milliseconds, f"{median(ratios)} ({spread(ratios)})"))
    print(table((f"a batch of {BATCH}", "with norms, ms", "folded, ms", "ratio (quartiles)"), rows))
