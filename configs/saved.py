"""The config of an earlier run, to continue the run or to repeat it elsewhere.

python train.py --config=configs/saved.py:runs/vmap_bn --config.train.num_epochs=40
python train.py --config=configs/saved.py:runs/vmap_bn --workdir=runs/again
"""

from pathlib import Path

from vmapbn_flax import default_config
from vmapbn_flax.config import restore_config
from vmapbn_flax.runs.workdir import Workdir


def get_config(workdir):
    saved = Workdir(Path(workdir))
    return restore_config(default_config(), saved.read_config(), str(saved.config))
