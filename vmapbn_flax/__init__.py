"""Batch norm for networks written one example at a time.

The names that people import are here. The packages beside this file are the rooms of the program. Each imports only
from those after it: `cli`, `sweeps`, `runs`, `multihost`, `training`, `data`, `nn`, and from the modules `config`,
`defaults`, `files`, `signals` and `errors`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmapbn_flax.defaults import default_config
    from vmapbn_flax.nn import (
        MLP,
        BatchedBatchNorm,
        BatchedBatchRenorm,
        BatchedConvNet,
        BatchedMLP,
        BatchedResNet,
        BatchNorm,
        BatchRenorm,
        ConvNet,
        ResNet,
        VmapBatch,
        fold,
    )
    from vmapbn_flax.runs.trained import load_run
    from vmapbn_flax.sweeps.results import load_sweep

    __version__: str

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
    "default_config",
    "fold",
    "load_run",
    "load_sweep",
]


def __getattr__(name: str) -> object:
    # Not before: the command line, which is in this package too, handles signals before it imports JAX.
    if name == "default_config":
        from vmapbn_flax.defaults import default_config

        return default_config
    if name == "load_run":
        from vmapbn_flax.runs.trained import load_run

        return load_run
    if name == "load_sweep":
        from vmapbn_flax.sweeps.results import load_sweep

        return load_sweep
    if name in __all__:
        from vmapbn_flax import nn

        return getattr(nn, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("vmapbn-flax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
