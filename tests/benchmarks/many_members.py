"""A sweep of many tiny members: seconds and memory of each phase, by the number of members.

python tests/benchmarks/many_members.py 20 200 2000

Each size is a process of its own, which may have 256 open files, on a CPU of two devices.
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import ROOT, say, table

OPEN_FILES = 256
EPOCHS, DRAWS = 2.0, ("log_uniform", 1e-3, 0.3)


class Phases:
    """The seconds, the calls and the peak memory of the process by the end of each phase."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.megabytes: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started
            self.calls[name] += 1
            self.megabytes[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Counts the calls of a function or method as a phase."""
        original: Callable = getattr(owner, function)

        @functools.wraps(original)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.phase(name):
                return original(*arguments, **named)

        setattr(owner, function, timed)


def sweep_config(members: int) -> Any:
    from tests.helpers import small

    config = small.config(model__hidden=(8,), data__validation_size=20, train__num_epochs=EPOCHS).unlock()
    config.optimizer.name = "sgd"
    config.sweep_options.mode, config.sweep_options.size = "random", members
    config.sweep.optimizer.learning_rate = DRAWS
    config.sweep.optimizer.weight_decay = DRAWS
    config.sweep.train.label_smoothing = ("uniform", 0.0, 0.2)
    return config.lock()


def run(members: int, workdir: Path) -> dict[str, Any]:
    """Trains a sweep, and does again what is done with a finished one."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    from tests.helpers import small
    from vmapbn_flax.runs.loop import Loop
    from vmapbn_flax.runs.workdir import Workdir
    from vmapbn_flax.sweeps import batches, plan, report, train
    from vmapbn_flax.sweeps.ledger import Ledger
    from vmapbn_flax.sweeps.results import load_sweep
    from vmapbn_flax.training.programs import Programs

    plan.load_dataset = lambda data: small.dataset(data.validation_size)
    phases, config = Phases(), sweep_config(members)
    for owner, function, name in (
        (train, "expand", "expand"),
        (batches, "make_plan", "plan"),
        (Ledger, "write", "ledger, written"),
        (Programs, "advance", "steps"),
        (Loop, "_evaluate", "evaluations"),
        (Loop, "_agree", "rows"),
        (Loop, "save", "checkpoints of the group"),
        (train, "save_members", "checkpoints of the members"),
        (report, "report", "report, the picture included"),
        (report, "plot_sweep", "picture"),
    ):
        phases.watch(owner, function, name)
    with phases.phase("the whole sweep"):
        train.train_sweep(config, workdir)
    ledger = Workdir(workdir).ledger.stat().st_size
    assert Ledger(Workdir(workdir)).count("done") == members
    with phases.phase("the same command again"):
        train.train_sweep(config, workdir)
    with phases.phase("load_sweep"):
        assert len(load_sweep(workdir)) == members
    return {"seconds": phases.seconds, "calls": phases.calls, "megabytes": phases.megabytes, "ledger": ledger}


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]]
    found = {}
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    for size in sizes:
        say(f"{size} members")
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, __file__, "measure", str(size), f"{directory}/sweep"]
            done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[size] = json.loads(done.stdout)
    last = found[sizes[-1]]
    rows = [
        [
            name,
            *(f"{found[size]['seconds'][name]:.2f}" for size in sizes),
            *(str(found[size]["calls"][name]) for size in sizes[-1:]),
            f"{last['megabytes'][name]:.0f}",
        ]
        for name in last["seconds"]
    ]
    header = [f"seconds, of {sizes[-1]} members", *map(str, sizes), "calls", "MB by then"]
    print(table(header, rows))
    print(f"\nThe ledger has {', '.join(str(found[size]['ledger']) for size in sizes)} bytes.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(run(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
