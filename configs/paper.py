"""Figure 1 of the paper that introduced batch norm: with it and without, three learning rates, three seeds each.

Ioffe & Szegedy (2015), section 4.1: binary images, three hidden layers of 100 sigmoids, small Gaussian weights, 50,000
steps of 60 examples. The paper does not state optimizer, learning rate, standard deviation of the weights and
threshold; docs/paper.md says which of them matter.

With batch norm 97.2, 97.5 and 97.7 % of the test images are right at the three rates; without, 96.6, 96.9 and 97.3 %.
All eighteen runs take twelve minutes on two cores.

python train.py --config=configs/paper.py
python -m vmapbn_flax figure runs/paper
"""

from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.threshold = 0.5
    config.data.validation_size = 6000  # held out, to rank the members: 900 steps an epoch remain
    config.model.kernel_std = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.sgd_momentum = 0.0
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_epochs = 0.0
    config.train.batch_size = 60
    config.train.num_epochs = 50_000 / 900
    config.train.eval_every = 500 / 900
    config.train.eval_batch_size = 10_000  # all test images are watched
    config.train.log_every = 1000
    config.train.watch = tuple(f"pre_activation_2[{unit}]" for unit in range(5))
    config.sweep.model.norm = ("none", "vmap")
    config.sweep.optimizer.learning_rate = (0.1, 0.3, 1.0)
    config.sweep.seed = (0, 1, 2)
    return config
