"""The one-example network of vmap_bn.py without batch norm.

python train.py --config=configs/no_bn.py
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.norm = "none"
    return config
