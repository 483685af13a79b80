"""Devices: how many a CPU is divided into, and which of them the members of a sweep lie on."""

import contextlib
import os

import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

MEMBER = "member"  # the axis of a mesh that a sweep's members are laid over


def divide_cpu(config: ConfigDict, *, sweep: bool) -> None:
    """Asks for as many CPU devices as `config.mesh` says, if nothing has touched a device yet.

    What the environment says about them beats the config.
    """
    environment = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    count = config.mesh.cpu_devices or (len(os.sched_getaffinity(0)) if sweep else 1)
    if not environment:
        with contextlib.suppress(RuntimeError):  # too late, in a process that has its devices
            jax.config.update("jax_num_cpu_devices", count)


def member_mesh(config: ConfigDict, members: int) -> Mesh:
    """The devices of this process that `members` of a sweep lie on: no more than there are members."""
    devices = jax.local_devices()
    count = min(config.mesh.member or len(devices), len(devices), members)
    return jax.make_mesh((count,), (MEMBER,), axis_types=(AxisType.Auto,), devices=devices[:count])


def memory_bytes(mesh: Mesh) -> int:
    """What the devices of `mesh` have together."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    if all(stat and "bytes_limit" in stat for stat in stats):
        return sum(stat["bytes_limit"] for stat in stats)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
