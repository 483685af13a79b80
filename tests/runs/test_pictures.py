import json

import matplotlib.image
import numpy as np
import pytest

from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs import pictures as plot
from vmapbn_flax.runs.pictures import PERCENT, plot_runs


def run(path, rows):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def history(shift=0.0):
    """Rows like those of a run: losses more often than accuracies."""
    for step in range(100, 4001, 100):
        yield {"step": step, "train_loss": 2 * np.exp(-step / 900) + 0.05 + shift, "learning_rate": 0.01}
        if step % 400 == 0:
            yield {"step": step, "test_loss": 0.1, "test_accuracy": 0.98 - 0.3 * np.exp(-step / 700) - shift}


@pytest.fixture
def runs(tmp_path):
    return [run(tmp_path / name, history(0.01 * i)) for i, name in enumerate(("vmap_bn", "batched_bn", "no_bn"))]


def dark(path):
    """How much ink there is, as a check that lines were drawn."""
    return (matplotlib.image.imread(path)[..., :3].min(-1) < 0.9).mean()


def test_picture(runs, tmp_path):
    plot_runs(runs[:1], tmp_path / "one.png")
    plot_runs(runs, tmp_path / "three.png")
    one, three = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "three.png"))
    assert one.shape == three.shape == (540, 1350, 4)
    assert dark(tmp_path / "three.png") > dark(tmp_path / "one.png") > 0.01
    assert {path.name for path in tmp_path.iterdir()} == {*(run.name for run in runs), "one.png", "three.png"}


@pytest.mark.parametrize(("name", "magic"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG")])
def test_formats(runs, tmp_path, name, magic):
    plot_runs(runs, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_overwrites(runs, tmp_path):
    output = tmp_path / "accuracy.png"
    output.write_text("an old picture")
    plot_runs(runs, output)
    assert dark(output) > 0.01


@pytest.mark.parametrize("name", ["accuracy", "accuracy.xyz", ".png"])
def test_unknown_format(runs, tmp_path, name):
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"got a name that ends in '.*', expected \.png"):
        plot_runs(runs, tmp_path / name)
    assert set(tmp_path.iterdir()) == before


def test_workdir_without_metrics(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "accuracy.png").write_text("an old picture")
    with pytest.raises(RunError, match=r"empty: got no metrics\.jsonl with rows; expected the workdir of a run"):
        plot_runs([*runs, tmp_path / "empty"], tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_text() == "an old picture"


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "train_loss": 1.0}],
        [{"step": 1, "train_loss": None}, {"step": 1, "test_accuracy": 0.1}],
        [{"step": 1, "train_loss": None}, {"step": 1, "test_accuracy": None}],
        [{"step": 1, "train_loss": 1.0}, {"step": 2, "train_loss": None}, {"step": 3, "train_loss": 2.0}],
    ],
)
def test_gaps(tmp_path, rows):
    """A run that was never evaluated, or whose loss was not finite, is in the legend all the same."""
    plot_runs([run(tmp_path / "a", rows)], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count('<g id="legend_') == 2


@pytest.mark.parametrize(
    ("accuracies", "scale"),
    [((0.1, 0.9), "logit"), ((1, 1), "linear"), ((0, 0), "linear"), ((0, 1), "linear"), ((0.5, 1), "linear")],
)
def test_accuracies_of_0_and_1(tmp_path, monkeypatch, accuracies, scale):
    figures = []
    monkeypatch.setattr(plot, "write_picture", lambda figure, output: figures.append(figure))
    plot_runs(
        [run(tmp_path / "a", ({"step": i, "test_accuracy": a} for i, a in enumerate(accuracies)))], tmp_path / "a.png"
    )
    axes = figures[0].axes[0]
    axes.figure.draw_without_rendering()
    assert axes.get_yscale() == scale
    lowest, highest = axes.get_ylim()
    assert lowest < min(accuracies)
    assert max(accuracies) < highest


def test_more_runs_than_styles(tmp_path):
    runs = [run(tmp_path / str(i), history(0.01 * i)) for i in range(8)]
    plot_runs(runs, tmp_path / "a.png")
    assert dark(tmp_path / "a.png") > 0.01


def test_ticks_show_the_digits_that_they_need():
    shown = {0.5: "50 %", 0.07: "7 %", 0.9775: "97.75 %", 0.9725: "97.25 %", 0.999: "99.9 %"}
    assert {share: PERCENT(share) for share in shown} == shown
