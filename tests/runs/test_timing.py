import gzip
import json
from types import SimpleNamespace

import jax
import pytest

from tests.helpers import small
from tests.helpers.runs import CONFIG, command, outcome
from vmapbn_flax.runs import timing
from vmapbn_flax.runs import train as run
from vmapbn_flax.training.programs import Programs


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(run, "load_dataset", lambda *where: small.dataset())


def traces(workdir):
    """The names of the events in each trace of the workdir, as Perfetto reads it and as TensorBoard does."""
    for path in sorted((workdir / "profile" / "plugins" / "profile").iterdir()):
        (perfetto,), (tensorboard,) = path.glob("*.trace.json.gz"), path.glob("*.xplane.pb")
        events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
        data = jax.profiler.ProfileData.from_file(str(tensorboard))
        yield (
            [event["name"] for event in events if "name" in event],
            [event.name for plane in data.planes for line in plane.lines for event in line.events],
        )


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The workdir of a finished run with a profile, and the steps of each chunk it took."""
    workdir, chunks, advance = tmp_path_factory.mktemp("profiled") / "run", [], Programs.advance

    def noted(self, state, step, count):
        chunks.append(count)
        return advance(self, state, step, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_dataset", lambda *where: small.dataset())
        patch.setattr(Programs, "advance", noted)
        from vmapbn_flax.cli.flags import parse_config

        run.train(parse_config([CONFIG, "--config.train.profile=True"])[0], workdir)
    return workdir, chunks


def test_profile_is_of_a_few_steps_without_compilation(profiled):
    workdir, chunks = profiled
    ((perfetto, tensorboard),) = traces(workdir)
    for names in (perfetto, tensorboard):
        assert any("train_steps" in name for name in names)
        assert not any("backend_compile" in name for name in names)
    assert chunks[0] == 1
    assert 1 <= chunks[1] <= 8


def test_profile_changes_no_bit(profiled, capsys, tmp_path):
    workdir, _ = profiled
    status, _ = command(capsys, "train", CONFIG, f"--workdir={tmp_path / 'run'}")
    assert status == 0
    assert not (tmp_path / "run" / "profile").exists()
    got, expected = outcome(workdir), outcome(tmp_path / "run")
    configs = [json.loads(side.pop("config.json")) for side in (got, expected)]
    assert [config["train"].pop("profile") for config in configs] == [True, False]
    assert configs[0] == configs[1]
    assert got == expected


def test_profile_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "profile").touch()
    status, lines = command(capsys, "train", CONFIG, f"--workdir={tmp_path}", "--config.train.profile=True")
    assert status == 1
    assert lines[-1].startswith(f"error: {tmp_path}/profile: got no profile (")
    assert "or leave out config.train.profile" in lines[-1]


def test_table_says_the_speed(capsys, tmp_path):
    status, lines = command(capsys, "train", CONFIG, f"--workdir={tmp_path}/run", "--config.train.num_epochs=1")
    assert status == 0
    table = dict(line.split() for line in lines if len(line.split()) == 2)
    assert 0 < float(table["fraction_outside_device_program"]) < 1
    seconds = json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]
    # The whole run takes longer than its training loop.
    assert float(table["examples_per_second"]) > small.STEPS_PER_EPOCH * small.BATCH / seconds["total"]
    assert {"startup", "compile", "train", "evaluate", "checkpoint", "total"} == set(seconds)


def test_clocks_by_hand(monkeypatch, unchecked):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now.time)
    compiler = SimpleNamespace(compile_seconds=0.0, device_seconds={"train": 0.0})
    clocks = timing.Timing(compiler, started=98.0)
    assert clocks.speed(0) == {}

    now.time += 3  # the start, one second of it compiling
    compiler.compile_seconds += 1
    clocks.started_up()
    for _ in range(2):  # ten seconds of training, of which six and two thirds in the program, and five compiling
        with clocks.clock("train") as clock:
            now.time += 7.5
            compiler.compile_seconds += 2.5
            compiler.device_seconds["train"] += 10 / 3
        assert clock.seconds == 5
    with clocks.clock("evaluate"):
        now.time += 4
    now.time += 2  # rows
    assert clocks.seconds() == {"compile": 6, "startup": 4, "train": 10, "evaluate": 4, "total": 26}
    assert clocks.speed(600) == {"examples_per_second": 50, "fraction_outside_device_program": round(1 - 20 / 36, 4)}
