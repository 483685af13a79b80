"""`vmapbn-flax fold`: the network of a run without its batch norms, as a file for other programs."""

import argparse

from vmapbn_flax.cli.export import write
from vmapbn_flax.runs.trained import TrainedRun


def run(arguments: argparse.Namespace, started: float) -> int:
    """Writes the file, and prints its name and what it leaves out."""
    return write(arguments, TrainedRun.fold)
