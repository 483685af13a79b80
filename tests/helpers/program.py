"""The program in processes that start at once: forked off one that has done the imports.

`Program` is for tests; run as a script, this file is that one process. Each one it forks runs a command
line as `python -m vmapbn_flax` would, except that "small" is the data set of tests/helpers/small.py.
"""

import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/helpers/fault_config.py"
SWEEP = "--config=tests/helpers/fault_sweep_config.py"
EXTENDED_SWEEP = f"{SWEEP}:extended"
HALVING_SWEEP = f"{SWEEP}:halving"
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
PROGRAMS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


class Program:
    """Runs processes, one at a time."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )

    def start(self, *argv: object, log: Path, **fault: object) -> None:
        """Starts the command line `argv`, its output going to `log`, with a fault (see `_inject`)."""
        request = {"argv": [str(argument) for argument in argv], "log": str(log), "fault": fault}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        self._process = os.pidfd_open(int(self._server.stdout.readline()))
        print(file=self._server.stdin, flush=True)  # until then even a dead one keeps its id

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, minus the signal's number if one killed it; None if it runs for longer."""
        if not select.select([self._process], [], [], seconds)[0]:
            return None
        os.close(self._process)
        return os.waitstatus_to_exitcode(int(self._server.stdout.readline()))

    def signal(self, signum: int) -> None:
        signal.pidfd_send_signal(self._process, signum)

    def run(self, *argv: object, log: Path, **fault: object) -> int:
        """`start` and `wait`."""
        self.start(*argv, log=log, **fault)
        return self.wait()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def environment() -> dict[str, str]:
    """Variables for a process that imports what the tests do."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # Undisturbed runs keep all they compile, or one whose files may not grow would tear what it is first to keep.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _serve() -> None:
    for name in (
        "vmapbn_flax.sweeps.report",
        "rich.table",
        "vmapbn_flax.runs.tensorboard",
        "vmapbn_flax.cli.flags",
        "jaxlib.mlir.dialects.mhlo",
    ):  # which the program imports late
        importlib.import_module(name)
    from tests.helpers import small
    from vmapbn_flax.cli import refresh
    from vmapbn_flax.cli.main import main
    from vmapbn_flax.runs import train
    from vmapbn_flax.sweeps import plan

    train.load_dataset = plan.load_dataset = refresh.load_dataset = small.load
    _keep_what_followers_compile()
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            at_end = _inject(**request["fault"])
            status = main(request["argv"])
            at_end()
            os._exit(status)  # whatever main left to be done now is lost; and tearing down takes a second
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitpid(pid, 0)[1], flush=True)


def _keep_what_followers_compile() -> None:
    """Makes every process of a run write to JAX's cache, not only the first: on a CPU, each has keys of its own."""
    from jax._src import compiler

    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))


def _warm_up() -> None:
    """Fills the caches of JAX's tracing and of matplotlib that each process would fill anew: a quarter of its time.

    It starts no device, whose threads a fork would lose.
    """
    import jax

    from tests.helpers import small
    from vmapbn_flax.runs.pictures import plot_runs
    from vmapbn_flax.runs.workdir import Workdir
    from vmapbn_flax.training.state import create_state
    from vmapbn_flax.training.steps import Batch

    config, examples = small.config(), small.split(small.BATCH, seed=0)
    create = functools.partial(create_state, config.model, config.optimizer, small.CLASSES, small.IMAGE)
    state = jax.eval_shape(create, hyper := small.hyper(config))
    jax.eval_shape(small.step_of(config), state, hyper, Batch(examples.images, examples.labels))
    with tempfile.TemporaryDirectory() as directory:
        workdir = Workdir(Path(directory))
        rows = ({"step": step, "train_loss": 1 / step, "test_accuracy": step / 10} for step in range(1, 10))
        workdir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plot_runs([workdir.path], workdir.picture)
    gc.freeze()  # a search for garbage would copy the pages that the processes share


def _inject(
    inside: str = "",
    change: int = 0,
    count: str = "",
    name: str = "",
    call: int = 1,
    seconds: float = 0,
    file_limit: int = 0,
    watch: str = "",
    before: str = "",
) -> Callable[[], None]:
    """Arranges what is to go wrong; what it returns is to be called at the end.

    Args:
      inside: a directory; the process dies before its `change`-th change to files in there.
      change: see there.
      count: a file to note the number of such changes in, at the end.
      name: of a function, as "module:qualified.name"; the process dies when it is called ...
      call: ... for this time.
      seconds: if given, it does not die in that call, but is kept waiting there for so long.
      file_limit: the largest size of a file, in bytes.
      watch: a directory; what is unpickled, run as another program, compiled or imported from there, or written
        elsewhere, is noted in the log.
      before: a function to call first, as "module:name".
    """
    changes = calls = 0

    def before_change(event: str, arguments: tuple) -> None:
        nonlocal changes
        path = _changed(event, arguments)
        if path.startswith(inside):
            changes += 1
            if changes == change:
                os.write(2, f"killed before {event} of {path}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def suspect(event: str, arguments: tuple) -> None:
        path, allowed = _changed(event, arguments), (watch, os.environ["JAX_COMPILATION_CACHE_DIR"])
        foreign = event in ("compile", "import", "exec") and any(
            word in str(arguments) for word in (watch, "antigravity")
        )
        if foreign or event in PROGRAMS or (path and not path.startswith(allowed)):
            os.write(2, f"watched: {event} {arguments}\n".encode())

    if before:
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)()
    if watch:
        sys.addaudithook(suspect)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if inside:
        sys.addaudithook(before_change)
    if name:
        module, _, path = name.partition(":")
        *parents, attribute = path.split(".")
        owner = functools.reduce(getattr, parents, importlib.import_module(module))
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call and seconds:
                os.write(2, b"waiting\n")
                time.sleep(seconds)
            elif calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    return lambda: Path(count).write_text(str(changes)) if count else None


def _changed(event: str, arguments: tuple) -> str:
    """The path that an event is about to change; "" for another event."""
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return str(arguments[0])
    if event not in CHANGES:
        return ""
    directory = arguments[-1]  # what a relative name in os.remove and os.rmdir is relative to
    if event in ("os.remove", "os.rmdir") and directory >= 0:
        return str(Path(f"/proc/self/fd/{directory}").readlink() / arguments[0])
    return str(arguments[0])


if __name__ == "__main__":
    _serve()
