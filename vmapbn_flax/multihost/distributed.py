"""jax.distributed, with its ways to handle signals and failures replaced by ours."""

import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

import jax

from vmapbn_flax.errors import RunError, UsageError

_HEARTBEAT_SECONDS = 6  # of silence after which a process is taken for dead
LOST = (
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
            f"config.distributed: got {first_line(error)}; expected {coordinator!r} to name where all processes meet "
            f"within five minutes. Start distributed.num_processes of them, each with a process_id of its own."
        ) from error


def leave(message: str, status: int) -> NoReturn:
    """Ends this process at once, with a line: what else there is to do at the end of one waits for the others."""
    sys.stdout.flush()
    os.write(2, f"error: {message}\n".encode())  # not through a buffer that another thread may hold
    os._exit(status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(signum: int) -> None:
    """Handles SIGABRT, which is how jax.distributed ends a process when it finds that another one died.

    A handler of Python's own would run when that thread gets back to Python, which it does not.
    """
    leave(LOST, 1)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, shortened."""
    return str(error).partition("\n")[0][:200]
