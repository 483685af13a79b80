"""Whether a run is finished, which takes none of the libraries that training imports."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vmapbn_flax.config import resume_changes
from vmapbn_flax.errors import RunError
from vmapbn_flax.files import read_json
from vmapbn_flax.runs.console import say
from vmapbn_flax.runs.workdir import Workdir


def changes_of(workdir: Workdir, config: ConfigDict) -> list[str] | None:
    """What `config` changes in the config of the run in `workdir`, which a resume may change; None without a run.

    Raises:
      RunError: `config` changes what a resume may not change.
    """
    return resume_changes(workdir.read_config(), config) if workdir.config.exists() else None


def finished(workdir: Workdir, changes: Sequence[str] | None, *, shown: bool) -> dict[str, Any] | None:
    """The summary of a finished run, which is `shown` to be one; None if there is none, or if `changes` outdate it.

    Raises:
      RunError: the summary is damaged.
    """
    path = workdir.summary
    if changes is None or not path.exists() or any("train.num_epochs" in change for change in changes):
        return None
    summary = read_json(path)
    if not isinstance(summary.get("step"), int):
        raise RunError(f"{path}: got no step in it, expected what a finished run wrote there. Remove it and run again.")
    if shown:
        say(f"{workdir}: finished at step {summary['step']}; a larger train.num_epochs continues it")
    return summary
