"""`vmapbn-flax selftest`: a run that is stopped and resumed, compared with an undisturbed one, on this machine."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vmapbn_flax import signals
from vmapbn_flax.cli.parity import parity
from vmapbn_flax.cli.refresh import refresh
from vmapbn_flax.config import validate, validate_sizes
from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_json, read_lines
from vmapbn_flax.networks import has_twin
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.console import say, table
from vmapbn_flax.runs.loading import load_state
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.hyperparameters import steps_in
from vmapbn_flax.training.programs import Programs
from vmapbn_flax.training.trees import named_leaves


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints the comparisons; the status is 1 if something differs."""
    found = selftest(arguments.config, arguments.config_flags)
    cells = [
        (what, size, f"NO: {len(different)} differ, first {different[0]}" if different else "yes")
        for what, size, different in found
    ]
    table(cells, ("stopped and resumed against undisturbed", "compared", "equal"), file=sys.stdout)
    return 1 if any(comparison.different for comparison in found) else 0


class Comparison(NamedTuple):
    """What was compared, how much of it, and the names of what differs."""

    what: str
    size: str
    different: list[str]


def selftest(config: ConfigDict, flags: Sequence[str]) -> list[Comparison]:
    """Trains `config` undisturbed, and again with a stop, in processes of their own, and compares the results.

    A SIGTERM stops the second run when it has logged a row; it resumes from the step that was saved then. With batch
    norm, `parity` and `refresh` follow, `parity` where the network has a batched twin. `flags` is the command line that
    describes `config`.

    Raises:
      UsageError: the config or the data cannot be used.
      RunError: a process failed, or the run ended before it could be stopped.
    """
    validate(config)
    dataset = load_dataset(config.data)
    validate_sizes(config, len(dataset.train))
    total = steps_in(config.train.num_epochs, len(dataset.train) // config.train.batch_size)
    log_every = min(config.train.log_every, max(1, total // 4))  # so that most steps are left at the first row
    flags = [*flags, f"--config.train.log_every={log_every}"]
    with signals.raised(), tempfile.TemporaryDirectory(prefix="selftest_") as directory:
        straight, resumed = Workdir(Path(directory, "straight")), Workdir(Path(directory, "resumed"))
        say(f"training {total} steps")
        _train(flags, straight)
        say("training until a SIGTERM")
        _train(flags, resumed, stop=True)
        step = saved_steps(resumed.checkpoints)[-1]
        say(f"resuming at step {step}")
        if f"resuming at step {step} of {total} steps" not in _train(flags, resumed) or step == total:
            raise RunError(
                f"got a run of {total} steps that was over before it could be stopped, expected a longer one. "
                f"Change it with --config.train.num_epochs=..."
            )
        programs = Programs([config], dataset)  # only now: on a GPU the first process takes most of the memory
        ends = zip(_end(straight, programs), _end(resumed, programs), strict=True)
        found = [_compare(*first, second) for first, (_, _, second) in ends]
        if config.model.norm != "none":
            found += _check_norms(config, resumed)
    return found


def _check_norms(config: ConfigDict, workdir: Workdir) -> list[Comparison]:
    """`parity`, if the network has a batched twin, and `refresh` of a finished run."""
    name, found = config.model.name, []
    if has_twin(name):
        say("parity and refresh")
        rows = parity(config)
        outside = [row.what for row in rows if not row.within]
        found.append(Comparison("parity: the vmapped and the batched network", f"{len(rows)} quantities", outside))
    else:
        say(f"refresh, without parity: {name} has no batched twin to be compared with")
    evaluated, summary = refresh(workdir.path, network=name)["before"], read_json(workdir.summary)
    logged = {name: summary.get(name) for name in evaluated}
    found.append(_compare("refresh: the checkpoint evaluated", "figures", _spell(logged), _spell(evaluated)))
    return found


def _train(flags: Sequence[str], workdir: Workdir, *, stop: bool = False) -> str:
    """Trains in a process of its own, to the end or until there is a row; returns its output."""
    command = [sys.executable, "-m", "vmapbn_flax", "train", *flags, f"--workdir={workdir}"]
    log = workdir.path.with_suffix(".log")
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            while stop and process.poll() is None and not workdir.read_rows():
                time.sleep(0.002)
            if stop:
                process.terminate()
            status = process.wait()
        finally:
            process.kill()  # after an exception
    said = log.read_text()
    if status not in ([0, 128 + signal.SIGTERM] if stop else [0]):
        raise RunError(f"got exit status {status} from a run, expected it to train; it said: {said[-1000:]}")
    return said


def _end(workdir: Workdir, programs: Programs) -> list[tuple[str, str, dict[str, bytes]]]:
    """The results of a run: of each, what it is, the unit of its parts, and its parts by name."""
    state = load_state(workdir, None, programs.template())
    arrays = {name: leaf.tobytes() for name, leaf in named_leaves(state).items()}
    lines, summary = read_lines(workdir.metrics), read_json(workdir.summary)
    del summary["seconds"]
    rows = {f"row {number}": line for number, (line, _) in enumerate(lines, start=1)}
    return [
        ("state", "arrays", arrays),
        (workdir.metrics.name, f"rows of {sum(len(row) for _, row in lines)} numbers", rows),
        (f"{workdir.summary.name} but for seconds", "fields", _spell(summary)),
    ]


def _spell(content: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: json.dumps(value).encode() for name, value in content.items()}


def _compare(what: str, unit: str, first: Mapping[str, bytes], second: Mapping[str, bytes]) -> Comparison:
    different = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return Comparison(what, f"{len(first)} {unit}, {sum(map(len, first.values())):,} bytes", different)
