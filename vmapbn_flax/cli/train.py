"""`vmapbn-flax train`: trains or resumes a run, or a sweep if `config.sweep` has values."""

import argparse

from vmapbn_flax.cli import environment
from vmapbn_flax.config import is_sweep, validate, without_distributed
from vmapbn_flax.data import bundled
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs.finished import changes_of, finished
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.ledger import refuse_unfinished_member


def run(arguments: argparse.Namespace, started: float) -> int:
    """Trains; the status is 1 if members of a sweep have failed."""
    environment.forgo_torch()
    config, path = arguments.config, arguments.workdir
    if getattr(config.get("model"), "name", None) != "mlp":  # convolutions, as far as is known; validated below
        environment.keep_freed_memory()
    if is_sweep(config):
        from vmapbn_flax.sweeps.train import train_sweep

        return 1 if train_sweep(config, path).count("failed") else 0
    validate(config)
    if config.sweep_options.halving:
        raise UsageError(
            f"config.sweep_options.halving: got {config.sweep_options.halving} without values in config.sweep, "
            f"expected 0 for a single run. Sweep a field, or leave it out."
        )
    workdir = Workdir(path)
    refuse_unfinished_member(workdir)
    if config.distributed.num_processes <= 1 and workdir.summary.exists():
        with workdir.lock():
            if finished(workdir, changes_of(workdir, without_distributed(config)), shown=True):
                return 0
    if config.data.name == bundled.NAME:
        bundled.read_ahead(config.data.dir)  # during the import below
    from vmapbn_flax.runs.train import train

    train(config, path, started)
    return 0
