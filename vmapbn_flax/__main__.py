"""`python -m vmapbn_flax <command>`."""

import sys

from vmapbn_flax.cli.main import run_program

run_program(sys.argv[1:])
