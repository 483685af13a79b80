"""Compiled programs, kept from one start to the next by JAX, in the user's cache directory."""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)", re.DOTALL)


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
