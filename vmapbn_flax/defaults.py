"""Every field of a run's config, with its default. `vmapbn_flax.fields.FIELDS` says which values are valid."""

from ml_collections import ConfigDict

from vmapbn_flax.networks import choose_network


def default_config(network: str = "mlp") -> ConfigDict:
    """The config that every other one starts from.

    A misspelt field raises an AttributeError: the config is locked, except for `sweep`.

    Args:
      network: the value of `model.name`. The attributes of that network are fields of `config.model`, with its
        defaults; an attribute without a default is None.

    Raises:
      UsageError: there is no such network.

    Examples:
      >>> from vmapbn_flax import default_config
      >>> config = default_config()
      >>> config.train.num_epochs = 5.0
      >>> config.sweep.optimizer.learning_rate = (1e-3, 1e-2)
    """
    config = ConfigDict()
    config.seed = 0  # of everything random; an integer in [0, 2**32)

    config.data = data = ConfigDict()
    data.name = "mnist"  # bundled; "idx", "npz", "folder": files of your own; else a set of tensorflow-datasets
    data.dir = ""  # where the files lie; "": the bundled files, $TFDS_DATA_DIR or ~/tensorflow_datasets
    data.test_fraction = 0.0  # of each class, held out as the test split if the files have none, in [0, 1)
    data.validation_size = 0  # examples held out from the end of the training set, for selection
    data.threshold = 0.0  # brightness, from 0 to 1, from which on pixels become white, others black; 0: as they are
    data.augment = ()  # changes of training images: "shift:N" by up to N pixels, "flip", "cutout:N" of N by N pixels
    data.memory_limit = 2.0  # gigabytes; a set that is larger as arrays is streamed from its files

    config.model = model = ConfigDict()
    model.name = ""  # "mlp", "conv", "resnet", or "package.module:Class"; the network's attributes are fields here
    # "vmap": batch norm in a one-example network; "batched": the textbook's; "none": no norm;
    # "renorm", "batched_renorm": batch renormalisation in their place, for small batches
    model.norm = "vmap"
    model.batch_norm_momentum = 0.99  # decay of the running statistics per step, in [0, 1)
    model.batch_norm_epsilon = 1e-5  # added to the variance
    model.renorm_r_max = 3.0  # batch renormalisation's last limit of r, 1 or more
    model.renorm_d_max = 5.0  # its last limit of d
    model.renorm_warmup_epochs = 1.0  # in which it is batch norm: the limits are 1 and 0
    model.renorm_full_epochs = 5.0  # from which the limits are the last ones; between the two they grow linearly
    model.freeze_norm_after = 0.0  # epochs after which norms use and keep their running statistics; 0: never
    model.ghost_batch_size = 0  # examples normalised together in training; 0: the whole batch
    model.dtype = "float32"  # of the computation, or "bfloat16"; parameters and statistics are float32

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # "adam", "adamw" (decoupled weight decay) or "sgd"
    optimizer.learning_rate = 1e-2  # the highest of the schedule
    optimizer.schedule = "cosine"  # after the warm-up: "cosine" to zero, or "constant"
    optimizer.warmup_epochs = 1.0  # linear from zero
    optimizer.weight_decay = 0.0  # of the kernels, in units of the parameter per unit of learning rate
    optimizer.adam_b1 = 0.9  # decay of Adam's first moment
    optimizer.adam_b2 = 0.999  # decay of Adam's second moment
    optimizer.sgd_momentum = 0.9  # decay of SGD's velocity

    config.train = train = ConfigDict()
    train.batch_size = 128  # examples
    train.num_epochs = 20.0  # passes over the training set; may be a fraction
    train.label_smoothing = 0.0  # probability spread evenly over all classes, in [0, 1)
    train.log_every = 100  # steps between training rows in metrics.jsonl
    train.eval_every = 1.0  # epochs between evaluations; each ends in a checkpoint
    train.eval_batch_size = 1000  # examples; changes speed and memory, and how many are watched
    train.watch = ()  # layers, such as ("dense_0", "norm_2[5]"), whose percentiles evaluations log; [5]: its unit 5
    train.max_skipped_steps = 10  # non-finite steps in a row that end the run
    train.profile = False  # write a trace of a few steps to profile/ in the workdir

    config.mesh = mesh = ConfigDict()
    mesh.data = 0  # devices along the batch axis; 0: every GPU or TPU, one CPU device a process; sweeps: one
    mesh.member = 0  # devices along the axis of a sweep's members; 0: all there are
    mesh.cpu_devices = 0  # devices that a CPU is divided into; 0: what these two ask for; sweeps: at least one a core
    mesh.replicate_limit = 2**30  # bytes of images up to which each device holds all of them; beyond, a share

    config.distributed = distributed = ConfigDict()
    distributed.coordinator = ""  # "host:port" of process 0, for many processes; "slurm": read from srun
    distributed.num_processes = 1  # with a "host:port"
    distributed.process_id = 0  # with a "host:port": the index of this process; process 0 writes the workdir

    # A tuple of values for each field to sweep, such as `config.sweep.optimizer.learning_rate = (1e-3, 1e-2)`.
    config.sweep = ConfigDict({"data": {}, "model": {}, "optimizer": {}, "train": {}})

    config.sweep_options = sweep_options = ConfigDict()
    # "product": of all values; "zip": one of each in turn; "random": `size` draws from tuples of choices,
    # ("uniform", low, high) or ("log_uniform", low, high); "optuna": from the same, `batch` members after `batch`
    # members, proposed by what those before have reached
    sweep_options.mode = "product"
    sweep_options.size = 16  # members that are drawn or proposed, in all
    sweep_options.batch = 8  # members that are proposed at once
    sweep_options.seed = 0  # of the draws and proposals
    sweep_options.chunk = 0  # members that train together at most; 0: as many as memory holds
    sweep_options.on_failure = "continue"  # with the other groups of members, or "stop"
    sweep_options.halving = 0  # at each rung, one member in so many trains on, the others stop; 0: all train to the end
    sweep_options.first_rung = 1.0  # epochs, a multiple of train.eval_every; each later rung is `halving` times as far

    choose_network(config, network)
    config.lock()
    config.sweep.unlock()
    return config
