"""A plugin of pytest: Equinox's tests get this package's layer as `equinox.nn.BatchNorm`."""

import equinox as eqx
import jax
import jax.numpy as jnp

import vmapbn_flax


class BatchNorm(eqx.nn.StatefulLayer):
    """Ours in Equinox's spelling: features first, statistics in a `State`; `mode` is always "batch"."""

    weight: jax.Array | None
    bias: jax.Array | None
    batch_state_index: eqx.nn.StateIndex
    ema_state_index: eqx.nn.StateIndex  # the same
    layer: vmapbn_flax.BatchNorm = eqx.field(static=True)
    inference: bool

    def __init__(
        self, input_size, axis_name, eps=1e-5, channelwise_affine=True, momentum=0.99, inference=False, mode=None
    ):
        self.weight, self.bias = (jnp.ones(input_size), jnp.zeros(input_size)) if channelwise_affine else (None, None)
        self.batch_state_index = self.ema_state_index = eqx.nn.StateIndex((jnp.zeros(input_size), jnp.ones(input_size)))
        affine = {"use_scale": channelwise_affine, "use_bias": channelwise_affine}
        self.layer = vmapbn_flax.BatchNorm(axis_name, momentum=momentum, epsilon=eps, **affine)
        self.inference = inference

    def __call__(self, x, state, *, key=None, inference=None):
        variables = {
            "params": {"scale": self.weight, "bias": self.bias},
            "batch_stats": dict(zip(("mean", "var"), state.get(self.batch_state_index), strict=True)),
        }
        train = not (self.inference if inference is None else inference)
        y, updates = self.layer.apply(variables, jnp.moveaxis(x, 0, -1), train=train, mutable=["batch_stats"])
        statistics = updates["batch_stats"]
        return jnp.moveaxis(y, -1, 0), state.set(self.batch_state_index, (statistics["mean"], statistics["var"]))


def pytest_configure():
    eqx.nn.BatchNorm = BatchNorm
