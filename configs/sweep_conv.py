"""Learning rates and weight decays for conv.py, ranked on held-out images: six short runs in one program.

python train.py --config=configs/sweep_conv.py
"""

from configs import conv


def get_config():
    config = conv.get_config()
    config.data.validation_size = 5000
    config.train.num_epochs = 2.0
    config.sweep.optimizer.learning_rate = (0.003, 0.01, 0.03)
    config.sweep.optimizer.weight_decay = (0.05, 0.5)
    return config
