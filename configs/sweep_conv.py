"""Learning rates for conv.py, ranked on held-out images: four short runs in one program.

python train.py --config=configs/sweep_conv.py
"""

from configs import conv


def get_config():
    config = conv.get_config()
    config.data.validation_size = 5000
    config.train.num_epochs = 3.0
    config.sweep.optimizer.learning_rate = (0.002, 0.005, 0.01, 0.02)
    return config
