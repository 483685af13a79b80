"""jax.distributed, with our own handling of signals and failures."""

import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

import jax

from vmapbn_flax.errors import RunError, UsageError, first_line

_HEARTBEAT_SECONDS = 6  # without a heartbeat, after which a process counts as dead
LOST = (
    "lost another process of this run, which ended or cannot be reached; the same command in every process continues "
    "from the newest checkpoint"
)

_ends = [(LOST, 1)]  # message and status of an aborted process; the last entry counts


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Connects this process to the others; the arguments are the fields of `config.distributed`.

    Raises:
      RunError: the processes cannot connect.
      UsageError: the coordinator is "slurm", but srun did not start this process.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    if coordinator == "slurm":
        if "SLURM_PROCID" not in os.environ:
            raise UsageError(
                "config.distributed.coordinator: got 'slurm' in a process that srun did not start, expected one that "
                "srun started. Start every process with srun, or give the 'host:port' of process 0."
            )
        where = {"cluster_detection_method": "slurm"}
    else:
        where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    try:
        if coordinator != "slurm" and process_id == 0:  # jax crashes on a port that is in use
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError, KeyError, OSError, OverflowError) as error:
        raise RunError(
            f"config.distributed: got {first_line(error)}; expected {coordinator!r} to name where all processes meet "
            f"within five minutes. Start distributed.num_processes of them, each with a process_id of its own."
        ) from error


def leave(message: str, status: int) -> NoReturn:
    """Ends this process at once, with a line on standard error; an ordinary exit would wait for the other processes."""
    sys.stdout.flush()
    os.write(2, f"error: {message}\n".encode())  # not through a buffer that another thread may hold
    os._exit(status)


def when_aborted(message: str, status: int) -> None:
    """Sets the message and the status with which this process ends, should jax.distributed abort it first."""
    _ends.append((message, status))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(signum: int) -> None:
    """Handles SIGABRT, by which jax.distributed ends a process that has lost another.

    A Python handler would run when the thread returns to Python, and the thread does not return.
    """
    leave(*_ends[-1])
