import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import quick, shared, small
from tests.helpers.runs import CONFIG, command, leftovers, outcome, state_bytes
from tests.runs.test_metrics import scalars
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.runs import train as run
from vmapbn_flax.runs.checkpoints import saved_steps
from vmapbn_flax.runs.loop import Loop
from vmapbn_flax.runs.record import Record
from vmapbn_flax.training.programs import Programs

TOTAL = 30  # 6 steps an epoch, for 5 epochs


@pytest.fixture(scope="module", autouse=True)
def small_and_compiled_once():
    """One quick compilation serves all runs, and none draws; in tests/faults/ each is a process that does both."""
    with quick.programs(), shared.programs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_dataset", lambda *where: small.dataset())
        patch.setattr("vmapbn_flax.runs.pictures.plot_runs", lambda workdirs, output: output.touch())
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The workdir of a run from start to end in one go."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run.train(parse_config([CONFIG])[0], workdir)
    return workdir


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def train(capsys, workdir):
    """Runs the command; returns its exit status and the lines it says."""
    return lambda *flags: command(capsys, "train", CONFIG, f"--workdir={workdir}", *flags)


@pytest.fixture
def stop(monkeypatch):
    """Has SIGTERM arrive at exactly one step."""
    advance, next_stop = Programs.advance, Loop._next_stop

    def stop_at(target, signum=signal.SIGTERM):
        def next_stop_or_target(self):
            return min(next_stop(self), target) if self.step < target else next_stop(self)

        def advance_and_signal(self, state, step, count):
            state = advance(self, state, step, count)
            if step + count == target:
                signal.raise_signal(signum)
            return state

        monkeypatch.setattr(Loop, "_next_stop", next_stop_or_target)
        monkeypatch.setattr(Programs, "advance", advance_and_signal)

    return stop_at


# A log row is due every 4 steps and at 6, 12, ...; an evaluation every 3.
@pytest.mark.parametrize(
    "stops",
    [(1,), (7,), (4, 15), (30,), (5, 11, 17, 18), tuple(range(1, 8))],
    ids=str,
)
def test_stopped_and_resumed_is_never_stopped(train, stop, workdir, undisturbed, stops):
    for step in stops:
        stop(step)
        status, lines = train()
        assert status == 128 + signal.SIGTERM
        assert lines[-1] == f"note: stopped at step {step}, which is saved; the same command resumes"
        assert saved_steps(workdir / "checkpoints")[-1] == step
    stop(0)
    status, lines = train()
    assert status == 0
    assert f"resuming at step {stops[-1]} of {TOTAL} steps" in lines[0]
    assert outcome(workdir) == outcome(undisturbed)
    assert not leftovers(workdir)


def test_renorm_whose_statistics_are_frozen_resumes(train, stop, workdir, tmp_path):
    """The count of steps comes back, and the program that trains from the restored step on."""
    flags = ["--config.model.norm=renorm", "--config.model.freeze_norm_after=2.5"]
    flags += ["--config.model.renorm_warmup_epochs=0.5", "--config.model.renorm_full_epochs=1.5"]
    run.train(parse_config([CONFIG, *flags])[0], tmp_path / "undisturbed")
    for step in (7, 15, 17):  # within the growth of the limits, at the 15th step, which is frozen, and after it
        stop(step)
        assert train(*flags)[0] == 128 + signal.SIGTERM
    stop(0)
    assert train(*flags)[0] == 0
    assert outcome(workdir) == outcome(tmp_path / "undisturbed")
    first, last = (state_bytes(workdir, step) for step in saved_steps(workdir / "checkpoints")[-2:])
    assert {name for name in first if "batch_stats" in name and first[name] != last[name]} == set()


def test_one_row_a_step_and_kind(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    train_rows = [row["step"] for row in rows if "train_loss" in row]
    test_rows = [row["step"] for row in rows if "test_loss" in row]
    assert train_rows == sorted({*range(4, TOTAL + 1, 4), *range(6, TOTAL + 1, 6)})
    assert test_rows == list(range(3, TOTAL + 1, 3))
    assert len(rows) == len(train_rows) + len(test_rows)


def test_tensorboard_shows_each_figure_once(undisturbed):
    """Its hparams tab ranks runs by the last of these scalars: see test_metrics.py."""
    shown = scalars(undisturbed)
    assert ("test_loss", TOTAL) in shown
    assert [tag for tag, _ in shown if tag.startswith("hparam")] == []


def test_a_finished_run_says_so_and_changes_nothing(train, workdir, undisturbed):
    shutil.copytree(undisturbed, workdir)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
    for flags in ([], ["--config.train.log_every=2"]):
        status, lines = train(*flags)
        assert (status, lines) == (
            0,
            [f"{workdir}: finished at step {TOTAL}; a larger train.num_epochs continues it"],
        )
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
    assert after == before


def test_a_finished_run_answers_without_jax(workdir, undisturbed):
    """Whose import takes longer than all the rest."""
    shutil.copytree(undisturbed, workdir)
    program = (
        "import sys; from vmapbn_flax.cli.main import run_program as run; sys.modules['jax'] = None; run(sys.argv[1:])"
    )
    command_line = [sys.executable, "-c", program, "train", CONFIG, f"--workdir={workdir}"]
    run = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert run.stderr == f"{workdir}: finished at step {TOTAL}; a larger train.num_epochs continues it\n"


@pytest.mark.parametrize("name", ["summary.json", "accuracy.png"])
def test_what_a_run_ends_with_is_made_again(train, workdir, undisturbed, name):
    shutil.copytree(undisturbed, workdir)
    (workdir / "summary.json").unlink()
    (workdir / name).unlink(missing_ok=True)
    assert train()[0] == 0
    assert outcome(workdir) == outcome(undisturbed)


# Longer, shorter, other.


def test_longer_continues_a_finished_run(train, workdir, undisturbed):
    shutil.copytree(undisturbed, workdir)
    status, lines = train("--config.train.num_epochs=7")
    assert status == 0
    assert lines[0] == "resuming with config.train.num_epochs: 5.0 -> 7.0"
    assert "resuming at step 30 of 42 steps" in lines[1]
    before = (undisturbed / "metrics.jsonl").read_text()
    after = (workdir / "metrics.jsonl").read_text()
    assert after.startswith(before)
    rates = {row["step"]: row["learning_rate"] for row in map(json.loads, after.splitlines()) if "learning_rate" in row}
    assert rates[30] < rates[32] > rates[42]  # the cosine of the longer run, from where that is at step 30
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["step"] == 42
    assert summary["best_step"] in saved_steps(workdir / "checkpoints")
    # From here on the longer run is the run.
    assert train("--config.train.num_epochs=7")[0] == 0
    status, lines = train()
    assert (status, len(lines)) == (1, 1)
    assert "config.train.num_epochs: 7.0 -> 5.0" in lines[0]


@pytest.mark.parametrize("schedule", [pytest.param("constant", marks=pytest.mark.slow), "cosine"])
def test_longer_beside_longer_from_the_start(train, workdir, tmp_path, capsys, schedule):
    """Constant rates: the same bits. A cosine: the rates of the longer run, but only from the restored step on."""
    flag, longer = f"--config.optimizer.schedule={schedule}", "--config.train.num_epochs=7"
    from_start = tmp_path / "from_start"
    assert train(flag)[0] == 0
    assert train(flag, longer)[0] == 0
    assert command(capsys, "train", CONFIG, f"--workdir={from_start}", flag, longer)[0] == 0
    got, expected = outcome(workdir), outcome(from_start)
    if schedule == "constant":
        assert got == expected
    else:
        assert got["states"][42] != expected["states"][42]
        lines = [result["metrics.jsonl"].decode().splitlines() for result in (got, expected)]
        rows = [(json.loads(a), json.loads(b)) for a, b in zip(*lines, strict=True)]
        rates = {a["step"]: (a["learning_rate"], b["learning_rate"]) for a, b in rows if "learning_rate" in a}
        assert all((a == b) == (step > 30 or step <= 6) for step, (a, b) in rates.items())  # 6 steps of warm-up


def test_longer_is_the_same_however_it_is_stopped(train, stop, workdir, undisturbed, tmp_path):
    longer = "--config.train.num_epochs=7"
    shutil.copytree(undisturbed, workdir)
    assert train(longer)[0] == 0
    expected = outcome(workdir)
    shutil.rmtree(workdir)
    shutil.copytree(undisturbed, workdir)
    stop(32)
    assert train(longer)[0] == 143
    stop(0)
    assert train(longer)[0] == 0
    assert outcome(workdir) == expected


def test_longer_cut_short_before_its_config_is_saved(train, workdir, undisturbed, monkeypatch):
    """The summary is gone by then: both commands go on, the old one to the end that it had."""

    def killed(*arguments):
        raise KeyboardInterrupt

    longer = "--config.train.num_epochs=7"
    shutil.copytree(undisturbed, workdir)
    with monkeypatch.context() as patch:
        patch.setattr("vmapbn_flax.runs.workdir.write_json", killed)
        assert train(longer)[0] == 130
    assert not (workdir / "summary.json").exists()
    cut_short = shutil.copytree(workdir, workdir.with_name("cut_short"))
    assert train()[0] == 0
    assert outcome(workdir) == outcome(undisturbed)
    shutil.rmtree(workdir)
    cut_short.rename(workdir)
    assert train(longer)[0] == 0
    assert json.loads((workdir / "summary.json").read_text())["step"] == 42


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--config.seed=1", "config.seed: 0 -> 1"),
        ("--config.optimizer.learning_rate=1e-3", "config.optimizer.learning_rate: 0.03 -> 0.001"),
        ("--config.model.hidden=(6,4)", "config.model.hidden: (6, 5) -> (6, 4)"),
        ("--config.train.num_epochs=4", "config.train.num_epochs: 5.0 -> 4.0"),
    ],
)
@pytest.mark.parametrize("without", [[], ["config.json"], ["config.json", "summary.json"]], ids=str)
def test_another_config_is_refused(train, workdir, undisturbed, flag, change, without):
    """Without config.json too: each checkpoint knows the config it was made with."""
    shutil.copytree(undisturbed, workdir)
    for name in without:
        (workdir / name).unlink()
    before = sorted(workdir.rglob("*"))
    status, lines = train(flag)
    assert (status, len(lines)) == (1, 1)
    if flag == "--config.model.hidden=(6,4)" and without:
        assert "got float32[6, 5], expected float32[6, 4]: a checkpoint of another model" in lines[0]
    else:
        assert f"got a config that differs from the one this run was made with ({change})" in lines[0]
    assert sorted(workdir.rglob("*")) == before


def test_fewer_data_are_refused(train, workdir, undisturbed, monkeypatch):
    """data.dir may change, and with it what lies there."""
    shutil.copytree(undisturbed, workdir)
    (workdir / "summary.json").unlink()
    fewer = dataclasses.replace(small.dataset(), train=small.dataset().train[:64])
    monkeypatch.setattr(run, "load_dataset", lambda *where: fewer)
    status, lines = train()
    assert (status, len(lines)) == (1, 1)
    assert "got a checkpoint of step 30, expected at most the 20 of this run: its data set has shrunk" in lines[0]


def test_a_lost_config_comes_back(train, workdir, undisturbed):
    shutil.copytree(undisturbed, workdir)
    (workdir / "config.json").unlink()
    assert train()[0] == 0
    assert outcome(workdir) == outcome(undisturbed)


def test_cadences_may_change(train, stop, workdir, undisturbed):
    stop(11)
    assert train()[0] == 143
    stop(0)
    status, lines = train("--config.train.log_every=5", "--config.train.eval_batch_size=10")
    assert status == 0
    assert "resuming with config.train.log_every: 4 -> 5" in lines[:2]
    got, expected = state_bytes(workdir, TOTAL), state_bytes(undisturbed, TOTAL)
    assert {name for name in expected if got[name] != expected[name]} == set()


def test_an_evaluation_that_comes_late_counts(train, stop, workdir):
    """Step 29 was saved for a signal; evaluated more often now, it may be the best."""
    stop(29)
    assert train()[0] == 143
    stop(0)
    assert train("--config.train.eval_every=0.16")[0] == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert 29 in [row["step"] for row in rows if "test_loss" in row]
    check_best(workdir)


# Best.


def check_best(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    figures = {row["step"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    finite = {step: figure for step, figure in figures.items() if figure is not None}
    best = max(finite, key=lambda step: (finite[step], step)) if finite else max(figures)
    assert (summary["best_step"], summary["best_metric"]) == (best, figures[best])
    steps = saved_steps(workdir / "checkpoints")
    assert best in steps
    assert steps[-1] == summary["step"]
    assert len(steps) <= 3


NAN = float("nan")


FIGURES = [
    [0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8],
    [0.5, 0.9, 0.2, 0.9, 0.4, 0.5, 0.9, 0.7, 0.8, 0.8],  # equals: the latest
    [0.9] + [NAN] * 9,
    [NAN, 0.3, NAN, NAN, 0.2, NAN, NAN, NAN, NAN, 0.1],
    [NAN] * 10,
]


@pytest.fixture
def evaluates_to(monkeypatch):
    """Has the evaluations, in their order, come out with certain accuracies."""
    write = Record.evaluated

    def patch(figures):
        def evaluated(self, step, measured):
            write(self, step, {**measured, "test_accuracy": figures[step // 3 - 1]})

        monkeypatch.setattr(Record, "evaluated", evaluated)

    return patch


@pytest.mark.parametrize(
    ("figures", "stops"), [*((figures, ()) for figures in FIGURES), (FIGURES[1], (10, 20)), (FIGURES[3], (7,))], ids=str
)
def test_best_has_its_checkpoint(train, stop, workdir, evaluates_to, figures, stops):
    evaluates_to(figures)
    for step in stops:
        stop(step)
        assert train()[0] == 143
    stop(0)
    assert train()[0] == 0
    check_best(workdir)


def test_a_best_that_is_lost_is_not_claimed(train, stop, workdir, evaluates_to):
    evaluates_to(FIGURES[0])
    stop(20)
    assert train()[0] == 143
    stop(0)
    assert 6 in saved_steps(workdir / "checkpoints")
    (workdir / "checkpoints" / "6" / "SHA256").unlink()
    status, lines = train()
    assert status == 0
    assert "checkpoints/6: got a damaged checkpoint" in lines[0]
    assert json.loads((workdir / "summary.json").read_text())["best_step"] == 30


# Saved configs.


def test_saved_config_continues_a_run(capsys, stop, train, workdir, undisturbed):
    stop(10)
    assert train()[0] == 143
    stop(0)
    status, lines = command(capsys, "train", f"--config={saved_config()}:{workdir}")
    assert status == 0
    assert "resuming at step 10" in lines[0]
    assert outcome(workdir) == outcome(undisturbed)


def saved_config():
    from configs import saved

    return saved.__file__


# Lost and damaged files.


@pytest.mark.parametrize("content", [None, "", '{"step": 4, "train_loss": 1.0}\n'], ids=["none", "empty", "one row"])
def test_lost_rows_are_not_papered_over(train, stop, workdir, content):
    stop(17)
    assert train()[0] == 143
    stop(0)
    path = workdir / "metrics.jsonl"
    whole = path.read_text()
    path.unlink() if content is None else path.write_text(content)
    status, lines = train()
    assert (status, len(lines)) == (1, 1)
    assert f"error: {path}: got {content.count('step') if content else 0} rows up to step 17, expected the" in lines[0]
    assert (path.read_text() if path.exists() else None) == content
    path.write_text(whole)
    assert train()[0] == 0


def test_a_torn_row_is_repaired(train, stop, workdir, undisturbed):
    stop(17)
    assert train()[0] == 143
    stop(0)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "train_lo')
    assert train()[0] == 0
    assert outcome(workdir) == outcome(undisturbed)
