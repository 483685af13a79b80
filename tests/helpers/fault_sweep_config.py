"""A sweep of four such runs as fault_config.py describes, in two groups; one of the members diverges.

With the argument "extended", a sweep of three more, in two more groups; one of those diverges, too. With the argument
"halving", a longer sweep of six, in two groups, with three rungs: five are ranked at the first one, since one diverges.

For the data set of tests/helpers/small.py, of whose training examples 5 batches remain to an epoch.
"""

from tests.helpers import fault_config as one


def get_config(size=None):
    config = one.get_config()
    config.data.validation_size = 20
    config.train.num_epochs = 2.0
    config.train.eval_every = 0.8
    config.train.max_skipped_steps = 3
    config.sweep_options.mode = "zip"
    config.sweep.model.hidden = ((6, 5), (6, 5), (4,), (4,))
    config.sweep.optimizer.learning_rate = (0.03, 1e38, 0.01, 0.03)
    if size == "halving":
        config.train.num_epochs = 4.0
        config.sweep_options.update(halving=2, first_rung=0.8)
        config.sweep.model.hidden = ((6, 5), (6, 5), (6, 5), (4,), (4,), (4,))
        config.sweep.optimizer.learning_rate = (0.03, 1e38, 0.1, 0.01, 0.03, 0.1)
    if size == "extended":
        config.sweep.model.hidden += ((4,), (4,), (6, 5))
        config.sweep.optimizer.learning_rate += (0.02, 1e38, 0.1)
    return config
