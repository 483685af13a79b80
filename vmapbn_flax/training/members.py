"""The programs of many runs at once: those of one run under one more map, over the members."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vmapbn_flax.data import Dataset
from vmapbn_flax.training import mesh, steps
from vmapbn_flax.training.hyperparameters import make_hyperparameters
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.state import TrainState, create_state


class GroupPrograms(Programs):
    """`Programs` of runs that differ in traced fields alone, which are a leading axis of the state.

    The members lie over the axis `member` of the mesh, padded to a multiple of it with copies of the last; all
    train on the same data. Steps are counted once for all: a member's own count stops where it is frozen.

    Raises:
      UsageError: a config does not fit the data.
    """

    _axes = (mesh.MEMBER,)

    def __init__(self, configs: Sequence[ConfigDict], dataset: Dataset, devices: Mesh):
        super().__init__(configs[0], dataset, devices)
        self._rows_multiple = devices.shape[mesh.MEMBER]
        at_once = partial(jax.vmap, spmd_axis_name=mesh.MEMBER)
        # The caches of a CPU hold what one member works on, and not what many do.
        one_by_one = jax.default_backend() == "cpu" and self.layout.count == 1
        over_members = partial(_one_by_one, devices=self._sharding and devices) if one_by_one else at_once
        self._create_one, self._create = self._create, at_once(self._create)
        self._train_steps = over_members(self._train_steps, in_axes=(0, 0, None, None, 0, None, None))
        self._evaluate = over_members(self._evaluate, in_axes=(0, 0, 0, None, None))
        self._learning_rate = at_once(self._learning_rate, in_axes=(0, None))
        # For members on the devices of other processes.
        self._gather = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(devices, PartitionSpec()))
        self._set_members(configs)

    def with_members(self, configs: Sequence[ConfigDict]) -> "GroupPrograms":
        """The same programs, compiled already, for as many other members."""
        other = copy.copy(self)
        other.compiler = self.compiler.with_clocks_at_zero()
        other._epoch_order = (-1, None)
        other._set_members(configs)
        return other

    def _set_members(self, configs: Sequence[ConfigDict]) -> None:
        self._count = len(configs)
        padded = math.ceil(self._count / self._rows_multiple) * self._rows_multiple
        self._rows = np.minimum(np.arange(padded), self._count - 1)
        self._seeds = [config.seed for config in configs]
        hypers = [make_hyperparameters(config, self.steps_per_epoch) for config in configs]
        self._host_hyper = jax.tree.map(lambda *numbers: np.stack(numbers), *hypers)
        self.hyper = self.place(self._host_hyper)

    def template(self) -> TrainState:
        one = jax.tree.map(lambda numbers: numbers[0], self._host_hyper)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((self._count, *leaf.shape), leaf.dtype),
            jax.eval_shape(self._create_one, one),
        )

    def _order(self, epoch: int) -> np.ndarray:
        return np.stack([steps.epoch_permutation(seed, epoch, self._num_train) for seed in self._seeds])[self._rows]

    def place(self, state: PyTree) -> PyTree:
        return mesh.put(jax.tree.map(lambda leaf: np.asarray(leaf)[self._rows], state), self._sharding)

    def _on_host(self, tree: PyTree) -> PyTree:
        if self.is_whole:
            tree = jax.device_get(tree)
        else:  # leaf by leaf: each then lies on all devices with all members
            tree = jax.tree.map(lambda leaf: jax.device_get(self._gather(leaf)), tree)
        return jax.tree.map(lambda leaf: leaf[: self._count], tree)

    def split(self, tree: PyTree) -> list[PyTree]:
        return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(self._count)]  # noqa: B023


def _one_by_one(function: Callable, in_axes: Sequence[int | None], devices: Mesh | None) -> Callable:
    """`jax.vmap(function, in_axes)`, one member after the other on each of the devices they lie over."""
    own = [axis is not None for axis in in_axes]

    def mapped(*arguments: PyTree) -> PyTree:
        def of_member(slices: Sequence[PyTree]) -> PyTree:
            rest = iter(slices)
            return function(*(next(rest) if o else shared for shared, o in zip(arguments, own, strict=True)))

        return lax.map(of_member, [argument for argument, o in zip(arguments, own, strict=True) if o])

    if devices is None:
        return mapped
    members = PartitionSpec(mesh.MEMBER)
    specs = tuple(members if o else PartitionSpec() for o in own)
    return jax.shard_map(mapped, mesh=devices, in_specs=specs, out_specs=members, check_vma=False)


def member_bytes(config: ConfigDict, dataset: Dataset) -> int:
    """An estimate of the memory that a member takes beside the data, which all of them share."""
    num_features = dataset.train.images[0].size
    state = jax.eval_shape(
        lambda hyper: create_state(config, dataset.num_classes, num_features, hyper), make_hyperparameters(config, 1)
    )
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    widths = (num_features, *config.model.hidden, dataset.num_classes)
    # Each layer's value before and after its norm and activation, and their cotangents; the inputs once.
    activations = 4 * (num_features + 6 * sum(widths[1:])) * max(config.train.batch_size, config.train.eval_batch_size)
    return 2 * state_bytes + activations + 4 * len(dataset.train)
