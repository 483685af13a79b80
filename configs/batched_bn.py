"""The textbook variant: the same network, written for a whole batch. It gives the numbers of vmap_bn.py.

python train.py --config=configs/batched_bn.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.model.norm = "batched"
    return config
