"""The command line: `vmapbn-flax ...`, `python -m vmapbn_flax ...` and `python train.py ...`.

Each command is a module of this package. It is imported when its arguments are checked and signals and errors are
handled, since its imports take time.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from vmapbn_flax import signals
from vmapbn_flax.cli import environment
from vmapbn_flax.cli.parser import make_parser
from vmapbn_flax.errors import Interrupted, UsageError, UserError, described


def console_script() -> NoReturn:
    """The entry point of `vmapbn-flax`."""
    run_program(sys.argv[1:])


def run_program(argv: Sequence[str], started: float | None = None) -> NoReturn:
    """Runs `main`, and ends the process with its status.

    A failed process ends at once: an ordinary exit would wait for its threads, which may compile for minutes.
    """
    try:
        status = main(argv, started)
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    if status:
        with contextlib.suppress(OSError):  # the reader of a pipe is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit()


def main(argv: Sequence[str], started: float | None = None) -> int:
    """Runs one command and returns its exit status; an error is one line on standard error."""
    started = time.monotonic() if started is None else started
    try:
        if sys.platform == "win32":
            raise UsageError("got Windows, expected Linux or macOS. Use the Windows Subsystem for Linux (WSL).")
        environment.prepare()
        with signals.fatal():
            return _run(argv, started)
    except UserError as error:
        return _report(str(error), error.exit_status)
    except Interrupted as stop:
        return _report(str(stop), stop.exit_status) if stop.said else stop.exit_status
    except KeyboardInterrupt as stop:
        return _report(signals.STOPPED, 128 + (stop.args or (signal.SIGINT,))[0])
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _report(
                f"out of memory ({error}): the network and its batches do not fit. "
                f"Lower the sizes in config.model, train.batch_size or train.eval_batch_size.",
                1,
            )
        raise
    except OSError as error:
        return _report(described(error), 1)


def _run(argv: Sequence[str], started: float) -> int:
    arguments, rest = make_parser().parse_known_args(argv)
    if arguments.takes_config:
        from vmapbn_flax.cli.flags import parse_config

        arguments.config, workdir = parse_config(rest)
        arguments.config_flags = rest
        arguments.workdir = getattr(arguments, "workdir", None) or workdir
    elif rest:
        raise UsageError(f"got the unknown argument {rest[0]!r}, expected those that --help lists")
    command = importlib.import_module(f"vmapbn_flax.cli.{arguments.command}")
    return command.run(arguments, started)


def _report(message: str, status: int) -> int:
    print("error:" if status in (1, 2) else "note:", " ".join(message.split()), file=sys.stderr)
    return status
