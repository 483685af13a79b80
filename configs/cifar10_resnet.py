"""ResNet-20 on CIFAR-10 for a GPU: a folder of images, train/<class>/*.jpg and test/<class>/*.jpg.

python train.py --config=configs/cifar10_resnet.py --config.data.dir=cifar10
python train.py --config=configs/cifar10_resnet.py --config.data.name=cifar10 --config.data.dir=""
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config("resnet")
    config.data.name = "folder"
    config.data.dir = "cifar10"
    config.data.augment = ("shift:4", "flip", "cutout:8")
    config.model.zero_scale = True
    config.model.dtype = "bfloat16"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 5e-4
    config.train.num_epochs = 100.0
    return config
