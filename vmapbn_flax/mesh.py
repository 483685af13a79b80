"""Devices: how many a CPU is divided into, and how members, batches and the data set lie over them."""

import contextlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree, UInt8
from ml_collections import ConfigDict

from vmapbn_flax.data import Split
from vmapbn_flax.errors import UsageError

MEMBER = "member"  # the axis of a mesh that a sweep's members are laid over
DATA = "data"  # the axis that a batch is split over


def divide_cpu(config: ConfigDict, *, sweep: bool) -> None:
    """Asks for as many CPU devices as `config.mesh` says, if nothing has touched a device yet.

    What the environment says about them beats the config.
    """
    environment = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    automatic = len(os.sched_getaffinity(0)) if sweep else -(-config.mesh.data // config.distributed.num_processes)
    if not environment:
        with contextlib.suppress(RuntimeError):  # too late, in a process that has its devices
            jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices or max(1, automatic))


def solo_mesh(config: ConfigDict) -> Mesh:
    """The devices of all processes that the batches of a run are split over.

    Raises:
      UsageError: `config.mesh.data` is not a number of devices that there are, as many in each process.
    """
    automatic = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return _mesh(1, config.mesh.data or automatic)


def member_mesh(config: ConfigDict, members: int) -> Mesh:
    """The devices of all processes that `members` of a sweep lie on, no more than it takes.

    Each process takes part with as many, so that there may be some more than members.

    Raises:
      UsageError: `config.mesh.data` is more than there are devices.
    """
    data = config.mesh.data or 1
    most = max(1, jax.device_count() // data)
    member = min(config.mesh.member or most, most, members)
    multiple = jax.process_count() // math.gcd(jax.process_count(), data)
    return _mesh(-(-member // multiple) * multiple, data)


def _mesh(member: int, data: int) -> Mesh:
    processes = [jax.local_devices(process) for process in range(jax.process_count())]
    each, rest = divmod(member * data, len(processes))
    if rest or each > min(map(len, processes)):
        raise UsageError(
            f"config.mesh.data: got {data}, expected at most the {jax.device_count()} devices there are, as many of "
            f"each process. Change it with --config.mesh.data=...; --config.mesh.cpu_devices=... divides a CPU."
        )
    devices = [device for devices in processes for device in devices[:each]]
    return jax.make_mesh((member, data), (MEMBER, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def memory_bytes(devices: Mesh) -> int:
    """What the devices along the axis of members have together, if other processes have as much as this one."""
    stats = [device.memory_stats() for device in devices.local_devices]
    if all(stat and "bytes_limit" in stat for stat in stats):
        total = sum(stat["bytes_limit"] for stat in stats) * jax.process_count()
    else:  # of a machine, which the processes may share
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // devices.shape[DATA]


def put(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Arrays of the host, the same in every process, as `sharding` lays them out; None is the default device."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)


class Layout:
    """How batches, and the data set that they are taken from, lie over the axis `data` of a mesh.

    A batch is split by examples. The images of the data set, `(examples, features)`, lie whole on every
    device or, `by_columns`, a share of the features of each on every device. Then too a device takes the
    examples of a batch without asking another, and one all-to-all makes whole images of their parts,
    which moves as many bytes as the batch has. What is streamed, and so in order when it is read, lies
    `in_batches`, `(batches, batch, features)`: a process reads, and a device holds, its share of each.
    """

    def __init__(self, devices: Mesh | None = None, *, by_columns: bool = False, in_batches: bool = False):
        self.count = devices.shape[DATA] if devices is not None else 1
        self.in_batches = in_batches and self.count > 1
        self.by_columns = by_columns and self.count > 1 and not self.in_batches
        self._devices, self._num_features = devices, None

    def put(self, split: Split) -> tuple[Array, Array]:
        """The images and labels of examples, all of them in each process."""
        images, labels = split.images.reshape(len(split), -1), split.labels
        self._num_features = images.shape[1]
        if self.by_columns:
            images = np.pad(images, ((0, 0), (0, -images.shape[1] % self.count)))  # features that divide
        columns = self._sharding(None, DATA) if self.by_columns else self._sharding()
        return put(images, columns), put(labels, self._sharding())

    def share(self, batches: Int[np.ndarray, "batches batch"], group: int = 1) -> Int[np.ndarray, "batches share"]:
        """Which rows of the batches the devices of this process get, and -1 for padding."""
        padding = self.padded(batches.shape[1], group) - batches.shape[1]
        padded = np.pad(batches, ((0, 0), (0, padding)), constant_values=-1)
        return np.split(padded, jax.process_count(), axis=1)[jax.process_index()]

    def put_share(self, split: Split, num_batches: int) -> tuple[Array, Array]:
        """The images and labels of batches, of which each process has the examples that `share` names."""
        images = split.images.reshape(num_batches, -1, math.prod(split.image_shape))
        labels = split.labels.reshape(num_batches, -1)
        sharding = self._sharding(None, DATA)
        return tuple(jax.make_array_from_process_local_data(sharding, array) for array in (images, labels))

    def padded(self, size: int, group: int = 1) -> int:
        """The least number of rows, in groups of `group`, that divides and has room for `size`."""
        return -(-size // group // self.count) * self.count * group

    def pad(self, rows: Int[Array, " batch"], group: int = 1) -> Int[Array, " padded"]:
        """`rows` with further groups of `group`, if it takes any to divide."""
        return jnp.pad(rows, (0, self.padded(len(rows), group) - len(rows)))

    def mask(self, size: int, group: int = 1) -> Bool[Array, " padded"] | None:
        """The `size` rows of a padded batch that are not padding; None if there is no padding."""
        padded = self.padded(size, group)
        return None if padded == size else self._constrain(jnp.arange(padded) < size, DATA)

    def batch(
        self,
        images: UInt8[Array, "batches batch features"],
        labels: Int[Array, "batches batch"],
        number: Int[Array, ""],
    ) -> tuple[UInt8[Array, "batch features"], Int[Array, " batch"]]:
        """The `number`-th of what `put_share` placed."""
        taken = (lax.dynamic_index_in_dim(array, number, keepdims=False) for array in (images, labels))
        return tuple(self._constrain(array, DATA) for array in taken)

    def take(
        self,
        images: UInt8[Array, "examples stored"],
        labels: Int[Array, " examples"],
        rows: Int[Array, " batch"],
    ) -> tuple[UInt8[Array, "batch features"], Int[Array, " batch"]]:
        """The examples `rows`, which divide over the devices."""
        # Said of the rows too, or the compiler divides them, and gathers them again.
        rows = self._constrain(rows)
        if self.by_columns:
            parts = self._constrain(_rows(images, rows), None, DATA)
            taken = self.without_padding(self._constrain(parts, DATA)), self._constrain(_rows(labels, rows))
        else:
            rows = self._constrain(rows, DATA)
            taken = _rows(images, rows), _rows(labels, rows)
        return tuple(self._constrain(array, DATA) for array in taken)

    def without_padding(self, images: UInt8[Array, "examples stored"]) -> UInt8[Array, "examples features"]:
        """`images` without the zeros that `put` gave them."""
        return images[:, : self._num_features] if self.by_columns else images

    def _sharding(self, *axes: str | None) -> NamedSharding | None:
        return NamedSharding(self._devices, PartitionSpec(*axes)) if self._devices is not None else None

    def _constrain(self, x: Array, *axes: str | None) -> Array:
        return x if self.count == 1 else lax.with_sharding_constraint(x, self._sharding(*axes))


def _rows(x: Array, rows: Int[Array, " batch"]) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")  # without the checks of each element that `x[rows]` makes


ONE_DEVICE = Layout()
