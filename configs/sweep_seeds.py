"""`configs/best.py` from ten seeds, in one program: the spread of its accuracy.

python train.py --config=configs/sweep_seeds.py
"""

from configs import best


def get_config():
    config = best.get_config()
    config.data.validation_size = 5000
    config.sweep.seed = tuple(range(10))
    return config
