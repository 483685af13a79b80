"""The layer and the networks: modules of Flax Linen, which need nothing of the rest of this package.

`batch_norm` has the layer, `vmap_batch` the lift over a batch, `mlp` the network and its batched twin, `convert` the
ways to and from PyTorch and Equinox.
"""

from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.nn.mlp import MLP, BatchedMLP
from vmapbn_flax.nn.vmap_batch import VmapBatch

__all__ = ["MLP", "BatchNorm", "BatchedBatchNorm", "BatchedMLP", "VmapBatch"]
