"""The figure of a sweep with and without batch norm, from a sweep of two small runs."""

import json

import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.summary_pb2 import HistogramProto

from configs import paper
from tests.helpers import quick
from tests.runs.test_metrics import events
from tests.sweeps import test_sweep
from tests.sweeps.test_sweep import small_data  # noqa: F401
from vmapbn_flax.cli.main import main
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import expand, program_groups
from vmapbn_flax.sweeps.figure import plot_figure
from vmapbn_flax.sweeps.train import train_sweep

WATCH = "pre_activation_0[2]"


def config(norms=("none", "vmap"), **changes):
    changes = {"train__watch": (WATCH,), "model__kernel_std": 0.1} | changes
    return test_sweep.sweep_config({"model__norm": norms, "seed": (0, 1)}, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data):  # noqa: F811
    workdir = tmp_path_factory.mktemp("paper") / "sweep"
    with quick.programs():
        train_sweep(config(), workdir)
    return workdir


def test_figure(trained, capsys):
    assert main(["figure", str(trained)]) == 0
    assert capsys.readouterr().out.strip() == str(trained / "figure.png")
    picture = matplotlib.image.imread(trained / "figure.png")
    assert picture.shape[1] > 2.5 * picture.shape[0]  # three panels side by side
    assert all((part.min(-1) < 0.5).mean() > 0.01 for part in np.split(picture[..., :3], 3, axis=1))


def test_each_member_watches_a_layer(trained):
    """With its percentiles in the rows of evaluations, and with TensorBoard's histograms."""
    for member in expand(config()):
        rows = [row for row in Workdir(trained / member.name).read_rows() if "test_accuracy" in row]
        shown = {
            event.step: value.histo
            for event in events(trained / member.name)
            for value in event.summary.value
            if value.HasField("histo")
        }
        assert [row["step"] for row in rows] == list(shown) == [7, 14, 20]
        for row in rows:
            low, middle, high = (row[f"{WATCH}_p{number}"] for number in (15, 50, 85))
            assert low < middle < high
            assert isinstance(shown[row["step"]], HistogramProto)
            np.testing.assert_allclose(np.take(shown[row["step"]].bucket_limit, [15, 50, 85]), [low, middle, high])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"train__watch": ()}, "got no layer in train.watch"), ({"norms": ("vmap",)}, "got no norm beside none")],
)
def test_other_sweeps(tmp_path, changes, message):
    sweep = config(**changes)
    names = [member.name for member in expand(sweep)]
    (tmp_path / "config.json").write_text(json.dumps(sweep.to_dict()))
    members = {name: {"status": "pending", "step": 0, "reason": ""} for name in names}
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members, "groups": [names]}))
    for member in expand(sweep):
        Workdir(tmp_path / member.name).write(tmp_path / member.name / "config.json", member.config.to_dict())
    with pytest.raises(RunError, match=f"{message}; expected a sweep .* configs/paper.py$"):
        plot_figure(Workdir(tmp_path))


def test_a_layer_that_is_not_there_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"config\.train\.watch: got 'dense_7', .* expected one of"):
        train_sweep(config(train__watch=("dense_7",)), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "config.json").exists()


def test_the_config_of_the_paper():
    """50,000 steps of 60 examples; two programs."""
    members = expand(paper.get_config())
    assert len(program_groups(members)) == 2
    for member in members:
        steps_per_epoch = (60_000 - member.config.data.validation_size) // member.config.train.batch_size
        assert round(member.config.train.num_epochs * steps_per_epoch) == 50_000
        assert member.config.train.batch_size == 60
        assert member.config.model.hidden == (100, 100, 100)
