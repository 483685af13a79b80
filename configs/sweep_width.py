"""Networks of four shapes, three seeds each: one program a shape.

python train.py --config=configs/sweep_width.py
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.validation_size = 5000
    config.train.num_epochs = 10.0
    config.sweep.model.hidden = ((25, 25, 25), (50, 50, 50), (100, 100, 100), (200, 200))
    config.sweep.seed = (0, 1, 2)
    return config
