"""Batch norm for networks written one example at a time.

What people import is here; the rooms are the packages beside this file, and imports between them point one way: `cli`,
`sweeps`, `runs`, `multihost`, `training`, `data`, `nn`, and below them the modules `config`, `files`, `signals` and
`errors`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmapbn_flax.defaults import default_config
    from vmapbn_flax.nn import MLP, BatchedBatchNorm, BatchedMLP, BatchNorm, VmapBatch

__all__ = ["MLP", "BatchNorm", "BatchedBatchNorm", "BatchedMLP", "VmapBatch", "default_config"]


def __getattr__(name: str) -> object:
    # Not before: the command line, which is in this package too, handles signals before it imports JAX.
    if name == "default_config":
        from vmapbn_flax.defaults import default_config

        return default_config
    if name in __all__:
        from vmapbn_flax import nn

        return getattr(nn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
