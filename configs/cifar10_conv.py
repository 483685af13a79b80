"""A convolutional network on CIFAR-10 for a CPU: a folder of images, train/<class>/*.jpg and test/<class>/*.jpg.

80.51 % of the test images of CIFAR-10 as JPEG files (mean of the seeds 0 to 2; the deviation is 0.24 %); docs/gpu.md
has the curve.

python train.py --config=configs/cifar10_conv.py --config.data.dir=cifar10
python train.py --config=configs/cifar10_conv.py --config.data.name=cifar10 --config.data.dir=""
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config("conv")
    config.data.name = "folder"
    config.data.dir = "cifar10"
    config.data.augment = ("shift:4", "flip")
    config.model.features = (32, 64, 128)
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.train.num_epochs = 12.0
    return config
