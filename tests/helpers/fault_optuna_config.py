"""A sweep of fourteen such runs as fault_config.py describes, proposed by Optuna in four batches; some of them diverge.

With the argument "halving", each batch has rungs.

For the data set of tests/helpers/small.py, of whose training examples 5 batches remain to an epoch.
"""

from tests.helpers import fault_config as one


def get_config(rungs=None):
    config = one.get_config()
    config.data.validation_size = 20
    config.train.num_epochs = 2.0
    config.train.eval_every = 0.8
    config.train.max_skipped_steps = 3
    config.sweep_options.mode = "optuna"
    config.sweep_options.size = 14  # from eleven on, the sampler learns
    config.sweep_options.batch = 4
    config.sweep.optimizer.learning_rate = (0.01, 0.03, 1e38)
    config.sweep.train.label_smoothing = ("uniform", 0.0, 0.3)
    if rungs == "halving":
        config.sweep_options.halving = 2
        config.sweep_options.first_rung = 0.8
    return config
