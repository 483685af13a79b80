"""48 draws from the space of sweep_best.py, of which the worst are stopped early: a third of the epochs.

python train.py --config=configs/sweep_halving.py
"""

from configs import sweep_best


def get_config():
    config = sweep_best.get_config()
    config.sweep_options.size = 48
    config.sweep_options.halving = 3
    # Every warm-up is over then. 48 members train 5 epochs, 16 train 15, and 5 all 30.
    config.sweep_options.first_rung = 5.0
    return config
