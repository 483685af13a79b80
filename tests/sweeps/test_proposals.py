"""The mode "optuna" of a sweep: what is proposed, when, and what becomes of it after an interruption."""

import json
import shutil
import sqlite3

import pytest

from tests.helpers import small
from tests.sweeps.test_sweep import ledger_of, rows, sweep_config
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps import plan, proposals
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.sweeps.expand import expand, read_members
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.proposals import Proposer

optuna = pytest.importorskip("optuna")

SPACE = {
    "optimizer__learning_rate": ("log_uniform", 1e-3, 1.0),
    "train__label_smoothing": ("uniform", 0.0, 0.3),
    "model__hidden": ((4,), (5, 5)),
    "optimizer__name": ("sgd", "adam"),
    "seed": ("uniform", 0, 1000),
}


def config_of(swept=None, **options):
    options = {"mode": "optuna", "size": 6, "batch": 2} | options
    changes = {f"sweep_options__{name}": value for name, value in options.items()}
    return sweep_config(swept or SPACE, **changes)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(plan, "load_dataset", lambda data: small.dataset(data.validation_size))


class Killed(BaseException):
    pass


def accuracy(values):
    """A stand-in for training: the best has a learning rate of 0.1 and no smoothing."""
    return round(0.9 - abs(values["optimizer.learning_rate"] - 0.1) - values["train.label_smoothing"], 6)


class FakeSweep:
    """Trains in no time; after `most` members of all it is killed."""

    most = 10**9
    figure = staticmethod(accuracy)

    def __init__(self, config, workdir, ledger, members, *rest):
        self.workdir, self.ledger, self.members = workdir, ledger, members

    def train(self):
        for name, member in self.members.items():
            if self.ledger.is_over(name):
                continue
            if FakeSweep.most <= 0:
                raise Killed
            FakeSweep.most -= 1
            figure = self.figure(member.values)
            row = {"step": 20, "validation_accuracy": figure, "test_accuracy": figure}
            self.workdir.member(name).metrics.write_text(json.dumps(row) + "\n")
            self.ledger.mark([name], "done" if figure is not None else "diverged", 20)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(sweep, "_Sweep", FakeSweep)
    monkeypatch.setattr(FakeSweep, "most", 10**9)
    return FakeSweep


def test_a(fake, tmp_path):
    sweep.train_sweep(config_of(size=40, batch=8), tmp_path / "sweep")
    print(json.dumps(ledger_of(tmp_path / "sweep"), indent=1))
    for member in read_members(Workdir(tmp_path / "sweep")):
        print(accuracy(member.values), member.values)
    assert 0
