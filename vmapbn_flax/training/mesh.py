"""Devices: how many a CPU is divided into, and the mesh that members and batches lie over."""

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

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


def device_name(devices: Sequence[jax.Device]) -> str:
    """The devices, as `cpu` or `2 x NVIDIA H100`."""
    return devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"
