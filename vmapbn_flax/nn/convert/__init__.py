"""Conversion of the variables of `MLP` and `ConvNet` to and from PyTorch and Equinox, number for number; and to ONNX.

Uses jax, numpy and the room `nn`; the other libraries only where a function needs them.

flax.linen needs no conversion: our `{"params": ..., "batch_stats": ...}` has the tree of
`flax.linen.BatchNorm`. The PyTorch or Equinox network may use any names, as long as it registers its linear
layers or convolutions, and its batch norms, in the order in which it applies them:

    variables = from_torch(network.state_dict())
    network.load_state_dict(to_torch(variables, network.state_dict()))

    variables = from_equinox(model, state)
    model, state = to_equinox(variables, model, state)

A layer that a batch norm follows has no bias in our networks. If it has one in the other network, it is converted
without a change of what the network computes, in training or evaluation: from there, the running mean takes it in
(mean - bias); to there, it is zero. So our variables come back bit for bit from either form of network. A
network comes back bit for bit if these layers have `bias=False` (`use_bias=False`), else with their biases zero.

Folded variables convert as well, to and from a network without batch norms.

An image there is `(channels, height, width)`. `ConvNet` flattens its last block as `(height, width, channels)`; the
inputs of its dense layer are put in the order of the other library.

Activations, pooling, epsilon and momentum are not variables and are not converted. PyTorch's `momentum` is 1 minus
ours. Its running variance is that of `unbiased_running_var=True`.
"""

from vmapbn_flax.nn.convert.equinox import from_equinox, to_equinox
from vmapbn_flax.nn.convert.onnx import to_onnx
from vmapbn_flax.nn.convert.torch import from_torch, make_torch, to_torch

__all__ = ["from_equinox", "from_torch", "make_torch", "to_equinox", "to_onnx", "to_torch"]
