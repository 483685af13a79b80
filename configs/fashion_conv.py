"""The network of conv.py on Fashion-MNIST: four files of MNIST's format, in data.dir.

python train.py --config=configs/fashion_conv.py --config.data.dir=fashion_mnist
"""

from configs import conv


def get_config():
    config = conv.get_config()
    config.data.name = "idx"
    config.data.dir = "fashion_mnist"
    config.data.augment = ("shift:1", "flip")
    return config
