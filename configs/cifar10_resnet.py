"""ResNet-20, four times as wide, on CIFAR-10 for a GPU: a folder of images, train/<class>/*.jpg and test/<class>/*.jpg.

90.99 % of the test images of CIFAR-10 as JPEG files (mean of the seeds 0 to 2; the deviation is 0.17 %), in two minutes
on an NVIDIA H200; docs/gpu.md has the curve.

python train.py --config=configs/cifar10_resnet.py --config.data.dir=cifar10
python train.py --config=configs/cifar10_resnet.py --config.data.name=cifar10 --config.data.dir=""
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config("resnet")
    config.data.name = "folder"
    config.data.dir = "cifar10"
    config.data.augment = ("shift:4", "flip", "cutout:8")
    config.model.width = 64
    config.model.batch_norm_momentum = 0.9
    config.model.zero_scale = True
    config.model.dtype = "bfloat16"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 5e-4
    config.train.label_smoothing = 0.1
    config.train.num_epochs = 60.0
    return config
