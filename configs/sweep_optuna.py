"""Numbers that this network's accuracy may depend on, proposed by Optuna in batches, selected on held-out examples.

pip install 'optuna>=5'
python train.py --config=configs/sweep_optuna.py
python train.py --config=configs/sweep_optuna.py --config.sweep_options.size=64
"""

from configs import sweep_best


def get_config():
    config = sweep_best.get_config()
    config.sweep_options.mode = "optuna"
    config.sweep_options.size = 48
    config.sweep_options.batch = 16
    return config
