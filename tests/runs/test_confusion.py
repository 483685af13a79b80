"""The picture of what a network gets wrong."""

import matplotlib.image
import numpy as np
import pytest

from vmapbn_flax.data import Split
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs import confusion
from vmapbn_flax.runs.confusion import plot_confusion
from vmapbn_flax.training.evaluation import Predictions


def predictions(classes, wrong, size=200):
    """Of so many classes, with so many mistakes."""
    label = np.arange(size, dtype=np.int32) % classes
    said = np.where(np.arange(size) < wrong, (label + 1) % classes, label)
    sure = np.linspace(0.3, 0.99, size, dtype=np.float32)
    return Predictions(label, said.astype(np.int32), sure, 1 - sure)


def examples(shape=(6, 7), size=200):
    return Split(np.arange(size * np.prod(shape)).reshape(size, *shape).astype(np.uint8), np.zeros(size, np.int32))


@pytest.fixture
def drawn(monkeypatch):
    """The figures, which are written all the same."""
    figures, write = [], confusion.write_picture

    def keep(figure, output):
        figures.append(figure)
        write(figure, output)

    monkeypatch.setattr(confusion, "write_picture", keep)
    return figures


@pytest.mark.parametrize(
    ("classes", "wrong", "height"), [(2, 150, 6.18), (10, 3, 5.75), (10, 0, 4.0), (20, 200, 9.7), (21, 200, 10.0)]
)
def test_sizes(tmp_path, drawn, classes, wrong, height):
    """The width of a page; no higher than one; an image a mistake, up to twelve."""
    output = tmp_path / "picture.png"
    plot_confusion(predictions(classes, wrong), [f"class {i}" for i in range(classes)], examples(), "a run", output)
    assert matplotlib.image.imread(output).shape == (round(150 * height), round(150 * 7.5), 4)
    assert height <= 10.7
    images = [image for axes in drawn[0].axes for image in axes.images]
    assert len(images) == 1 + min(wrong, 12)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_what_it_says(tmp_path, drawn):
    """Names are no formulas; long ones are cut. The surest mistake comes first."""
    names = ["$x", "under_score$", "a name that is far too long to be shown"]
    plot_confusion(predictions(3, 9, 60), names, examples((6, 7, 3)), "a run", tmp_path / "picture.svg")
    matrix, accuracy, *images = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [text.get_text() for text in matrix.get_yticklabels()] == ["$x", "under_score$", "a name that is …"]
    assert [text.get_text() for text in matrix.texts] == ["17", "3", "17", "3", "3", "17"]
    assert images[0].get_title() == "predicted $x\ntrue a name that is …\n39.4 % against 60.6 %"
    assert len(images) == 9
    (places,) = (line.get_xdata() for line in accuracy.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(places, 17 / 20)


@pytest.mark.parametrize("shape", [(5, 4, 2), (5, 4, 4), (1, 1)])
def test_images_of_any_kind(tmp_path, shape):
    plot_confusion(predictions(2, 4), ["a", "b"], examples(shape), "a run", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_a_class_without_examples(tmp_path):
    found = predictions(3, 5)
    plot_confusion(found, [*"abcd"], examples(), "a run", tmp_path / "picture.png")
    plot_confusion(found, [f"class {i}" for i in range(30)], examples(), "a run", tmp_path / "picture.png")


def test_another_format(tmp_path):
    with pytest.raises(UsageError, match=r"got a name that ends in '\.doc', expected \.png"):
        plot_confusion(predictions(2, 4), ["a", "b"], examples(), "a run", tmp_path / "picture.doc")
    assert list(tmp_path.iterdir()) == []
