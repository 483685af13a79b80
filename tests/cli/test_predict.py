"""`predict`: files of every kind, in their order; what was done to them is said, and what cannot be read is named."""

import csv
import io
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.helpers import small
from tests.helpers.trained import NAMES, conv, dataset, write
from tests.training import test_own_network as own
from vmapbn_flax import load_run
from vmapbn_flax.cli import predict as module
from vmapbn_flax.cli.main import main

IMAGES = small.dataset().test.images  # of 3 x 4 pixels, grey
RESIZED = "resized to 3 x 4"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The workdir of a run with checkpoints of three steps."""
    return write(tmp_path_factory.mktemp("run") / "run", small.config(), dataset(), steps=(1, 2, 3))


@pytest.fixture
def predict(path, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty directory; returns its status and the lines of its two outputs."""
    monkeypatch.chdir(tmp_path)

    def predict(*arguments, workdir=path):
        capsys.readouterr()
        status = main(["predict", str(workdir), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, [line for line in printed.out.splitlines() if line.strip()], printed.err.splitlines()

    return predict


def save(name, pixels, **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    (PIL.Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(name, **options)
    return name


def cells(lines):
    """The cells of the rows below a table's header."""
    return [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]


def expected(probabilities, top):
    order = np.argsort(-probabilities)[:top]
    return [cell for i in order for cell in (NAMES[i], f"{probabilities[i]:.4f}")]


def test_a_folder(predict, path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)
    names = [f"photos/{folder}/{i}.png" for folder in ("a", "b") for i in range(5)]
    for name, image in zip(names, IMAGES, strict=False):
        save(name, image)
    for other in ("photos/notes.txt", "photos/.hidden.png", "photos/a/5.gif"):
        Path(other).touch()
    save("photos/.thumbnails/1.png", IMAGES[0])
    status, lines, errors = predict("photos", "--csv=found.csv")
    assert (status, errors) == (0, [])
    assert lines[0].split() == ["image", "class", "probability", *["next", "probability"] * 2]
    probabilities = load_run(path).predict(IMAGES[:10])
    assert cells(lines) == [[name, *expected(p, 3)] for name, p in zip(names, probabilities, strict=True)]
    rows = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == names
    for row, p in zip(rows, probabilities, strict=True):
        assert (row["class"], np.float32(row["probability"])) == (NAMES[p.argmax()], p.max())
        assert [np.float32(row[f"p_{name}"]) for name in NAMES] == p.tolist()


def test_arrays(predict, path):
    np.save("one.npy", IMAGES[0])
    np.save("many.npy", np.asfortranarray(IMAGES[1:3] / 255))
    np.savez("alone.npz", anything=IMAGES[3:4, ..., None])
    np.savez_compressed("keras.npz", x_train=IMAGES, x_test=IMAGES[4:5].reshape(1, 12), y_test=[0])
    save("a.png", IMAGES[5])
    status, lines, errors = predict("many.npy", "one.npy", "alone.npz", "a.png", "keras.npz", "--top=1")
    assert (status, errors) == (0, [])
    found = cells(lines)
    names = ["many.npy[0]", "many.npy[1]", "one.npy", "alone.npz[0]", "a.png", "keras.npz[0]"]
    assert [row[0] for row in found] == names
    probabilities = load_run(path).predict(IMAGES[[1, 2, 0, 3, 5, 4]])
    assert [row[1:] for row in found] == [expected(p, 1) for p in probabilities]


def test_step_and_top(predict, path):
    save("a.png", IMAGES[0])
    for step in (1, 2, 3, "latest", "best"):
        _, lines, _ = predict("a.png", f"--step={step}", "--top=99")
        probabilities = load_run(path, step).predict(IMAGES[0])
        assert cells(lines) == [["a.png", *expected(probabilities, 4)]]


def test_names_are_printed_as_they_are(predict):
    """In a pipe no row is folded; nothing in a name is markup, or a command to the terminal."""
    long = "deep/" * 40 + "[red]a[/red].png"
    save(long, IMAGES[0])
    save("\x1b[31m.png", IMAGES[0])
    status, lines, _ = predict(long, "\x1b[31m.png")
    assert status == 0
    assert [row[0] for row in cells(lines)] == [long, "\N{REPLACEMENT CHARACTER}[31m.png"]


def test_conversions_are_counted(predict, path):
    colour = np.repeat(np.kron(IMAGES[0], np.ones((9, 9), np.uint8))[..., None], 3, -1)
    save("a.png", colour)
    save("b.jpg", colour[..., 0])
    save("c.png", PIL.Image.fromarray(IMAGES[0]).convert("LA"))
    save("d.png", IMAGES[0])
    status, lines, errors = predict("a.png", "b.jpg", "c.png", "d.png")
    assert (status, len(lines)) == (0, 6)
    assert errors == [f"note: converted 3 of 4 images: 2 made grey of 8 bits, 2 {RESIZED}"]
    assert cells(lines)[2][1:] == cells(lines)[3][1:] == expected(load_run(path).predict(IMAGES[0]), 3)

    status, lines, errors = predict("a.png", "b.jpg", "c.png", "d.png", "--strict")
    assert (status, [row[0] for row in cells(lines)]) == (1, ["d.png"])
    assert [line.split(": got ")[0] for line in errors] == ["error: a.png", "error: b.jpg", "error: c.png"]
    assert errors[0].endswith("expected 3 x 4, grey. Convert it yourself, or leave --strict out.")


def test_colour(predict, tmp_path):
    workdir = write(tmp_path / "colour", conv(), dataset(colour=True))
    save("a.png", IMAGES[0])
    status, lines, errors = predict("a.png", workdir=workdir)
    assert (status, errors) == (0, ["note: converted 1 of 1 images: 1 made colour of 8 bits"])
    probabilities = load_run(workdir).predict(np.repeat(IMAGES[0][..., None], 3, -1))
    assert cells(lines) == [["a.png", *expected(probabilities, 3)]]


def test_dark_and_bright(predict, path, monkeypatch):
    """A border unlike those of the training images is pointed out, and nothing done about it unasked."""
    run = load_run(path)
    monkeypatch.setattr(module, "load_run", lambda *_, **__: run)
    object.__setattr__(run, "border", 0.1)
    ink = np.full((3, 4), 250, np.uint8)
    ink[1, 1:3] = 10
    save("ink.png", ink)
    np.save("ink.npy", np.stack([ink / 255, 1 - ink / 255]))
    status, lines, errors = predict("ink.png", "ink.npy")
    assert status == 0
    assert cells(lines)[0][1:] == expected(run.predict(ink), 3)
    note = "images have a {} border, where the training images have a {} one. If dark and bright are exchanged in them,"
    assert errors == [f"note: 2 of 3 {note.format('bright', 'dark')} add --invert."]

    status, lines, errors = predict("ink.png", "ink.npy", "--invert")
    assert cells(lines)[0][1:] == cells(lines)[1][1:] == expected(run.predict(255 - ink), 3)
    assert errors == [f"note: 1 of 3 {note.format('bright', 'dark')} leave out --invert."]

    object.__setattr__(run, "border", 0.9)
    assert predict("ink.png", "--invert")[2] == [f"note: 1 of 1 {note.format('dark', 'bright')} leave out --invert."]
    object.__setattr__(run, "border", 0.5)
    assert predict("ink.png")[2] == []


# Files that cannot be read.


def test_damaged_files_are_named_and_the_rest_go_on(predict):
    save("a.png", IMAGES[0])
    save("z.jpg", IMAGES[1])
    whole = io.BytesIO()
    PIL.Image.fromarray(np.zeros((90, 90), np.uint8)).save(whole, "JPEG")
    contents = {
        "cut.jpg": (whole.getvalue()[:300], "got a damaged image"),
        "text.png": (b"hello", "got neither PNG nor JPEG; expected a whole PNG or JPEG image"),
        "empty.png": (b"", "got neither PNG nor JPEG"),
        "odd.npy": (b"hello", "expected a whole file, as numpy.save or numpy.savez writes it"),
        "odd.npz": (b"hello", "got File is not a zip file"),
    }
    for name, (content, _) in contents.items():
        Path(name).write_bytes(content)
    np.save("object.npy", np.array([{}]), allow_pickle=True)
    np.save("shape.npy", IMAGES[:, :2])
    np.save("range.npy", IMAGES.astype(float))
    np.savez("two.npz", a=IMAGES, b=IMAGES)
    words = {name: word for name, (_, word) in contents.items()} | {
        "object.npy": "with values of the type object, not numbers",
        "shape.npy": "got an array of shape (37, 2, 4); expected (3, 4, 1) or (3, 4) or (12,) for one image",
        "range.npy": "got floats from 0.0 to 255.0; expected 0 to 1",
        "two.npz": "got the arrays a, b; expected a single one, or one called images or test_images or x_test",
    }
    status, lines, errors = predict("a.png", *words, "z.jpg", "--top=1")
    assert (status, [row[0] for row in cells(lines)]) == (1, ["a.png", "z.jpg"])
    assert len(errors) == len(words)
    for line, (name, word) in zip(errors, words.items(), strict=True):
        assert line.startswith(f"error: {name}")
        assert word in line
    status, lines, errors = predict("text.png")
    assert (status, lines, len(errors)) == (1, [], 1)


def test_arrays_larger_than_the_limit(predict, path, monkeypatch):
    run = load_run(path)
    monkeypatch.setattr(module, "load_run", lambda *_, **__: run)
    run.config.unlock().data.memory_limit = 1e-9
    np.save("a.npy", IMAGES)
    status, _, errors = predict("a.npy")
    assert (status, len(errors)) == (1, 1)
    assert "more than data.memory_limit=1e-09 GB" in errors[0]


# What is refused at once.

REFUSED = {
    "a missing file": (["a.png", "missing.png"], 2, "missing.png: got no such file; expected an image, an array in a"),
    "a folder without images": (["notes"], 2, "notes: got a folder without images; expected files that end in .png, "),
    "a pipe": (["pipe.png"], 2, "pipe.png: got a pipe or a device; expected an image"),
    "no image": ([], 2, "the following arguments are required: image"),
    "no rank": (["a.png", "--top=0"], 2, "argument --top: got '0', expected a number from 1"),
    "no number": (["a.png", "--top=many"], 2, "argument --top: got 'many', expected a number from 1"),
    "a step of another kind": (
        ["a.png", "--step=last"],
        2,
        "argument --step: got 'last', expected the number of",
    ),
    "a step that is not saved": (["a.png", "--step=7"], 1, "checkpoints: got steps [1, 2, 3], expected step 7"),
    "a csv that cannot be written": (["a.png", "--csv=none/a.csv"], 1, "none/a.csv: got No such file or directory"),
    "another network": (["a.png", "--network=m:N"], 2, "--network=m:N: got a run of the network mlp; expected that"),
}


@pytest.mark.parametrize(("arguments", "status", "word"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(predict, arguments, status, word):
    save("a.png", IMAGES[0])
    Path("notes").mkdir()
    Path("notes/a.txt").touch()
    os.mkfifo("pipe.png")
    got, _, errors = predict(*arguments)
    assert (got, len(errors)) == (status, 1)
    assert errors[0].startswith("error: ")
    assert word in errors[0]


def test_workdirs_of_other_kinds(predict, tmp_path):
    save("a.png", IMAGES[0])
    for name, files, word in (
        ("empty", [], "empty/config.json: got No such file or directory; expected the workdir of a run"),
        (
            "sweep",
            ["sweep.json"],
            "sweep: got the workdir of a sweep, expected that of a run. Choose one",
        ),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        status, _, errors = predict("a.png", workdir=name)
        assert (status, len(errors)) == (1, 1)
        assert word in errors[0]


def test_a_network_of_ones_own_has_to_be_named(predict, tmp_path):
    workdir = write(tmp_path / "own", own.config(), dataset())
    save("a.png", IMAGES[0])
    status, _, errors = predict("a.png", workdir=workdir)
    assert (status, len(errors)) == (2, 1)
    assert f"--network={own.NAME} for evaluate, refresh and predict" in errors[0]
    status, lines, _ = predict("a.png", f"--network={own.NAME}", workdir=workdir)
    assert (status, cells(lines)[0][0]) == (0, "a.png")
