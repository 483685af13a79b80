"""Batch norm for networks written one example at a time."""

from vmapbn_flax.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.models import MLP, BatchedMLP, VmapBatch

__all__ = ["MLP", "BatchNorm", "BatchedBatchNorm", "BatchedMLP", "VmapBatch"]
