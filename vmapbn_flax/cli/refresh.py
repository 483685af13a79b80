"""`python -m vmapbn_flax refresh`: running statistics recomputed exactly, over the whole training set."""

import contextlib
import shutil
from pathlib import Path

from vmapbn_flax.data import load_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import REFRESHED, write_json
from vmapbn_flax.runs.checkpoints import Checkpoints
from vmapbn_flax.runs.loading import load_config, load_state
from vmapbn_flax.training.programs import Programs


def refresh(workdir: Path, step: int | None = None) -> dict[str, dict[str, float | int]]:
    """Recomputes the statistics of a checkpoint at its weights, and evaluates before and after.

    Each layer's mean and variance become those of all its inputs over the training set, pooled: what one
    training-mode pass over the whole set as a single batch computes, which has to fit in memory. The
    result is a workdir of its own, `<workdir>/refreshed/`, which `evaluate` takes and `train` refuses.

    Raises:
      RunError: `workdir` has no such checkpoint, or it is damaged.
      UsageError: the run has no batch norm, or its data set is larger than its memory limit.
    """
    config = load_config(workdir)
    if config.model.norm == "none":
        raise UsageError(f"{workdir}: got a run without batch norm, expected one that has statistics to refresh")
    dataset = load_dataset(config.data)
    if dataset.streamed:
        raise UsageError(
            f"config.data.memory_limit: got {config.data.memory_limit}, expected at least "
            f"{dataset.gigabytes}, for {dataset.name}, whose training set is taken as one batch. "
            f"With memory for many times that, raise it in {workdir / 'config.json'}."
        )
    programs = Programs([config], dataset)
    state = load_state(workdir, step, programs)
    refreshed = state.replace(batch_stats=programs.population_statistics(state))
    figures = {"before": programs.evaluate(state), "after": programs.evaluate(refreshed)}

    output = workdir / "refreshed"
    if output.exists():
        shutil.rmtree(output)
    output.mkdir()
    # First: whatever ends this early, training must not take the rest for a run.
    write_json(output / REFRESHED, {"step": int(state.step), **figures})
    write_json(output / "config.json", config.to_dict())
    with contextlib.closing(Checkpoints(output / "checkpoints")) as checkpoints:
        checkpoints.save(int(state.step), refreshed, config.to_dict())
    return figures
