"""The main job: batch norm in a network written for one example, on MNIST.

python train.py --config=configs/vmap_bn.py
"""

from vmapbn_flax import default_config


def get_config():
    return default_config()
