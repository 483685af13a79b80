"""A run of a second or two, with a row, an evaluation or a save at almost every step.

For the data set of tests/helpers/small.py, of which 6 batches make an epoch.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.data.name = "small"
    config.model.hidden = (6, 5)
    config.model.batch_norm_momentum = 0.5
    config.optimizer.learning_rate = 3e-2
    config.optimizer.warmup_epochs = 1.0
    config.train.batch_size = 16
    config.train.num_epochs = 5.0
    config.train.log_every = 4
    config.train.eval_every = 0.5
    return config
