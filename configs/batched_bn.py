"""The textbook variant: the same network written for a whole batch. The same numbers as vmap_bn.py.

python train.py --config=configs/batched_bn.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.model.norm = "batched"
    return config
