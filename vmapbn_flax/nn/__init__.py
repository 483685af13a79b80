"""The layer and the networks, as modules of Flax Linen: `batch_norm`, `vmap_batch`, `mlp`, `convert`.

Uses jax, flax and numpy, and no other room of this package.
"""

from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.nn.mlp import MLP, BatchedMLP
from vmapbn_flax.nn.vmap_batch import VmapBatch

__all__ = ["MLP", "BatchNorm", "BatchedBatchNorm", "BatchedMLP", "VmapBatch"]
