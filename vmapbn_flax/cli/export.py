"""`vmapbn-flax export`: what a run has trained, as a file for other programs."""

import argparse
from collections.abc import Callable

from vmapbn_flax.cli import environment
from vmapbn_flax.runs.export import export, require_form
from vmapbn_flax.runs.trained import TrainedRun, load_run


def run(arguments: argparse.Namespace, started: float) -> int:
    """Writes the file, and prints its name and what it leaves out."""
    return write(arguments, lambda run: run)


def write(arguments: argparse.Namespace, change: Callable[[TrainedRun], TrainedRun]) -> int:
    """Exports what `change` makes of the run."""
    environment.import_from_here()
    require_form(arguments.output)  # before anything takes time
    trained = load_run(arguments.workdir, arguments.step, network=arguments.network)
    note = export(change(trained), arguments.output)
    print(arguments.output, note, sep="\n" if note else "")
    return 0
