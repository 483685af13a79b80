"""The network that a config names."""

from functools import partial

from flax import linen as nn
from ml_collections import ConfigDict

from vmapbn_flax.nn import MLP, BatchedMLP, VmapBatch
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm
from vmapbn_flax.training.hyperparameters import Hyperparameters


def make_network(model: ConfigDict, num_classes: int, hyper: Hyperparameters, *, ghost: bool = False) -> nn.Module:
    """The network of `config.model`, for inputs `(batch, features)`, or `(group, batch, features)` with `ghost`."""
    hidden = tuple(model.hidden)
    numbers = {
        "momentum": hyper["model.batch_norm_momentum"],
        "epsilon": hyper["model.batch_norm_epsilon"],
        "replica_axis_name": "group" if ghost else (),
    }
    if model.norm == "none":
        return VmapBatch(MLP(hidden, num_classes, norm=None))
    if model.norm == "vmap":
        network = MLP(hidden, num_classes, norm=partial(BatchNorm, **numbers))
        return VmapBatch(network, axis_name=("group", "batch") if ghost else "batch")
    network = BatchedMLP(hidden, num_classes, norm=partial(BatchedBatchNorm, **numbers))
    return VmapBatch(network, axis_name="group") if ghost else network
