"""The layer, the lift and the networks, as modules of Flax Linen, and `convert` for those of other libraries.

Uses jax, flax and numpy, and no other room of this package.
"""

from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.nn.batch_renorm import BatchedBatchRenorm, BatchRenorm
from vmapbn_flax.nn.conv_net import BatchedConvNet, ConvNet
from vmapbn_flax.nn.folding import fold
from vmapbn_flax.nn.mlp import MLP, BatchedMLP
from vmapbn_flax.nn.resnet import BatchedResNet, ResNet
from vmapbn_flax.nn.vmap_batch import VmapBatch

__all__ = [
    "MLP",
    "BatchNorm",
    "BatchRenorm",
    "BatchedBatchNorm",
    "BatchedBatchRenorm",
    "BatchedConvNet",
    "BatchedMLP",
    "BatchedResNet",
    "ConvNet",
    "ResNet",
    "VmapBatch",
    "fold",
]
