"""Trains the run that a config describes, or resumes it.

python train.py --config=configs/vmap_bn.py
python train.py --config=configs/vmap_bn.py --config.seed=1 --workdir=runs/vmap_bn_seed_1
"""

import sys
import time

if __name__ == "__main__":
    started = time.monotonic()  # before the imports, which are a part of the start-up
    from vmapbn_flax.cli.main import run_program

    run_program(["train", *sys.argv[1:]], started)
