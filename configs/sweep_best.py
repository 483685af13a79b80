"""Random draws of the numbers that this network's accuracy may depend on, selected on held-out examples.

python train.py --config=configs/sweep_best.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.validation_size = 5000
    config.optimizer.name = "adamw"
    config.train.num_epochs = 30.0
    config.sweep_options.mode = "random"
    config.sweep_options.size = 24
    config.sweep.model.batch_norm_momentum = (0.9, 0.99)
    config.sweep.optimizer.learning_rate = ("log_uniform", 3e-3, 3e-2)
    config.sweep.optimizer.weight_decay = ("log_uniform", 3e-3, 1.0)
    config.sweep.optimizer.warmup_epochs = ("uniform", 0.0, 4.0)
    config.sweep.train.label_smoothing = ("uniform", 0.0, 0.2)
    return config
