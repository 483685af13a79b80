"""A copy of a sweep's proposals and results in a database of Optuna's, for its dashboard. Nothing reads it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmapbn_flax.runs.console import say
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.proposals import quiet

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


_PATIENCE = 5.0  # seconds to wait for another process that has the database


def mirror(trials: Sequence["FrozenTrial"], workdir: Workdir) -> None:
    """Adds to the database what it lacks of `trials`; one that is damaged or in use is written anew.

    That, or a database that cannot be written, costs a warning, and never the sweep.
    """
    path, name = workdir.proposals, workdir.path.absolute().name
    try:
        _add(trials, path, name)
    except Exception as error:  # of the file system, of SQLite, or of what Optuna makes of what it reads
        reason, outcome = " ".join(str(error).split())[:200], "It is written anew."
        try:
            for file in path.parent.glob(f"{path.name}*"):  # with SQLite's journals
                file.unlink()
            _add(trials, path, name)
        except Exception:
            outcome = "The sweep goes on without it."
        say(f"warning: {path}: got no database with the trials of this sweep ({reason}). {outcome}")


def _add(trials: Sequence["FrozenTrial"], path: Path, name: str) -> None:
    import optuna
    from sqlalchemy.pool import NullPool

    with quiet():
        # Without a pool a connection is closed after its use, also where the database turns out to be damaged.
        options = {"poolclass": NullPool, "connect_args": {"timeout": _PATIENCE}}
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=options)
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
            there = study.get_trials(deepcopy=False)
            if [_content(trial) for trial in there] != [_content(trial) for trial in trials[: len(there)]]:
                raise ValueError("its trials are others")
            study.add_trials(trials[len(there) :])
        finally:
            storage.remove_session()


def _content(trial: "FrozenTrial") -> tuple:
    return trial.state, trial.value, trial.params, trial.intermediate_values, trial.user_attrs
