"""Batch norm for networks written one example at a time."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmapbn_flax.batch_norm import BatchedBatchNorm, BatchNorm
    from vmapbn_flax.models import MLP, BatchedMLP, VmapBatch

__all__ = ["MLP", "BatchNorm", "BatchedBatchNorm", "BatchedMLP", "VmapBatch"]


def __getattr__(name: str) -> object:
    # Not before: the command line, which is in this package too, handles signals before it imports JAX.
    if name in __all__:
        from vmapbn_flax import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
