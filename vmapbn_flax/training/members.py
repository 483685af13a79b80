"""One run, or the members of a group: mapping functions over them, stacking and splitting their arrays.

`OneRun` and `Stacked` have the same methods. The arrays of one run have no axis of members; those of a group have it in
front. On the devices, the axis of members lies over the axis `member` of the mesh. Copies of the last member pad it to
a multiple of the devices. A saved state has the same form without padding.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vmapbn_flax.data import Dataset
from vmapbn_flax.training.hyperparameters import Hyperparameters, make_hyperparameters
from vmapbn_flax.training.mesh import DATA, MEMBER
from vmapbn_flax.training.network import make_network, to_inputs
from vmapbn_flax.training.state import create_state


def make_members(count: int, devices: Mesh | None) -> "OneRun | Stacked":
    """The members on a mesh, or on the default device."""
    return OneRun(devices) if count == 1 else Stacked(count, devices)


class OneRun:
    """A single run: functions and arrays stay as they are."""

    count = rows_each = 1

    def __init__(self, devices: Mesh | None):
        self.sharding = None if devices is None else NamedSharding(devices, PartitionSpec())

    def map(self, function: Callable, own: Sequence[int]) -> Callable:
        return function

    def map_states(self, function: Callable, own: Sequence[int]) -> Callable:
        return function

    def one_at_a_time(self, function: Callable, own: Sequence[int]) -> Callable:
        return lambda *arguments: function(*arguments[:-1])

    def map_at_once(self, function: Callable) -> Callable:
        return function

    def stack(self, trees: Sequence[PyTree]) -> PyTree:
        return trees[0]

    def pad(self, tree: PyTree) -> PyTree:
        return tree

    def unpad(self, tree: PyTree) -> PyTree:
        return tree

    def template(self, tree: PyTree) -> PyTree:
        return tree

    def split(self, tree: PyTree) -> list[PyTree]:
        return [tree]

    def owners(self) -> list[int]:
        return [0]


class Stacked:
    """The members of a group.

    Attributes:
      count: the number of members.
      rows_each: the number of members on each device along the axis `member`, padding included.
      sharding: of arrays with an axis of members; None without a mesh.
    """

    def __init__(self, count: int, devices: Mesh | None):
        self.count, self._devices = count, devices
        self.sharding = None if devices is None else NamedSharding(devices, PartitionSpec(MEMBER))
        places = 1 if devices is None else devices.shape[MEMBER]
        self.rows_each = math.ceil(count / places)
        self._rows = np.minimum(np.arange(places * self.rows_each), count - 1)

    def map(self, function: Callable, own: Sequence[int]) -> Callable:
        """Maps `function` over the members. Only the arguments at the positions `own` have an axis of members."""
        if _are_one_by_one(self._devices):
            return _one_by_one(function, own, self._devices)

        def mapped(*arguments: PyTree) -> PyTree:
            axes = tuple(0 if i in own else None for i in range(len(arguments)))
            return jax.vmap(function, axes, spmd_axis_name=MEMBER)(*arguments)

        return mapped

    def map_states(self, function: Callable, own: Sequence[int]) -> Callable:
        """Maps `function` over the members; the first argument is a state, and so is the result, which replaces it."""
        if not _are_one_by_one(self._devices):
            return self.map(function, own)
        one_member = _replace_one(function, own)

        def mapped(states: PyTree, *arguments: PyTree) -> PyTree:
            # In place: `lax.map` has another array for its results, which each call fills with zeros and copies back.
            return lax.fori_loop(
                0, self.rows_each, lambda number, states: one_member(states, *arguments, number), states
            )

        return _on_each_device(mapped, own, self._devices)

    def one_at_a_time(self, function: Callable, own: Sequence[int]) -> Callable:
        """As `map_states`, for one member of each device, without a loop; the last argument is its number there."""
        return _on_each_device(_replace_one(function, own), own, self._devices)

    def map_at_once(self, function: Callable) -> Callable:
        """Maps `function` over the members, which share no argument."""
        return jax.vmap(function, spmd_axis_name=MEMBER)

    def stack(self, trees: Sequence[PyTree]) -> PyTree:
        """Stacks one tree a member, on the host, without padding."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    def pad(self, tree: PyTree) -> PyTree:
        """Adds the padding of the devices to a tree on the host."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[self._rows], tree)

    def unpad(self, tree: PyTree) -> PyTree:
        """Removes the padding from a tree on the host."""
        return jax.tree.map(lambda leaf: leaf[: self.count], tree)

    def template(self, tree: PyTree) -> PyTree:
        """The shapes and types of the stacked tree, from those of one member's tree."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.count, *leaf.shape), leaf.dtype), tree)

    def split(self, tree: PyTree) -> list[PyTree]:
        """The tree of each member, from a stacked tree on the host."""
        return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(self.count)]  # noqa: B023

    def owners(self) -> list[int]:
        """The index of the process that has each member on its devices; of several such processes, the first."""
        if self._devices is None:
            return [0] * self.count
        first = self._devices.devices[:, 0]  # along the axis `data` lie copies
        return [first[i // self.rows_each].process_index for i in range(self.count)]


def _are_one_by_one(devices: Mesh | None) -> bool:
    """Whether a device computes its members in turn: a CPU's caches hold the arrays of one, not those of many."""
    return jax.default_backend() == "cpu" and (devices is None or devices.shape[DATA] == 1)


def _one_by_one(function: Callable, own: Sequence[int], devices: Mesh | None) -> Callable:
    """Maps `function` over the members, on each device one member after the other."""

    def mapped(*arguments: PyTree) -> PyTree:
        def one_member(own_arguments: Sequence[PyTree]) -> PyTree:
            by_position = dict(enumerate(arguments)) | dict(zip(own, own_arguments, strict=True))
            return function(*by_position.values())

        return lax.map(one_member, [arguments[i] for i in own])

    return _on_each_device(mapped, own, devices)


def _replace_one(function: Callable, own: Sequence[int]) -> Callable:
    """`function` of one of the members that lie on a device, whose number is the last argument.

    The first argument has the states of them all, and so has the result; `function` takes and returns one state.
    """

    def one_member(*arguments: PyTree) -> PyTree:
        *arguments_of_all, number = arguments

        def take(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), tree)

        result = function(*(take(tree) if i in own else tree for i, tree in enumerate(arguments_of_all)))
        return jax.tree.map(
            lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, number, 0), arguments[0], result
        )

    return one_member


def _on_each_device(function: Callable, own: Sequence[int], devices: Mesh | None) -> Callable:
    """`function` of the members that lie on a device, on each device."""
    if devices is None:
        return function

    def sharded(*arguments: PyTree) -> PyTree:
        members = PartitionSpec(MEMBER)
        specs = tuple(members if i in own else PartitionSpec() for i in range(len(arguments)))
        return jax.shard_map(function, mesh=devices, in_specs=specs, out_specs=members, check_vma=False)(*arguments)

    return sharded


class MemberBytes(NamedTuple):
    """An estimate of the bytes that a member takes, without the data set, which all members share.

    Attributes:
      state: its state, with copies, and its order of the examples.
      activations: of its network, while it is computed.
    """

    state: int
    activations: int

    def of_group(self, count: int, devices: Mesh) -> int:
        """The bytes that so many members take on all devices together."""
        at_once = min(count, devices.shape[MEMBER]) if _are_one_by_one(devices) else count
        return count * self.state + at_once * self.activations


def member_bytes(config: ConfigDict, dataset: Dataset) -> MemberBytes:
    """The estimate for a member with this config; docs/scaling.md compares it with what members take."""
    shape = dataset.train.image_shape

    def state_and_outputs(hyper: Hyperparameters) -> PyTree:
        """The state, and the outputs of each layer for one example."""
        state = create_state(config.model, config.optimizer, dataset.num_classes, shape, hyper)
        network = make_network(config.model, dataset.num_classes, hyper)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        inputs = to_inputs(config.model, jnp.zeros((1, *shape), jnp.uint8))
        return state, network.apply(variables, inputs, train=False, capture_intermediates=True)

    state, outputs = jax.eval_shape(state_and_outputs, make_hyperparameters(config, 1))
    image, outputs = 4 * math.prod(shape), _nbytes(outputs)
    # In training, each output comes with its activation and its cotangent.
    activations = max(config.train.batch_size * (image + 3 * outputs), config.train.eval_batch_size * (image + outputs))
    # With its gradients and updates; on a CPU, with the copies of it that saving and reading a checkpoint takes.
    states = 4 if jax.default_backend() == "cpu" else 2
    return MemberBytes(states * _nbytes(state) + 4 * len(dataset.train), activations)


def _nbytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
