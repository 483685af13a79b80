"""jax.distributed, with its ways to handle signals and failures replaced by ours."""

import ctypes
import os
import signal
import socket
import sys
import traceback
from typing import NoReturn

import jax

from vmapbn_flax.errors import RunError, UsageError, UserError

_HEARTBEAT_SECONDS = 6  # of silence after which a process is taken for dead
_LOST = (
    "lost another process of this run, which ended or cannot be reached; the same command in every process continues "
    "from the newest checkpoint"
)


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Meets the other processes, as the fields of `config.distributed` say.

    Raises:
      RunError: they cannot be met.
      UsageError: "slurm" is not there to say who they are.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    if coordinator == "slurm":
        if "SLURM_PROCID" not in os.environ:
            raise UsageError(
                "config.distributed.coordinator: got 'slurm' in a process that srun did not start, expected one that "
                "it did. Start it with srun, or give it the 'host:port' of process 0."
            )
        where = {"cluster_detection_method": "slurm"}
    else:
        where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    try:
        if coordinator != "slurm" and process_id == 0:  # jax does not survive a port that is taken
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError, KeyError, OSError, OverflowError) as error:
        raise RunError(
            f"config.distributed: got {_first_line(error)}; expected {coordinator!r} to name where all processes meet "
            f"within five minutes. Start distributed.num_processes of them, each with a process_id of its own."
        ) from error


def leave(error: BaseException, status: int) -> NoReturn:
    """Exits with a line about `error`, now: what else there is to do at the end of a process waits for the others."""
    if isinstance(error, KeyboardInterrupt):
        message = "stopped; the same command in every process starts again"
    elif isinstance(error, UserError | OSError):
        message = str(error)
    # What XLA raises where a connection breaks depends on the device.
    elif isinstance(error, jax.errors.JaxRuntimeError | ValueError):
        message = f"{_LOST} ({_first_line(error)})"
    else:
        message = traceback.format_exc()
    _exit(message, status)


def _exit(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    os.write(2, f"error: {message}\n".encode())  # not through a buffer that another thread may hold
    os._exit(status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(signum: int) -> None:
    """Handles SIGABRT, which is how jax.distributed ends a process when it finds that another one died.

    A handler of Python's own would run when that thread gets back to Python, which it does not.
    """
    _exit(_LOST, 1)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
