"""Batch norm under vmap, the textbook's batch norm, and none, five seeds each: three programs.

python train.py --config=configs/sweep_norm.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.validation_size = 5000
    config.train.num_epochs = 10.0
    config.sweep.model.norm = ("vmap", "batched", "none")
    config.sweep.seed = (0, 1, 2, 3, 4)
    return config
