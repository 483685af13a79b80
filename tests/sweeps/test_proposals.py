"""The mode "optuna" of a sweep: what is proposed, when, and what becomes of it after an interruption."""

import itertools
import json
import sqlite3
import statistics
import sys

import pytest
from optuna.trial import TrialState

from tests.helpers import small
from tests.helpers.runs import command, mirrored
from tests.sweeps.test_sweep import ledger_of, sweep_config
from vmapbn_flax import default_config
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.networks import untrusted
from vmapbn_flax.runs import workdir as workdir_module
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps import mirror, plan, proposals, report
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.sweeps.expand import expand, read_members
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.proposals import Proposer
from vmapbn_flax.sweeps.results import read_settings
from vmapbn_flax.training.programs import Programs

RATE, SMOOTHING = "optimizer.learning_rate", "train.label_smoothing"
SPACE = {
    "optimizer__learning_rate": ("log_uniform", 1e-3, 1.0),
    "train__label_smoothing": ("uniform", 0.0, 0.3),
    "model__hidden": ((4,), (5, 5)),
    "seed": ("uniform", 0, 1000),
}
SIZE, BATCH = 16, 4  # Optuna's sampler draws at random until ten members are done


def config_of(swept=None, **options):
    options = {"mode": "optuna", "size": SIZE, "batch": BATCH} | options
    return sweep_config(swept or SPACE, **{f"sweep_options__{name}": value for name, value in options.items()})


def accuracy(values):
    """The best has a learning rate of 0.1 and no smoothing."""
    return 0.9 - abs(values[RATE] - 0.1) / 2 - values[SMOOTHING]


class Killed(BaseException):
    pass


class Trainer:
    """In place of a sweep's: trains in no time.

    Attributes:
      most: how many members it trains before it is killed.
      reach: the accuracy of a member with these values; None for one that diverges, an error for one that fails.
    """

    most = 10**9
    reach = staticmethod(accuracy)

    def __init__(self, config, workdir, ledger, members, *others):
        self.workdir, self.ledger, self.members = workdir, ledger, members

    def train(self):
        for name, member in self.members.items():
            if self.ledger.is_over(name):
                continue
            Trainer.most -= 1
            if Trainer.most < 0:
                raise Killed
            try:
                reached = Trainer.reach(member.values)
            except RunError as error:
                self.ledger.mark([name], "failed", reason=str(error))
                continue
            row = {"step": 20, "validation_accuracy": reached}
            self.workdir.member(name).metrics.write_text(json.dumps(row) + "\n")
            self.ledger.mark([name], "diverged" if reached is None else "done", 20)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(plan, "load_dataset", lambda data: small.dataset(data.validation_size))


@pytest.fixture
def trainer(monkeypatch):
    """No training, no picture, and no estimate of memory."""
    monkeypatch.setattr(sweep, "_Sweep", Trainer)
    monkeypatch.setattr(report, "report", lambda workdir: None)
    monkeypatch.setattr(plan, "_most_members", lambda together, datasets: len(together))
    monkeypatch.setattr(plan, "_say_plan", lambda *plan: None)
    for name in ("most", "reach"):
        monkeypatch.setattr(Trainer, name, Trainer.__dict__[name])
    return Trainer


@pytest.fixture
def no_mirror(monkeypatch):
    monkeypatch.setattr("vmapbn_flax.sweeps.batches.mirror", lambda trials, workdir: None)


def values_of(workdir):
    return [member.values for member in read_members(Workdir(workdir))]


def names_of(workdir):
    return [member.name for member in read_members(Workdir(workdir))]


def trials_in(workdir):
    return [name for name, *_ in mirrored(workdir)]


# What is proposed.


def test_proposals_learn(trainer, no_mirror, tmp_path):
    config = config_of(size=48, batch=8)
    sweep.train_sweep(config, tmp_path / "sweep")
    found = values_of(tmp_path / "sweep")
    drawn = [member.values for member in expand(config_of(mode="random", size=48))]
    assert found[:8] == drawn[:8]
    assert found == [member.values for member in expand(config, Ledger(Workdir(tmp_path / "sweep")).proposed)]
    for values in found:
        assert 1e-3 <= values[RATE] <= 1.0
        assert 0.0 <= values[SMOOTHING] <= 0.3
        assert values["model.hidden"] in ((4,), (5, 5))
        assert type(values["seed"]) is int
    later, same = (statistics.mean(map(accuracy, some[24:])) for some in (found, drawn))
    print(f"mean of the last 24 of 48: {later:.3f} proposed, {same:.3f} drawn")
    assert later > same + 0.1
    ledger = ledger_of(tmp_path / "sweep")
    assert [len(batch) for batch in ledger["proposals"]] == [8] * 6
    assert {entry["status"] for entry in ledger["members"].values()} == {"done"}
    # A group trains members of one batch.
    batches = [
        {member.name for member in read_members(Workdir(tmp_path / "sweep"))[i : i + 8]} for i in range(0, 48, 8)
    ]
    assert all(any(batch >= set(names) for batch in batches) for names in ledger["groups"])


def test_the_seed_counts(trainer, no_mirror, tmp_path):
    found = []
    for i, seed in enumerate((0, 0, 1)):
        sweep.train_sweep(config_of(seed=seed), tmp_path / str(i))
        found.append(ledger_of(tmp_path / str(i)))
    assert found[0] == found[1] != found[2]


def test_divergence_is_avoided(trainer, no_mirror, tmp_path):
    trainer.reach = staticmethod(lambda values: None if values[RATE] > 0.03 else 0.5 + values[SMOOTHING])
    sweep.train_sweep(config_of(size=48, batch=8), tmp_path / "sweep")
    diverged = [values[RATE] > 0.03 for values in values_of(tmp_path / "sweep")]
    print(f"diverged: {sum(diverged[:24])} of the first 24, {sum(diverged[24:])} of the last 24")
    assert sum(diverged[24:]) < sum(diverged[:24]) / 2


@pytest.fixture
def asked(monkeypatch):
    """What the sampler proposes, whatever becomes of it."""
    found, ask = [], Proposer._ask

    def noted(proposer, study):
        found.append(ask(proposer, study))
        return found[-1]

    monkeypatch.setattr(Proposer, "_ask", noted)
    return found


def test_members_differ(trainer, no_mirror, tmp_path, asked):
    """All twelve that there are, though the sampler repeats the good ones."""
    few = {"model__hidden": ((4,), (5, 5), (6,)), "optimizer__name": ("sgd", "adam"), "model__norm": ("vmap", "none")}
    trainer.reach = staticmethod(lambda values: 0.9 if values["model.hidden"] == (4,) else 0.1)
    found = []
    for i in range(2):
        sweep.train_sweep(config_of(few, size=12, batch=2), tmp_path / str(i))
        found.append(ledger_of(tmp_path / str(i)))
    assert found[0] == found[1]
    assert len(found[0]["members"]) == 12
    assert len({str(values) for values in asked[:10]}) < 10
    with pytest.raises(UsageError, match=r"size: got 13 draws, expected at most as many as differ, 12 here"):
        sweep.train_sweep(config_of(few, size=13), tmp_path / "more")


def test_an_invalid_proposal_gives_way(trainer, no_mirror, tmp_path, asked):
    """With this seed, no draw is one."""
    space = {"train__batch_size": (16, 20), "model__ghost_batch_size": (0, 4, 8, 10), "seed": ("uniform", 0, 999)}

    def fits(values):
        size = values["model.ghost_batch_size"]
        return size == 0 or values["train.batch_size"] % size == 0

    trainer.reach = staticmethod(lambda values: values["model.ghost_batch_size"] / 20)
    sweep.train_sweep(config_of(space, size=12, batch=1, seed=111), tmp_path / "sweep")
    assert not all(map(fits, asked))
    assert all(map(fits, values_of(tmp_path / "sweep")))


def test_networks_of_ones_own(tmp_path):
    """The ledger names one; only the config says which is imported."""
    config = default_config().unlock()
    config.data.validation_size = 10
    config.sweep_options.mode = "optuna"
    config.sweep.model.name = ("mlp", untrusted("mine:Net"))
    proposed = [{"model.name": "mine:Net"}, {"model.name": "mlp"}]
    assert [member.values for member in expand(config, proposed)] == proposed
    assert [member.config.model.name for member in expand(config, proposed)] == [untrusted("mine:Net"), "mlp"]
    with pytest.raises(UsageError, match=r"config\.sweep\.model\.name: .*expected the value 'os:Net' of a member"):
        expand(config, [{"model.name": "os:Net"}])


# Interrupted, and continued.


@pytest.fixture
def undisturbed(trainer, no_mirror, tmp_path):
    sweep.train_sweep(config_of(), tmp_path / "undisturbed")
    return ledger_of(tmp_path / "undisturbed")


@pytest.mark.usefixtures("unchecked")  # of the same calls as the others, many times as many
def test_killed_after_any_member(trainer, undisturbed, tmp_path):
    """Between two batches, and inside one."""
    for count in range(SIZE + 1):
        trainer.most = count
        if count < SIZE:
            with pytest.raises(Killed):
                sweep.train_sweep(config_of(), tmp_path / str(count))
            # The values are in the ledger before their members train.
            assert (
                len(Ledger(Workdir(tmp_path / str(count))).proposed) == min(count // BATCH + 1, SIZE // BATCH) * BATCH
            )
        trainer.most = 10**9
        sweep.train_sweep(config_of(), tmp_path / str(count))
        assert ledger_of(tmp_path / str(count)) == undisturbed


@pytest.mark.usefixtures("unchecked")  # of the same calls as the others, many times as many
def test_killed_before_any_write_of_a_batch(trainer, undisturbed, tmp_path, monkeypatch):
    """Before the batch is in the ledger, it is proposed again."""
    write, cuts = workdir_module.write_json, 0
    for cut in itertools.count():
        workdir, writes = tmp_path / str(cut), itertools.count()
        sweep.train_sweep(config_of(size=3 * BATCH), workdir)

        def killed(path, content, cut=cut, writes=writes):
            if next(writes) == cut:
                raise Killed
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(workdir_module, "write_json", killed)
            try:
                sweep.train_sweep(config_of(size=4 * BATCH), workdir)
                break
            except Killed:
                cuts += 1
        sweep.train_sweep(config_of(), workdir)
        assert ledger_of(workdir) == undisturbed
    assert cuts == BATCH + 2 + BATCH  # the members' configs, the sweep's and the ledger; then each member is marked


def test_a_larger_size_continues(trainer, undisturbed, tmp_path):
    workdir = tmp_path / "sweep"
    sweep.train_sweep(config_of(size=8), workdir)
    first = values_of(workdir)
    sweep.train_sweep(config_of(), workdir)
    assert values_of(workdir)[:8] == first
    assert ledger_of(workdir) == undisturbed
    with pytest.raises(RunError, match=r"got a sweep without its member .*expected all that it has"):
        sweep.train_sweep(config_of(size=8), workdir)
    # Another batch counts from the next one on.
    sweep.train_sweep(config_of(size=SIZE + 7, batch=5), workdir)
    assert [len(batch) for batch in ledger_of(workdir)["proposals"]] == [BATCH] * 4 + [5, 2]


def test_values_may_be_added_not_taken_away(trainer, no_mirror, tmp_path):
    workdir = tmp_path / "sweep"
    sweep.train_sweep(config_of(size=8), workdir)
    before = ledger_of(workdir)
    narrower = SPACE | {"optimizer__learning_rate": ("log_uniform", 0.5, 1.0)}
    message = r"config\.sweep\.optimizer\.learning_rate: got numbers from 0\.5 to 1\.0, expected the value 0\.\d+ of a"
    with pytest.raises(UsageError, match=message):
        sweep.train_sweep(config_of(narrower), workdir)
    with pytest.raises(UsageError, match=r"got the fields .*, expected those of its members so far"):
        sweep.train_sweep(config_of(SPACE | {"model__norm": ("vmap", "none")}), workdir)
    with pytest.raises(RunError, match=r"got a sweep without its member"):
        sweep.train_sweep(config_of(mode="random", seed=1), workdir)
    assert ledger_of(workdir) == before
    wider = SPACE | {"optimizer__learning_rate": ("log_uniform", 1e-4, 2.0), "model__hidden": ((4,), (6,), (5, 5))}
    sweep.train_sweep(config_of(wider), workdir)
    assert ledger_of(workdir)["proposals"][:2] == before["proposals"]


def test_failed_members(trainer, no_mirror, tmp_path):
    """The sweep goes on without some, but not with a batch of which none has trained; the next start tries again."""

    def fail(values):
        if values["seed"] % 2:
            raise RunError("out of luck")
        return accuracy(values)

    trainer.reach = staticmethod(fail)
    ledger = sweep.train_sweep(config_of(), tmp_path / "some")
    assert 0 < ledger.count("failed") < len(ledger.members) == SIZE
    ledger = sweep.train_sweep(config_of(on_failure="stop"), tmp_path / "stop")
    assert ledger.count("failed") > 0
    assert len(ledger.members) == BATCH
    trainer.reach = staticmethod(accuracy)
    assert sweep.train_sweep(config_of(on_failure="stop"), tmp_path / "stop").count("done") == SIZE

    def fail_always(values):
        raise RunError("disk full")

    trainer.reach = staticmethod(fail_always)
    ledger = sweep.train_sweep(config_of(), tmp_path / "all")
    assert ledger.count("failed") == len(ledger.members) == BATCH


# Trained for real.


@pytest.mark.usefixtures("compiled_quickly")
def test_batches_share_a_program(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sweep, "Programs", lambda *arguments: made.append(Programs(*arguments)) or made[-1])
    numbers = {name: SPACE[name] for name in ("optimizer__learning_rate", "train__label_smoothing")}
    ledger = sweep.train_sweep(config_of(numbers, size=4, batch=2), tmp_path / "sweep")
    assert ledger.count("done") == 4
    assert [len(names) for names in ledger.groups] == [2, 2]
    assert len(made) == 1
    assert trials_in(tmp_path / "sweep") == names_of(tmp_path / "sweep")
    assert len(read_settings(Workdir(tmp_path / "sweep"))) == 4


# What Optuna is told.


def test_trials(trainer, no_mirror, tmp_path):
    config, workdir = config_of(size=5, batch=5), Workdir(tmp_path / "sweep")
    ledger = sweep.train_sweep(config, workdir.path)
    members = read_members(workdir)
    rows = [{"step": 5 * i, "train_loss": 1.0, "validation_accuracy": 0.1 * i} for i in (1, 2, 3, 4)]
    for member in members:
        workdir.member(member.name).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for member, (status, step) in zip(
        members, [("done", 15), ("diverged", 15), ("stopped", 10), ("failed", 5), ("done", 20)], strict=True
    ):
        ledger.members[member.name] |= {"status": status, "step": step}
        if status == "stopped":
            ledger.members[member.name] |= {"rung": 0, "rank": 5}
    trials = Proposer(config, workdir).trials(members, ledger)
    assert [(trial.state, trial.value) for trial in trials] == [
        (TrialState.COMPLETE, rows[2]["validation_accuracy"]),  # it has been continued alone since
        (TrialState.PRUNED, None),
        (TrialState.PRUNED, rows[1]["validation_accuracy"]),
        (TrialState.FAIL, None),
        (TrialState.COMPLETE, rows[3]["validation_accuracy"]),
    ]
    assert [len(trial.intermediate_values) for trial in trials] == [3, 0, 2, 0, 4]
    assert trials[0].params[RATE] == members[0].values[RATE]
    assert trials[0].params["model.hidden"] == str(members[0].values["model.hidden"])


# The copy for the dashboard.


def test_mirror(trainer, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    for size in (4, 8):
        sweep.train_sweep(config_of(size=size), workdir)
        assert trials_in(workdir) == names_of(workdir)
    database = workdir / "optuna.db"
    inode = database.stat().st_ino
    sweep.train_sweep(config_of(size=12), workdir)
    assert trials_in(workdir) == names_of(workdir)
    assert database.stat().st_ino == inode  # a dashboard that is open sees what is new
    assert "warning" not in capsys.readouterr().err
    assert "Trial" not in capsys.readouterr().err
    whole = database.read_bytes()
    database.unlink()
    sweep.train_sweep(config_of(size=12), workdir)
    assert trials_in(workdir) == names_of(workdir)
    assert "warning" not in capsys.readouterr().err
    for content in (b"no database", whole[:5000] + bytes(20000) + whole[25000:]):
        database.write_bytes(content)
        sweep.train_sweep(config_of(size=12), workdir)
        assert trials_in(workdir) == names_of(workdir)
        assert capsys.readouterr().err.count("warning") == 1


def test_mirror_of_another_sweep(trainer, tmp_path, capsys):
    for name, seed in (("one", 0), ("other", 1)):
        sweep.train_sweep(config_of(size=4, seed=seed), tmp_path / name / "sweep")
    (tmp_path / "one/sweep/optuna.db").rename(tmp_path / "other/sweep/optuna.db")
    sweep.train_sweep(config_of(size=4, seed=1), tmp_path / "other/sweep")
    assert trials_in(tmp_path / "other/sweep") == names_of(tmp_path / "other/sweep")
    assert "its trials are others). It is written anew." in capsys.readouterr().err


def test_mirror_in_use(trainer, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "sweep"
    sweep.train_sweep(config_of(size=4), workdir)
    monkeypatch.setattr(mirror, "_PATIENCE", 0.1)
    with sqlite3.connect(workdir / "optuna.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        sweep.train_sweep(config_of(size=8), workdir)
    other.close()
    assert trials_in(workdir) == names_of(workdir)
    assert "database is locked" in capsys.readouterr().err


def test_mirror_that_cannot_be_written(trainer, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    (workdir / "optuna.db").mkdir(parents=True)
    assert sweep.train_sweep(config_of(size=8), workdir).count("done") == 8
    said = capsys.readouterr().err
    assert said.count("warning") == said.count("The sweep goes on without it.") == 2


# Without Optuna.


def test_without_optuna(trainer, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "sweep"
    sweep.train_sweep(config_of(size=4), workdir)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert len(read_settings(Workdir(workdir))) == 4
    monkeypatch.setattr(proposals, "find_spec", lambda name: None)
    status, lines = command(
        capsys,
        "train",
        "--config=configs/sweep_best.py",
        "--config.sweep_options.mode=optuna",
        f"--workdir={tmp_path}/new",
    )
    assert (status, len(lines)) == (2, 1)
    assert "Install it: pip install 'optuna>=5'" in lines[0]
    assert not (tmp_path / "new").exists()
