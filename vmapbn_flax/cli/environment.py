"""The changes that the command line makes to its process; an import of the package makes none."""

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)", re.DOTALL)


def prepare() -> None:
    """Makes the changes of every command; to be called before JAX is imported."""
    # Nearly all objects that imports and tracing allocate stay. Searching them for garbage after every 700, which is
    # Python's default, takes a tenth of the time to the first step.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # a search of JAX at exit takes half a second
    keep_compiled_programs()
    _quieten_orbax()
    # Without a home directory matplotlib uses a temporary one, and says so.
    logging.getLogger("matplotlib").addFilter(
        lambda record: "created a temporary cache directory" not in record.getMessage()
    )


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep what is freed for what is allocated next, in blocks of up to 1 GiB.

    By default it returns blocks above 32 MB to the system at once. Convolutions allocate such blocks at each call, and
    the page faults of new ones took a tenth of a training step. With few large blocks it is a loss: threads that
    compile wait for one another's allocations, and compiling took 1.6 times as long.

    To be called before JAX starts its threads.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc: macOS, musl
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_ARENA_MAX, 1)  # a block freed by one thread serves the others
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def import_from_here() -> None:
    """Makes modules of the current directory importable, as `python -m` does."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def forgo_torch() -> None:
    """Makes `import torch` fail, unless torch is loaded: tensorboardX would import it for two seconds, for nothing."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: the import fails


def quieten_pillow() -> None:
    """Filters Pillow's warnings, of damaged parts of images that it can do without."""
    warnings.filterwarnings("ignore", module="PIL")


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
    and its program compiled, at every start. Where the directory is this program's, such an entry is removed when JAX
    warns of it, and then written anew.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("0", "f", "false", "n", "no", "off"):
        return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError, RuntimeError):  # no cache where none can be written
            directory = _own_cache()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    warnings.showwarning = _show_damage


def _own_cache() -> Path:
    """The directory that only this program caches in; a RuntimeError if there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmapbn_flax"


def _show_damage(message: Any, *arguments: Any, show: Callable = warnings.showwarning, **more: Any) -> None:
    """Shows a warning. One about the cache becomes a line that names the entry, which is removed if it is our own."""
    failed = _FAILED.match(str(message))
    if not failed:
        show(message, *arguments, **more)
        return
    action, program, reason = failed.groups()
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    # JAX's message has the name of the program, which many entries share.
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(sys.exc_info()[2])]
    entry = Path(directory, next((f"{names['cache_key']}-cache" for names in frames if "cache_key" in names), ""))
    remedy = "it is compiled again"
    with contextlib.suppress(OSError, RuntimeError):
        if directory == str(_own_cache()):
            entry.unlink(missing_ok=True)
        else:  # another program may have written it
            remedy = "it is compiled at every start until you remove that file"
    reason = " ".join(reason.split())[:200]
    print(f"warning: {entry}: {action} the compiled program {program!r} failed ({reason}); {remedy}", file=sys.stderr)
