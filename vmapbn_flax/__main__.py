"""`python -m vmapbn_flax <command>`."""

import sys

from vmapbn_flax.cli.main import main

sys.exit(main(sys.argv[1:]))
