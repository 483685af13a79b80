"""The changes that the command line makes to its process; an import of the package makes none."""

import atexit
import contextlib
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)", re.DOTALL)


def prepare() -> None:
    """Makes all changes but that of `forgo_torch`; to be called before JAX is imported."""
    atexit.register(gc.freeze)  # a search of JAX for garbage at exit takes half a second
    keep_compiled_programs()
    _quieten_orbax()


def forgo_torch() -> None:
    """Makes `import torch` fail, unless torch is loaded: tensorboardX would import it for two seconds, for nothing."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: the import fails


def _quieten_orbax() -> None:
    """Filters what orbax logs: dozens of lines a save, and tracebacks of errors that it raises as well.

    The tracebacks come from orbax itself, from tasks that it abandons, and from event loops that it closes while its
    threads still call them.
    """
    import absl.logging  # noqa: F401  # makes the logger "absl", of a class that knows who logs

    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: Any, report: Callable[[Any], None] = sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


def keep_compiled_programs() -> None:
    """Makes JAX, when it is imported, cache compiled programs on the disk; the user's settings of JAX win.

    JAX writes an entry in place, and only once. An entry that a kill or a full disk cut short would be found damaged,
    and its program compiled, at every start. Such an entry is removed when JAX warns of it, and then written anew.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("0", "f", "false", "n", "no", "off"):
        return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError, RuntimeError):  # no cache where none can be written
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmapbn_flax"
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    warnings.showwarning = _remove_damaged


def _remove_damaged(message: Any, *arguments: Any, show: Callable = warnings.showwarning, **more: Any) -> None:
    """Shows a warning. One about the cache becomes a line, and the entries of its program are removed."""
    failed = _FAILED.match(str(message))
    if not failed:
        show(message, *arguments, **more)
        return
    action, program, reason = failed.groups()
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", os.devnull))
    with contextlib.suppress(OSError):
        for entry in directory.glob(f"{program}-*-cache"):
            entry.unlink(missing_ok=True)
    reason = " ".join(reason.split())[:200]
    text = f"warning: {directory}: {action} the compiled program {program!r} failed ({reason}); it is compiled again"
    print(text, file=sys.stderr)
