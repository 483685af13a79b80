"""`vmapbn-flax figure`: figure 1 of Ioffe & Szegedy (2015), from a sweep."""

import argparse

from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.figure import plot_figure


def run(arguments: argparse.Namespace, started: float) -> int:
    """Draws the picture."""
    workdir = Workdir(arguments.workdir)
    plot_figure(workdir)
    print(workdir.figure)
    return 0
