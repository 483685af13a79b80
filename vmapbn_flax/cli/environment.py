"""What the command line changes in its process, and an import of the package does not."""

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
    """Makes all changes but those of `forgo_torch`; to be called before JAX is imported."""
    atexit.register(gc.freeze)  # or the interpreter searches JAX for garbage before it exits, which takes half a second
    keep_compiled_programs()
    _quieten_orbax()


def forgo_torch() -> None:
    """Has imports of torch fail, unless it is there: tensorboardX would take two seconds to import it, for nothing."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: the import fails


def _quieten_orbax() -> None:
    """Leaves out what orbax logs: dozens of lines a save, and, when one fails, tracebacks of what is raised as well.

    Of its own, of tasks that it leaves behind, and of event loops that it closes while its threads still call them.
    """
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: Any, report: Callable[[Any], None] = sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


def keep_compiled_programs() -> None:
    """Has JAX, once it is imported, keep compiled programs; its own settings win.

    JAX writes an entry in place, and never again: one that a kill or a full disk cut short would be found damaged, and
    its program compiled, at every start. Here it is removed as soon as JAX warns of it, and then written anew.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("0", "f", "false", "n", "no", "off"):
        return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError, RuntimeError):  # one that cannot be written, or found, is done without
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmapbn_flax"
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    warnings.showwarning = _remove_damaged


def _remove_damaged(message: Any, *arguments: Any, show: Callable = warnings.showwarning, **more: Any) -> None:
    """Shows a warning; of a cache entry in a line, which says that those of its program are removed."""
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
