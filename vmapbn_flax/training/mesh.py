"""Devices: dividing a CPU into several, and the mesh that members and batches lie on."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.errors import UsageError

MEMBER = "member"  # the mesh axis of a sweep's members
DATA = "data"  # the mesh axis that a batch is split over


def divide_cpu(mesh: ConfigDict, *, sweep: bool, processes: int = 1) -> None:
    """Sets the number of CPU devices as `config.mesh` says, unless JAX has made its devices already.

    The automatic number is what `mesh.data` takes, of all processes together; of a sweep, what `mesh.member` rows of
    that take, and at least one a core. A number in the environment beats the config.
    """
    environment = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    rows = max(1, mesh.member) if sweep else 1
    automatic = max(cores() if sweep else 1, -(-rows * mesh.data // processes))
    if not environment:
        with contextlib.suppress(RuntimeError):  # too late: JAX has made its devices
            jax.config.update("jax_num_cpu_devices", mesh.cpu_devices or automatic)


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has no affinities
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def solo_mesh(mesh: ConfigDict) -> Mesh:
    """The mesh, as `config.mesh` says, of the devices that the batches of a run are split over, in all processes.

    Raises:
      UsageError: there are fewer devices than `config.mesh.data`, or not equally many in each process.
    """
    automatic = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return _mesh(1, mesh.data or automatic)


def member_mesh(mesh: ConfigDict, members: int) -> Mesh:
    """The mesh, as `config.mesh` says, of the devices that so many members of a sweep lie on, in all processes.

    There are no more devices than the members need, but equally many in each process: a few may hold padding alone.

    Raises:
      UsageError: there are fewer devices than `config.mesh.data`.
    """
    data = mesh.data or 1
    most = max(1, jax.device_count() // data)
    member = min(mesh.member or most, most, members)
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
    """The memory of all devices along the member axis, if other processes have as much as this one."""
    stats = [device.memory_stats() for device in devices.local_devices]
    if all(stat and "bytes_limit" in stat for stat in stats):
        total = sum(stat["bytes_limit"] for stat in stats) * jax.process_count()
    else:  # of this machine, which the processes may share
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // devices.shape[DATA]


def put(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Puts host arrays, the same in every process, on the devices as `sharding` says; None is the default device."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)


def fetch(tree: PyTree) -> PyTree:
    """Copies arrays from the devices to the host of every process; numpy arrays stay as they are.

    Where a process has only a part of an array, all processes must make the same call. Each such array in turn lies
    whole on every device for a moment.
    """

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf
        # On a CPU, device_get returns a view of a buffer that the next step may overwrite.
        return np.array(jax.device_get(_replicated(leaf)))

    return jax.tree.map(copy, tree)


def _replicated(leaf: Any) -> Any:
    if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
        return leaf
    return _replicate(leaf.sharding.mesh)(leaf)


@functools.cache
def _replicate(devices: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(devices, PartitionSpec()))


def device_name(devices: Sequence[jax.Device]) -> str:
    """The devices in words, such as `cpu` or `2 x NVIDIA H100`."""
    return devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"
