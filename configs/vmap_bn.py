"""The main job: batch norm in a network written for one example, on MNIST.

python train.py --config=configs/vmap_bn.py
"""

from configs import default


def get_config():
    return default.get_config()
