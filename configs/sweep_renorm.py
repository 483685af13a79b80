"""Batches of four: batch norm, batch renormalisation and no norm, five seeds each, on 10,000 images.

python train.py --config=configs/sweep_renorm.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.validation_size = 50_000  # which leaves 10,000 images to train on
    config.optimizer.learning_rate = 1e-3
    config.train.batch_size = 4
    config.train.num_epochs = 5.0
    config.model.renorm_warmup_epochs = 1.0
    config.model.renorm_full_epochs = 3.0
    config.sweep.model.norm = ("vmap", "renorm", "none")
    config.sweep.seed = (0, 1, 2, 3, 4)
    return config
