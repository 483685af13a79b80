import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax import load_run
from vmapbn_flax.cli import evaluate as evaluate_module
from vmapbn_flax.cli import refresh as module
from vmapbn_flax.cli.refresh import refresh
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import read_json
from vmapbn_flax.runs import train as run
from vmapbn_flax.runs.checkpoints import restore, saved_steps
from vmapbn_flax.runs.loading import load_config
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs


def trained(workdir, **changes):
    """A workdir as training leaves it, after a few steps on real MNIST."""
    config = small.config(model__hidden=(16, 16), train__batch_size=128, train__num_epochs=0.05, **changes)
    run.train(config, workdir)
    return workdir


def evaluate(workdir, norm=None):
    programs, _, state = evaluate_module.load(workdir, None, norm, None)
    return {"step": int(state.step), **programs.evaluate(state)}


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory):
    """A run of real MNIST, refreshed: its workdir and what `refresh` returned."""
    workdir = tmp_path_factory.mktemp("refresh") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for user in (run, module, evaluate_module):
            patch.setattr(user, "load_dataset", lambda *arguments: small.mnist())
        trained(workdir)
        yield workdir, refresh(workdir)


def load(workdir):
    config = load_config(Workdir(workdir))
    template = Programs([config], small.mnist()).template()
    directory = workdir / "checkpoints"
    return restore(directory, saved_steps(directory)[-1], template)[0]


def test_statistics_are_those_of_all_the_data(refreshed):
    """Layer by layer in float64, each normalised by the statistics of all its own inputs."""
    workdir, _ = refreshed
    state, before = load(workdir / "refreshed"), load(workdir)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    x = small.mnist().train.images.reshape(60_000, -1) / 255
    for i in range(2):
        norm, got = params[f"norm_{i}"], state.batch_stats[f"norm_{i}"]
        x = x @ params[f"dense_{i}"]["kernel"]
        mean, var = x.mean(0), x.var(0)
        # The first mean is rounded in units of the values it is a mean of: the deviation sets the scale.
        assert np.max(np.abs(got["mean"] - mean) / np.sqrt(var)) < 1e-6
        np.testing.assert_allclose(got["var"], var, rtol=2e-6)
        assert np.max(np.abs(before.batch_stats[f"norm_{i}"]["var"] / var - 1)) > 0.1  # 23 steps were too few
        x = (x - mean) / np.sqrt(var + np.float64(np.float32(1e-5)))
        x = 1 / (1 + np.exp(-(x * norm["scale"] + norm["bias"])))


def test_only_the_statistics_change(refreshed):
    workdir, _ = refreshed
    before, after = load(workdir), load(workdir / "refreshed")
    small.assert_same_bits(after.replace(batch_stats=before.batch_stats), before)


def test_figures(refreshed):
    workdir, figures = refreshed
    assert figures["before"] == {name: value for name, value in evaluate(workdir).items() if name != "step"}
    after = evaluate(workdir / "refreshed")
    assert after == {"step": 23, **figures["after"]}
    assert after == evaluate(workdir / "refreshed", norm="batched")
    assert figures["after"]["test_count"] == 10_000
    assert figures["after"]["test_loss"] < figures["before"]["test_loss"]
    saved = json.loads((workdir / "refreshed" / "refresh.json").read_text())
    assert saved == {"step": 23, **figures}


def test_it_is_loaded_like_any_run(refreshed):
    """At its figures, which what it predicts of the test images gives, too."""
    workdir, figures = refreshed
    loaded, test = load_run(workdir / "refreshed"), small.mnist().test
    assert (loaded.step, loaded.figures) == (23, figures["after"])
    right = loaded.predict(test.images).argmax(-1) == test.labels
    assert np.float32(right.mean()) == np.float32(figures["after"]["test_accuracy"])
    assert load_run(workdir).figures == figures["before"]


def test_training_refuses_it(refreshed):
    workdir, _ = refreshed
    contents = sorted(workdir.rglob("*"))
    with pytest.raises(RunError, match=r"refreshed: got refreshed statistics, expected a run; train in .*run instead"):
        run.train(load_config(Workdir(workdir)), workdir / "refreshed")
    assert sorted(workdir.rglob("*")) == contents


def test_training_refuses_an_unfinished_one(refreshed, tmp_path, monkeypatch):
    """Cut short wherever: what there is by the first file that a run would take for its own says so."""
    workdir, _ = refreshed
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "Checkpoints", killed)
    monkeypatch.setattr(Programs, "population_statistics", lambda self, state: state.batch_stats)
    monkeypatch.setattr(Programs, "evaluate", lambda self, state: {"test_accuracy": 0.5})
    with pytest.raises(KeyboardInterrupt):
        refresh(tmp_path)
    with pytest.raises(RunError, match="got refreshed statistics"):
        run.train(load_config(Workdir(workdir)), tmp_path / "refreshed")


def test_training_refuses_what_a_kill_left_of_its_removal(refreshed, tmp_path, monkeypatch):
    """In whatever order a removal takes the files: the mark may be the first to go."""
    workdir, _ = refreshed
    for name in ("config.json", "checkpoints"):
        (tmp_path / name).symlink_to(workdir / name)
    shutil.copytree(workdir / "refreshed", tmp_path / "refreshed")

    def killed(path, **more):
        if path.exists():
            (path / "refresh.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    monkeypatch.setattr(Programs, "population_statistics", lambda self, state: state.batch_stats)
    monkeypatch.setattr(Programs, "evaluate", lambda self, state: {"test_accuracy": 0.5})
    with pytest.raises(KeyboardInterrupt):
        refresh(tmp_path)
    assert not (tmp_path / "refreshed").exists()
    monkeypatch.undo()
    assert refresh(tmp_path)["after"]["test_count"] == 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoints", "refreshed"}


def test_again_replaces_it(refreshed):
    workdir, figures = refreshed
    (workdir / "refreshed" / "checkpoints" / "999").mkdir()
    assert refresh(workdir) == figures
    assert saved_steps(workdir / "refreshed" / "checkpoints") == [23]


def test_run_without_norm_or_checkpoint(refreshed, tmp_path):
    workdir, _ = refreshed
    with pytest.raises(RunError, match=r"got steps \[.*23\], expected step 5"):
        refresh(workdir, step=5)
    config = read_json(workdir / "config.json")
    config["model"]["norm"] = "none"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="got a run without batch norm"):
        refresh(tmp_path)
    with pytest.raises(RunError, match=r"config\.json: got No such file"):
        refresh(tmp_path / "nothing")
