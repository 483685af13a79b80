"""The one-example network of vmap_bn.py without batch norm.

python train.py --config=configs/no_bn.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.model.norm = "none"
    return config
