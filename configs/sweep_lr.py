"""Five learning rates, three seeds each: fifteen runs in one program.

python train.py --config=configs/sweep_lr.py
python train.py --config=configs/sweep_lr.py --config.sweep.seed='(0,1,2,3,4)'
python -m vmapbn_flax report runs/sweep_lr
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.validation_size = 5000  # held out, to rank the members
    config.train.num_epochs = 10.0
    config.sweep.optimizer.learning_rate = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    config.sweep.seed = (0, 1, 2)
    return config
