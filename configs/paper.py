from vmapbn_flax import default_config


def get_config():
    config = default_config()
    config.data.threshold = 0.5
    config.data.validation_size = 6000  # held out, to rank the rates; 900 steps an epoch remain
    config.model.kernel_std = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.sgd_momentum = 0.0
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_epochs = 0.0
    config.train.batch_size = 60
    config.train.num_epochs = 50_000 / 900
    config.train.eval_every = 500 / 900
    config.train.eval_batch_size = 10_000  # the percentiles are those of all test images
    config.train.log_every = 1000
    config.train.watch = tuple(f"pre_activation_2[{unit}]" for unit in range(5))
    config.sweep.model.norm = ("none", "vmap")
    config.sweep.optimizer.learning_rate = (0.1, 1.0)
    config.sweep.seed = (0, 1, 2)
    return config
