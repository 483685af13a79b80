"""A prepared data set from anywhere: it runs nothing, and what it claims is checked before it is believed."""

import io
import json
import os
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.helpers.prepare import as_examples, png, prepare
from tests.helpers.runs import command
from vmapbn_flax import default_config
from vmapbn_flax.data import Split, load_dataset
from vmapbn_flax.errors import UsageError

ROOT = Path(__file__).parents[2]
PAYLOAD = "import pathlib\n\npathlib.Path({canary!r}).touch()\n\n\nclass Boom:\n    pass\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The directory of a prepared set of three examples a split."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    three = as_examples(Split(np.zeros((3, 28, 28), np.uint8), np.arange(3, dtype=np.int32)))
    return prepare(tmp_path / "tfds", {"train": three, "test": three})


@pytest.fixture(autouse=True)
def little_memory():
    """What is claimed is not allocated: the process may take 4 GB more than it has."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(root, match, **fields):
    """Checks that loading ends in one line that matches."""
    data = default_config().data
    data.update(name="digits", dir=str(root), **fields)
    with pytest.raises(UsageError, match=match) as error:
        load_dataset(data)
    assert "\n" not in str(error.value)


# What it names.


@pytest.fixture
def evil(root, tmp_path, monkeypatch):
    """A workdir as from somebody else: its config names a data set in it, and that names a class in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    workdir = tmp_path / "runs" / "evil"
    workdir.mkdir(parents=True)
    (workdir / "payload.py").write_text(PAYLOAD.format(canary=str(tmp_path / "canary")))
    root.rename(workdir / "data")
    config = default_config()
    config.data.update(name="digits", dir="runs/evil/data")
    config.train.batch_size = 2
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    return workdir


def name_payload(content):
    content["pythonClassName"] = "runs.evil.payload.Boom"


NAMED = {
    "the features": (lambda content: name_payload(content), "got features of the class runs.evil.payload.Boom"),
    "the image": (
        lambda content: name_payload(content["featuresDict"]["features"]["image"]),
        "got features image: runs.evil.payload.Boom",
    ),
    "the label": (
        lambda content: name_payload(content["featuresDict"]["features"]["label"]),
        "label: runs.evil.payload.Boom",
    ),
}


@pytest.mark.parametrize(("change", "message"), NAMED.values(), ids=NAMED)
@pytest.mark.parametrize(
    "argv",
    [("evaluate", "runs/evil"), ("train", f"--config={ROOT}/configs/saved.py:runs/evil")],
    ids=["evaluate", "train"],
)
def test_no_class_is_imported(evil, tmp_path, capsys, argv, change, message):
    rewrite(evil / "data/digits/1.0.0/features.json", change)
    status, lines = command(capsys, *argv)
    assert not (tmp_path / "canary").exists()
    (line,) = lines
    assert status == 2
    assert line.startswith("error: runs/evil/data/digits/1.0.0: ") or line.startswith(f"error: {evil}")
    assert message in line
    assert not any("payload" in name for name in sys.modules)


def test_further_features_are_not_looked_at(evil, tmp_path, capsys):
    def change(content):
        content["featuresDict"]["features"]["more"] = {"pythonClassName": "runs.evil.payload.Boom"}

    rewrite(evil / "data/digits/1.0.0/features.json", change)
    rewrite(evil / "data/digits/1.0.0/dataset_info.json", lambda info: info.update(moduleName="runs.evil.payload"))
    status, lines = command(capsys, "evaluate", "runs/evil")
    assert (status, len(lines)) == (1, 1), lines
    assert "checkpoints: got steps []" in lines[0]  # the data was read
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "template", ["../{DATASET}", "/etc/{SPLIT}", "{SPLIT.__class__}", "{SPLIT:>999999999}", "{NOTHING}", "..", "a\0b"]
)
def test_files_lie_beside_their_description(root, template):
    def change(info):
        for split in info["splits"]:
            split["filepathTemplate"] = template

    directory = root / "digits/1.0.0"
    rewrite(directory / "dataset_info.json", change)
    refused(root, f"^{directory}: got .*; expected a complete data set")


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "digits-train.array_record-00000-of-00001"])
def test_pipes_are_not_waited_for(root, file):
    path = root / "digits/1.0.0" / file
    path.unlink()
    os.mkfifo(path)
    refused(root, f"^{root}/digits/1.0.0: got .*({file} is no file|A pipe or a device)")


# What it claims.


def shape(*sizes):
    def change(content):
        content["featuresDict"]["features"]["image"]["image"]["shape"]["dimensions"] = [str(size) for size in sizes]

    return change


def classes(count):
    def change(content):
        content["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = count

    return change


CLAIMS = {
    "images of 3 TB": shape(10**6, 10**6, 3),
    "images beyond all numbers": shape(10**30, 10**30, 1),
    "images of no size": shape(0, 28, 1),
    "images of negative size": shape(-28, -28, 1),
    "two channels": shape(28, 28, 2),
    "two dimensions": shape(28, 28),
    "classes beyond all memory": classes(str(10**15)),
    "no classes": classes("0"),
    "half a class": classes("1.5"),
    "a list of classes": classes(["10"]),
}


@pytest.mark.parametrize("change", CLAIMS.values(), ids=CLAIMS)
def test_absurd_features(root, change):
    rewrite(root / "digits/1.0.0/features.json", change)
    refused(root, rf"^{root}/digits/1.0.0: got .*; expected (image: Image of one known size|a complete data set)")


@pytest.mark.parametrize("count", ["4", "2", str(10**18), "-3", "x"])
def test_as_many_examples_as_claimed(root, count):
    rewrite(root / "digits/1.0.0/dataset_info.json", lambda info: info["splits"][0].update(shardLengths=[count]))
    refused(root, rf"^{root}/digits/1.0.0: got .*; expected")


def test_nesting(root):
    for name in ("features.json", "dataset_info.json"):
        (root / "digits/1.0.0" / name).write_text('{"a":' * 900 + "1" + "}" * 900)
        refused(root, rf"^{root}/digits/1.0.0: got ValueError when reading \(nested more than 30 deep\)")


def png_of(width, height):
    """A PNG that claims a size, and holds the zeros of it: compressed a thousand times."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**7)))
        + chunk(b"IEND", b"")
    )


def jpeg_of(width, height):
    buffer = io.BytesIO()
    PIL.Image.new("L", (28, 28)).save(buffer, format="jpeg")
    return buffer.getvalue().replace(struct.pack(">HH", 28, 28), struct.pack(">HH", height, width), 1)


IMAGES = {
    "png": (png_of(60_000, 60_000), r"an image of shape \(60000, 60000, 1\), not \(28, 28, 1\)"),
    "jpeg": (jpeg_of(60_000, 60_000), r"an image of shape \(60000, 60000, 1\), not \(28, 28, 1\)"),
    "colour": (png(np.zeros((28, 28, 3), np.uint8)), r"an image of shape \(28, 28, 3\), not \(28, 28, 1\)"),
    "cut short": (png(np.zeros((28, 28), np.uint8))[:-30], "SyntaxError|OSError"),
    "empty": (b"", "SyntaxError|OSError"),
    "another format": (b"GIF89a" + bytes(100), "SyntaxError|OSError"),
}


@pytest.mark.parametrize(("image", "match"), IMAGES.values(), ids=IMAGES)
def test_images_are_decoded_only_in_the_claimed_size(tmp_path, monkeypatch, image, match):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    examples = [{"image": image, "label": 3}] * 2
    root = prepare(tmp_path / "tfds", {"train": examples, "test": examples})
    refused(root, f"^{root}/digits/1.0.0: got .*({match})")
