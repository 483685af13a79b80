"""`vmapbn-flax plot`: several runs in one picture."""

import argparse

from vmapbn_flax.runs.pictures import plot_runs


def run(arguments: argparse.Namespace, started: float) -> int:
    """Draws the picture."""
    plot_runs(arguments.workdirs, arguments.output)
    print(arguments.output)
    return 0
