"""The winner of `configs/sweep_best.py`: the best of 24 draws by accuracy on 5,000 held-out training images.

Ten seeds on the other 55,000 (`configs/sweep_seeds.py`): 98.56 % of the test images, with a deviation of 0.08 %.

python train.py --config=configs/best.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.model.batch_norm_momentum = 0.99
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.006
    config.optimizer.warmup_epochs = 0.25
    config.optimizer.weight_decay = 0.164
    config.train.num_epochs = 30.0
    config.train.label_smoothing = 0.087
    return config
