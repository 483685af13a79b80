"""`vmapbn-flax report`: the members of a sweep, ranked and drawn."""

import argparse
import sys

from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.report import report


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints the ranking and draws the picture."""
    report(Workdir(arguments.workdir), file=sys.stdout, top=arguments.top)
    return 0
