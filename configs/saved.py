"""The config that an earlier run was made with, to continue it or to make it again elsewhere.

python train.py --config=configs/saved.py:runs/vmap_bn --config.train.num_epochs=40
python train.py --config=configs/saved.py:runs/vmap_bn --workdir=runs/again
"""

from pathlib import Path

from vmapbn_flax import default_config
from vmapbn_flax.config import restore_config
from vmapbn_flax.files import read_json


def get_config(workdir):
    path = Path(workdir) / "config.json"
    return restore_config(default_config(), read_json(path), str(path))
