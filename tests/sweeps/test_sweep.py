import dataclasses
import itertools
import json
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from configs import saved, sweep_best, sweep_halving, sweep_lr, sweep_norm, sweep_renorm, sweep_width
from tests.helpers import shared, small
from tests.helpers.runs import command
from tests.runs.test_metrics import hparams_of
from vmapbn_flax import default_config, load_run
from vmapbn_flax.cli.main import main
from vmapbn_flax.config import flat, validate
from vmapbn_flax.errors import Interrupted, RunError, UsageError
from vmapbn_flax.fields import FIELDS
from vmapbn_flax.runs import train as run
from vmapbn_flax.runs.checkpoints import restore, saved_steps
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps import plan
from vmapbn_flax.sweeps import train as sweep
from vmapbn_flax.sweeps.expand import chunk, expand, program_groups, program_key
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.training import mesh, steps
from vmapbn_flax.training.members import member_bytes
from vmapbn_flax.training.programs import Programs

BASE = {
    "data__validation_size": 20,
    "optimizer__name": "sgd",
    "train__log_every": 3,
    "train__eval_every": 1.4,
    "train__max_skipped_steps": 3,
}
RATES, SEEDS = (0.01, 0.03, 0.1, 0.3), (0, 1)
STEPS = 20


def sweep_config(sweep=None, **changes):
    """A sweep of small runs: 5 steps to an epoch, 20 in all, by default of eight members.

    Not of Adam, which makes a step of what rounding leaves of a gradient that is zero.
    """
    values = {"optimizer__learning_rate": RATES, "seed": SEEDS} if sweep is None else sweep
    fields = BASE | changes
    config = small.config(**fields).unlock()
    for name, value in values.items():
        *section, leaf = name.split("__")
        (config.sweep[section[0]] if section else config.sweep)[leaf] = value
    return config.lock()


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch:
        for module in (plan, run):
            patch.setattr(module, "load_dataset", lambda data: small.dataset(data.validation_size))
        yield


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Groups of eight share what is compiled, and members alone."""
    with shared.programs() as programs:
        yield programs


@pytest.fixture
def real_data(monkeypatch):
    from vmapbn_flax.data import load_dataset

    monkeypatch.setattr(plan, "load_dataset", load_dataset)


@pytest.fixture(scope="module")
def compilations():
    """What the programs of groups were compiled for, by name."""
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        original = steps.make_train_step

        def make_train_step(*settings, **frozen):
            step = original(*settings, **frozen)

            def traced(*arguments):
                compiled.append(settings)
                return step(*arguments)

            return traced

        patch.setattr(steps, "make_train_step", make_train_step)
        yield compiled


@pytest.fixture(scope="module")
def eight(tmp_path_factory, programs, compilations):
    """A finished sweep of eight members, with how often its step was compiled."""
    workdir = tmp_path_factory.mktemp("eight") / "sweep"
    programs.forget()
    before = len(compilations)
    sweep.train_sweep(sweep_config(), workdir)
    return workdir, len(compilations) - before


@pytest.fixture
def copy_of_eight(eight, tmp_path):
    return Path(shutil.copytree(eight[0], tmp_path / "sweep"))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def figures(workdir):
    """All that a sweep found, without how long it took."""
    found = {}
    for name in Ledger(Workdir(workdir)).members:
        path = workdir / name / "summary.json"
        summary = json.loads(path.read_text()) | {"seconds": None} if path.exists() else None
        found[name] = rows(workdir / name), summary
    return found


def ledger_of(workdir):
    return json.loads((workdir / "sweep.json").read_text())


# What a sweep is made of.


def test_product():
    members = expand(sweep_config({"seed": (0, 1), "optimizer__learning_rate": (1e-3, 1)}))
    assert [member.name for member in members] == [
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=1.0,seed=0",
        "learning_rate=1.0,seed=1",
    ]
    for member in members:
        assert (member.config.optimizer.learning_rate, member.config.seed) == tuple(member.values.values())
        validate(member.config)
        assert not flat(member.config.sweep)
        assert flat(member.config) == flat(small.config(**BASE)) | member.values


def test_zip():
    config = sweep_config({"seed": (0, 1), "model__hidden": ((4, 4), [8])}, sweep_options__mode="zip")
    assert [member.values for member in expand(config)] == [
        {"model.hidden": (4, 4), "seed": 0},
        {"model.hidden": (8,), "seed": 1},
    ]
    assert [member.name for member in expand(config)] == ["hidden=4x4,seed=0", "hidden=8,seed=1"]


def draws(size, options_seed=0, **more):
    swept = {"optimizer__learning_rate": ("log_uniform", 1e-3, 1e-1), "model__norm": ("vmap", "none")} | more
    return [member.values for member in random_members(swept, size, options_seed)]


def random_members(swept, size, seed=0):
    options = {"sweep_options__mode": "random", "sweep_options__size": size, "sweep_options__seed": seed}
    return expand(sweep_config(swept, **options))


def test_random():
    first = draws(40)
    assert draws(40) == first
    assert draws(50)[:40] == first
    assert draws(40, options_seed=1) != first
    with_more = draws(40, train__label_smoothing=("uniform", 0.0, 0.5), seed=(0, 1, 2))
    assert [{name: values[name] for name in first[0]} for values in with_more] == first
    rates = np.array([values["optimizer.learning_rate"] for values in first])
    assert ((rates >= 1e-3) & (rates <= 1e-1)).all()
    assert 8 < (rates < 1e-2).sum() < 32  # half, in logarithms
    assert {values["model.norm"] for values in first} == {"vmap", "none"}


@pytest.mark.parametrize("seed", range(6))
def test_drawn_between_two_close_numbers(seed):
    """At four digits this would be 1.0 again and again, which is no decay."""
    low, high = 0.999, 0.99999
    members = random_members({"optimizer__adam_b2": ("uniform", low, high)}, 16, seed)
    values = [member.config.optimizer.adam_b2 for member in members]
    assert all(low <= value <= high for value in values)
    assert len({float(f"{value:.10g}") for value in values}) == 16
    for member, value in zip(members, values, strict=True):
        spelled = member.name.removeprefix("adam_b2=")
        assert low <= float(spelled) <= high
        assert float(spelled) == pytest.approx(value, abs=1e-4)
        assert len(spelled) <= 8


def test_names_of_draws():
    """Four digits where they do. More draws have no say in the names of the first ones."""
    swept = {"train__label_smoothing": ("uniform", 0.25, 0.251), "model__norm": ("vmap",)}
    names = [member.name for member in random_members(swept, 40)]
    assert len({*names}) == 40
    assert {len(name) for name in names[:2]} == {len("label_smoothing=0.2505,norm=vmap")}
    assert [member.name for member in random_members(swept, 10)] == names[:10]
    assert all(0.25 <= float(name.split(",")[1].split("=")[1]) <= 0.251 for name in names)


@pytest.mark.parametrize("module", [sweep_lr, sweep_norm, sweep_renorm, sweep_width, sweep_best, sweep_halving])
def test_configs(module):
    members = expand(module.get_config())
    sizes = {sweep_lr: [15], sweep_width: [3, 3, 3, 3], sweep_best: [24], sweep_halving: [48]}.get(module, [5, 5, 5])
    assert [len(together) for together in program_groups(members)] == sizes


def test_members_share_a_program_that_freezes_its_norms_at_one_step():
    config = small.config().unlock()
    config.data.validation_size = 20
    config.sweep.model.freeze_norm_after = (0.0, 1.0)
    config.sweep.model.renorm_r_max = (2.0, 3.0)
    assert [len(together) for together in program_groups(expand(config))] == [2, 2]


BAD = [
    ({"seed": ()}, {}, r"config\.sweep\.seed: got \(\), expected a tuple of at least one value"),
    ({"seed": 3}, {}, r"config\.sweep\.seed: got 3, expected a tuple"),
    ({"seed": (0, 1.5)}, {}, r"config\.sweep\.seed: got the value 1\.5, expected a int"),
    ({"seed": (0, True)}, {}, r"config\.sweep\.seed: got the value True"),
    ({"seed": (0, -1)}, {}, r"member seed=-1: config\.seed: got -1, expected"),
    ({"seed": (1, 1)}, {}, "got the member seed=1 twice"),
    ({"optimizer__learning_rate": (1, 1.0)}, {}, "got the member learning_rate=1.0 twice"),
    ({"optimizer__lerning_rate": (1.0,)}, {}, r"config\.sweep\.optimizer\.lerning_rate: .*optimizer\.learning_rate"),
    ({"model__norm": ("vmap", "layer")}, {}, "member norm=layer: config.model.norm: got 'layer'"),
    ({"model__norm": ("vmap", 3)}, {}, r"config\.sweep\.model\.norm: got the value 3, expected a str"),
    ({"optimizer__learning_rate": ("log_uniform", 0.1, 1.0)}, {}, "distributions are for the .* random and optuna"),
    ({"seed": (0, 1)}, {"data__validation_size": 0}, r"config\.data\.validation_size: got 0 for the member seed=0"),
    ({"seed": (0, 1)}, {"sweep_options__mode": "grid"}, r"config\.sweep_options\.mode: got 'grid'"),
    ({"seed": (0, 1), "model__norm": ("vmap",)}, {"sweep_options__mode": "zip"}, "expected as many of each field"),
    ({"seed": (0, 1)}, {"sweep_options__mode": "random"}, r"size: got 16 draws, .*as differ, 2 here"),
    (
        {"optimizer__learning_rate": ("log_uniform", 0.0, 1.0)},
        {"sweep_options__mode": "random"},
        r"config\.sweep\.optimizer\.learning_rate: got .*expected \('log_uniform', low, high\)",
    ),
    (
        {"train__label_smoothing": ("uniform", 0.5, 0.0)},
        {"sweep_options__mode": "random"},
        r"config\.sweep\.train\.label_smoothing: got .*expected \('uniform', low, high\) with low < high$",
    ),
    ({"model__norm": ("uniform", 0, 1)}, {"sweep_options__mode": "random"}, "expected choices"),
    ({"model__hidden": (tuple(range(1, 90)),)}, {}, r"a name of \d+ characters"),
    ({}, {}, "got nothing to sweep"),
]


@pytest.mark.parametrize(("swept", "changes", "message"), BAD)
def test_bad_sweep(swept, changes, message, tmp_path):
    with pytest.raises(UsageError, match=message) as error:
        sweep.train_sweep(sweep_config(swept, **changes), tmp_path / "sweep")
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "override",
    ["--config.sweep.seed=()", "--config.sweep.sed=(1,)", "--config.sweep.seed=(0, 0)", "--config.sweep.seed=(0, 'a')"],
)
def test_bad_sweep_is_one_line(override, tmp_path, capsys):
    assert main(["train", "--config=configs/sweep_lr.py", override, f"--workdir={tmp_path}/sweep"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sizes_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"config\.train\.batch_size: got 81, expected at most the 80 training"):
        sweep.train_sweep(sweep_config({"train__batch_size": (16, 81)}), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_data_larger_than_its_limit_is_refused(tmp_path, monkeypatch):
    streamed = dataclasses.replace(small.dataset(20), streamed=True)
    monkeypatch.setattr(plan, "load_dataset", lambda *where: streamed)
    with pytest.raises(UsageError, match=r"config\.data\.memory_limit: got 2\.0, expected at least 0\.01, for mnist"):
        sweep.train_sweep(sweep_config(), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_is_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"config\.sweep: got values of optimizer\.learning_rate, seed, expected none"):
        run.train(sweep_config(), tmp_path / "run")


ARGUMENTS = {name for name, field in FIELDS.items() if field.traced} - {"train.num_epochs"}


@pytest.mark.parametrize("name", FIELDS)
def test_only_arguments_share_a_program(name):
    """Of different `train.num_epochs` members are not, for a group trains in one loop."""
    config, other = default_config(), default_config()
    other.update_from_flattened_dict({name: another(flat(config)[name])})
    assert (program_key(other) == program_key(config)) == (name in ARGUMENTS)


def another(value):
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case str():
            return f"another {value}"
        case tuple():
            return (*value, 3)
    return value + 1


def test_groups_and_chunks():
    members = expand(sweep_config({"model__hidden": ((4,), (8,)), "seed": tuple(range(5))}))
    groups = program_groups(members)
    assert [[member.config.model.hidden for member in together] for together in groups] == [[(4,)] * 5, [(8,)] * 5]
    assert [len(part) for part in chunk(members, 4)] == [3, 3, 4]
    assert [len(part) for part in chunk(members, 10)] == [10]
    assert chunk(members, 1) == [[member] for member in members]


# Training.


def test_eight_members_one_compilation(eight):
    workdir, compilations = eight
    assert compilations == 1
    assert len(ledger_of(workdir)["groups"]) == 1
    for name, entry in ledger_of(workdir)["members"].items():
        assert entry == {"status": "done", "step": STEPS, "reason": ""}
        directory = workdir / name
        files = {path.name for path in directory.iterdir() if "tfevents" not in path.name}
        assert files == {"config.json", "metrics.jsonl", "summary.json", "checkpoints"}
        plugin = hparams_of(directory)
        assert plugin["session_end_info"].session_end_info.status == 1  # a success
        metrics = [info.name.tag for info in plugin["experiment"].experiment.metric_infos]
        assert metrics == ["validation_accuracy", "validation_loss", "test_accuracy", "test_loss"]
        best = json.loads((directory / "summary.json").read_text())["best_step"]
        assert {path.name for path in (directory / "checkpoints").iterdir()} == {str(best), str(STEPS)}
    assert not any((workdir / "groups").glob("*"))
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_finished_sweep_trains_nothing(eight, monkeypatch):
    before = figures(eight[0]), ledger_of(eight[0])
    monkeypatch.setattr(Programs, "create", None)
    sweep.train_sweep(sweep_config(), eight[0])
    assert (figures(eight[0]), ledger_of(eight[0])) == before


def validation_accuracy(workdir, step):
    """Of the checkpoint of a member's `step`."""
    programs = run.Programs([saved.get_config(str(workdir))], small.dataset(20))
    return programs.evaluate(restore(workdir / "checkpoints", step, programs.template())[0])["validation_accuracy"]


def test_a_member_keeps_its_best_checkpoint(eight):
    """The latest of the best evaluations, which is not the last one of all members; it is what was evaluated."""
    best_steps = set()
    for name in ledger_of(eight[0])["members"]:
        summary = json.loads((eight[0] / name / "summary.json").read_text())
        evaluated = [row for row in rows(eight[0] / name) if "validation_accuracy" in row]
        best = max(evaluated, key=lambda row: (row["validation_accuracy"], row["step"]))
        assert (summary["best_step"], summary["best_metric"]) == (best["step"], best["validation_accuracy"])
        if best["step"] not in best_steps:
            best_steps.add(best["step"])
            assert validation_accuracy(eight[0] / name, best["step"]) == best["validation_accuracy"]
    assert best_steps - {STEPS}


def test_a_member_is_loaded_like_any_run(eight):
    """At its best checkpoint, which predicts what it was evaluated with; the sweep itself names one that can be."""
    names = ledger_of(eight[0])["members"]
    best = {name: json.loads((eight[0] / name / "summary.json").read_text()) for name in names}
    with pytest.raises(RunError, match=r"Choose one of its 8 members, such as (.*), the best so far") as error:
        load_run(eight[0])
    named = Path(re.search("such as (.*), the best", str(error.value))[1])
    assert best[named.name]["best_metric"] == max(summary["best_metric"] for summary in best.values())
    loaded = load_run(named)
    assert loaded.step == best[named.name]["best_step"]
    validation = small.dataset(20).validation
    right = loaded.predict(validation.images).argmax(-1) == validation.labels
    assert np.float32(right.mean()) == np.float32(loaded.figures["validation_accuracy"])


@pytest.mark.slow
def test_a_diverged_member_keeps_its_best_checkpoint(tmp_path):
    """It is evaluated at every step, until a loss is not finite."""
    config = sweep_config({"optimizer__learning_rate": (0.01, 1e38)}, train__eval_every=0.2)
    entry = sweep.train_sweep(config, tmp_path / "sweep").members["learning_rate=1e+38"]
    assert entry["status"] == "diverged"
    diverged = tmp_path / "sweep" / "learning_rate=1e+38"
    best = max(rows(diverged), key=lambda row: (row.get("validation_accuracy") or 0, row["step"]))
    assert set(saved_steps(diverged / "checkpoints")) == {best["step"], entry["step"]}
    assert best["step"] < entry["step"]
    assert validation_accuracy(diverged, best["step"]) == best["validation_accuracy"]


@pytest.mark.parametrize("member", [0, 5])
def test_member_equals_its_run(eight, member, tmp_path):
    """The same rows; what floating point rounds differently, it has had 20 steps to amplify."""
    member = expand(sweep_config())[member]
    run.train(member.config, tmp_path / "run")
    got, expected = rows(eight[0] / member.name), rows(tmp_path / "run")
    assert [list(row) for row in got] == [list(row) for row in expected]
    for name in ("step", "learning_rate", "test_count", "validation_count"):
        assert [row.get(name) for row in got] == [row.get(name) for row in expected]
    for name in ("train_loss", "validation_loss", "test_loss"):
        values = [[row[name] for row in side if name in row] for side in (got, expected)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)
    summary = json.loads((eight[0] / member.name / "summary.json").read_text())
    alone = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary) == list(alone)
    assert (summary["best_step"], summary["best_metric"]) == (alone["best_step"], alone["best_metric"])
    template = Programs([member.config], small.dataset(20)).template()
    workdirs = eight[0] / member.name, tmp_path / "run"
    for step in {alone["best_step"], STEPS}:
        saved = [restore(workdir / "checkpoints", step, template) for workdir in workdirs]
        small.assert_close(*(state.params for state, _ in saved), rtol=1e-3, atol=1e-5)
        assert saved[0][1] == saved[1][1]  # and what lies beside the state


def test_batches_are_those_of_each_seed(programs):
    configs = [member.config for member in expand(sweep_config({"seed": tuple(range(3, 11))}))]
    dataset = small.dataset(20)
    together = programs(configs, dataset, mesh.member_mesh(configs[0].mesh, 8))
    state = together.advance(together.create(), 0, 1)
    for config, member in zip(configs, together.split(state), strict=True):
        alone = programs([config], dataset, mesh.solo_mesh(config.mesh))
        small.assert_close(member, alone.advance(alone.create(), 0, 1))


def test_signal_saves(eight, tmp_path, monkeypatch, capsys):
    advance, calls = Programs.advance, []

    def advance_and_signal(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return advance(*arguments)

    monkeypatch.setattr(Programs, "advance", advance_and_signal)
    with pytest.raises(Interrupted) as stop:
        sweep.train_sweep(sweep_config(), tmp_path / "sweep")
    assert stop.value.exit_status == 143
    name = "learning_rate=0.01,seed=0"
    entry = ledger_of(tmp_path / "sweep")["members"][name]
    assert entry["status"] == "running"
    assert [path.name for path in (tmp_path / "sweep/groups/0/checkpoints").iterdir()] == [str(entry["step"])]
    status, lines = command(capsys, "train", f"--config={saved.__file__}:{tmp_path / 'sweep' / name}")
    assert (status, len(lines)) == (1, 1)
    assert re.search(r"got a member that its sweep is not done with .*--config=configs/saved\.py", lines[0])
    sweep.train_sweep(sweep_config(), tmp_path / "sweep")
    assert ledger_of(tmp_path / "sweep") == ledger_of(eight[0])
    assert figures(tmp_path / "sweep") == figures(eight[0])


def test_diverging_members_change_nothing_in_the_others(eight, tmp_path):
    sick = sweep_config({"optimizer__learning_rate": (*RATES[:3], 1e38), "seed": SEEDS})
    ledger = sweep.train_sweep(sick, tmp_path / "sweep")
    assert (ledger.count("done"), ledger.count("diverged"), ledger.count("failed")) == (6, 2, 0)
    template = Programs([expand(sick)[0].config], small.dataset(20)).template()
    for name in ledger.members:
        workdirs = eight[0] / name, tmp_path / "sweep" / name
        if "1e+38" not in name:
            healthy, beside_sick = ((workdir / "metrics.jsonl").read_text() for workdir in workdirs)
            assert healthy == beside_sick
            states = [restore(workdir / "checkpoints", STEPS, template)[0] for workdir in workdirs]
            small.assert_same_bits(*states)
    entry = ledger_of(tmp_path / "sweep")["members"]["learning_rate=1e+38,seed=0"]
    assert entry["status"] == "diverged"
    assert 3 < entry["step"] < STEPS
    assert entry["reason"] == f"3 steps in a row not finite, up to step {entry['step']}"
    diverged = tmp_path / "sweep" / "learning_rate=1e+38,seed=0"
    assert max(row["step"] for row in rows(diverged)) <= entry["step"]
    assert [path.name for path in (diverged / "checkpoints").iterdir()] == [str(entry["step"])]
    with pytest.raises(RunError, match=r"got 3 steps in a row whose loss or gradients are not finite"):
        run.train(expand(sick)[6].config, diverged)


def test_group_of_which_all_diverge_ends(tmp_path, monkeypatch):
    written = []  # how many members had diverged, at each write of the ledger
    write = Ledger.write
    monkeypatch.setattr(Ledger, "write", lambda ledger: written.append(ledger.count("diverged")) or write(ledger))
    config = sweep_config({"optimizer__learning_rate": (1e38, 2e38), "seed": (0, 1, 2, 3)})
    ledger = sweep.train_sweep(config, tmp_path / "sweep")
    assert {*written} == {0, 8}  # those that diverge together are written together
    assert ledger.count("diverged") == 8
    assert all(entry["step"] < STEPS for entry in ledger.members.values())
    for name, entry in ledger.members.items():  # each as far as it came
        assert saved_steps(tmp_path / "sweep" / name / "checkpoints") == [entry["step"]]
        assert hparams_of(tmp_path / "sweep" / name)["session_end_info"].session_end_info.status == 2  # a failure
    assert not any((tmp_path / "sweep" / "groups").glob("*"))


@pytest.mark.slow
def test_more_members_than_files_may_be_open(tmp_path):
    """Of forty members, as of two thousand where a process may have 256 open files."""
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), len(list(Path("/proc/self/fd").iterdir()))
    config = sweep_config({"seed": tuple(range(40))}, train__num_epochs=0.4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 64, limits[1]))
    try:
        assert sweep.train_sweep(config, tmp_path / "sweep").count("done") == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_widths_are_groups(tmp_path, programs, compilations):
    programs.forget()
    before = len(compilations)
    config = sweep_config({"model__hidden": ((4,), (5,)), "seed": (0, 1, 2, 3)}, sweep_options__chunk=2)
    ledger = sweep.train_sweep(config, tmp_path / "sweep")
    assert ledger.groups == [
        [f"hidden={width},seed={seed}" for seed in pair] for width in "45" for pair in ("01", "23")
    ]
    assert ledger.count("done") == 8
    assert len(compilations) - before == 2  # the chunks of a group share a program


@pytest.mark.parametrize(
    ("on_failure", "statuses"),
    [("continue", ["failed", "done"]), pytest.param("stop", ["failed", "pending"], marks=pytest.mark.slow)],
)
def test_group_that_fails(on_failure, statuses, tmp_path, monkeypatch):
    """The first of two, of one member each."""
    config = sweep_config({"seed": SEEDS}, sweep_options__chunk=1, sweep_options__on_failure=on_failure)
    create, calls = Programs.create, itertools.count()

    def fail_first(programs):
        if next(calls) == 0:
            raise RunError("out of luck")
        return create(programs)

    monkeypatch.setattr(Programs, "create", fail_first)
    ledger = sweep.train_sweep(config, tmp_path / "sweep")
    assert [entry["status"] for entry in ledger.members.values()] == statuses
    assert ledger.members["seed=0"]["reason"] == "RunError: out of luck"
    if on_failure == "continue":
        return
    again = sweep.train_sweep(config, tmp_path / "sweep")
    assert [entry["status"] for entry in again.members.values()] == ["done", "done"]
    assert again.members["seed=0"]["reason"] == ""


def test_new_values_are_new_groups(copy_of_eight):
    before = figures(copy_of_eight)
    more = sweep_config({"optimizer__learning_rate": RATES, "seed": (*SEEDS, 2, 3)})
    ledger = sweep.train_sweep(more, copy_of_eight)
    assert [len(names) for names in ledger.groups] == [8, 8]
    assert all(name.endswith(("seed=2", "seed=3")) for name in ledger.groups[1])
    assert ledger.count("done") == 16
    assert {name: found for name, found in figures(copy_of_eight).items() if name in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {"optimizer__learning_rate": RATES}}, "got a sweep without its member learning_rate=0.01,seed=0"),
        ({"train__batch_size": 8}, r"config\.train\.batch_size: 16 -> 8"),
        ({"train__num_epochs": 5.0}, r"got another train\.num_epochs, expected that of the sweep"),
    ],
)
def test_other_sweep_is_refused(copy_of_eight, changes, message):
    before = ledger_of(copy_of_eight)
    with pytest.raises(RunError, match=message):
        sweep.train_sweep(sweep_config(**changes), copy_of_eight)
    assert ledger_of(copy_of_eight) == before


def test_workdir_of_a_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunError, match="got the workdir of a run, expected that of a sweep"):
        sweep.train_sweep(sweep_config(), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"members": {"a": {}}, "groups": []}', '{"members": {}}'])
def test_damaged_ledger(copy_of_eight, content):
    (copy_of_eight / "sweep.json").write_text(content)
    with pytest.raises(RunError, match=r"sweep\.json: got .*expected"):
        sweep.train_sweep(sweep_config(), copy_of_eight)


def test_finished_member_continues_alone(copy_of_eight):
    name = "learning_rate=0.03,seed=1"
    config = saved.get_config(str(copy_of_eight / name))
    assert flat(config) == flat(next(member.config for member in expand(sweep_config()) if member.name == name))
    before = rows(copy_of_eight / name)
    config.train.num_epochs = 5.0
    assert run.train(config, copy_of_eight / name)["step"] == 25
    assert rows(copy_of_eight / name)[: len(before)] == before
    # To its sweep it is what it was.
    assert sweep.train_sweep(sweep_config(), copy_of_eight).count("done") == 8


def test_saved_config_of_a_sweep(eight):
    config = saved.get_config(str(eight[0]))
    assert flat(config) == flat(sweep_config())
    assert [member.name for member in expand(config)] == list(ledger_of(eight[0])["members"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data"), [("mlp", 1), ("mlp", 2), ("conv", 1)])
def test_memory_estimate_is_of_the_right_size(real_data, name, data):
    """Up to three times what the compiler says that one member, and three, need; more devices compute them at once."""
    config, dataset = default_config(name), small.mnist()
    config.train.batch_size, config.train.eval_batch_size, config.mesh.data = 256, 256, data
    for count in (1, 3):
        devices = mesh.member_mesh(config.mesh, 1)
        programs = Programs([config] * count, dataset, devices)
        programs.measure(programs.advance(programs.create(), 0, 1))
        needs = [programs.compiler[program].memory_analysis() for program in ("train", "test")]
        measured = data * (max(need.temp_size_in_bytes for need in needs) + needs[0].argument_size_in_bytes)
        measured -= data * dataset.train.nbytes
        estimate = member_bytes(config, dataset).of_group(count, devices)
        print(f"{name}, {count} members, {data} devices: {estimate / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
        assert 0.8 < estimate / measured < 3
