"""A network of two narrow layers, trained for a tenth of an epoch in a few seconds. The tests use it.

python train.py --config=configs/tiny.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.model.hidden = (16, 16)
    config.optimizer.warmup_epochs = 0.02
    config.train.num_epochs = 0.1
    config.train.eval_every = 0.05
    config.train.log_every = 10
    return config
