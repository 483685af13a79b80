"""A small convolutional network on MNIST, with random shifts.

python train.py --config=configs/conv.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config("conv")
    config.data.augment = ("shift:2",)
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.train.num_epochs = 8.0
    return config
