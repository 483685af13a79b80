"""Folders of images, and what may be wrong with one: one line that names the file."""

import io
import os
import re
import shutil
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.own import NAMES, assert_equal, examples, load, write_folder
from vmapbn_flax.data import folder, images
from vmapbn_flax.errors import UsageError

TINY = 1e-9  # GB
COLOUR = (8, 9, 3)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The directory of the caches, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vmapbn_flax"


@pytest.fixture(scope="module", params=[(8, 9), COLOUR], ids=["grey", "colour"])
def original(request, tmp_path_factory):
    """A folder, and what it has to be read as: class by class."""
    train, test = examples(40, seed=1, shape=request.param), examples(12, seed=2, shape=request.param)
    return write_folder(tmp_path_factory.mktemp("original"), train=train, test=test), by_class(train), by_class(test)


@pytest.fixture
def own(tmp_path):
    """A folder in colour, to damage."""
    parts = {"train": examples(40, seed=1, shape=COLOUR), "test": examples(12, seed=2, shape=COLOUR)}
    return write_folder(tmp_path / "own", **parts)


def by_class(split):
    return split.read(np.argsort(split.labels, kind="stable"))


def test_every_image_is_there(original):
    where, train, test = original
    dataset = load("folder", where, validation_size=10)
    assert (dataset.name, dataset.num_classes, dataset.class_names) == (str(where), 4, NAMES)
    order = folder.permutation(40)
    assert_equal(dataset.train, train.read(order[:30]))
    assert_equal(dataset.validation, train.read(order[30:]))
    assert_equal(dataset.test, test)
    assert set(dataset.validation.labels) == set(range(4))


def test_the_order_is_the_same_in_every_version_of_numpy():
    assert folder.permutation(10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


@pytest.mark.parametrize("large", [False, True], ids=["one_thread", "threads"])
def test_streamed_is_in_memory_bit_for_bit(original, caches, monkeypatch, large):
    where, *_ = original
    if large:
        monkeypatch.setattr(folder, "_LARGE", 0)
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
    streamed = load("folder", where, validation_size=10, memory_limit=TINY)
    assert streamed.streamed
    assert not caches.exists()
    whole = load("folder", where, validation_size=10)
    assert (streamed.nbytes, streamed.class_names) == (whole.nbytes, whole.class_names)
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        got, expected = getattr(streamed, split), getattr(whole, split)
        assert got.image_shape == expected.image_shape
        rows = rng.integers(0, len(got), 50)
        assert_equal(got.read(rows), expected.read(rows))
    assert streamed.fingerprint() == whole.fingerprint()


def test_jpeg_and_names_in_capitals(tmp_path):
    train = examples(8, seed=1)
    write_folder(tmp_path / "own", suffix="jpg", train=train)
    decoded = []
    for number, path in enumerate(sorted((tmp_path / "own").rglob("*.jpg"))):
        decoded.append(np.asarray(PIL.Image.open(path)))
        path.rename(path.with_suffix((".JPG", ".jpeg")[number % 2]))
    dataset = load("folder", tmp_path / "own", test_fraction=0.3)
    got = sorted(np.concatenate([dataset.train.images, dataset.test.images]).tolist())
    assert got == sorted(np.stack(decoded).tolist())


@pytest.mark.parametrize("memory_limit", [TINY, 1.0], ids=["streamed", "in_memory"])
def test_held_out(original, tmp_path, memory_limit):
    where, train, _ = original
    shutil.copytree(where / "train", tmp_path / "own/train")
    dataset = load("folder", tmp_path / "own", test_fraction=0.2, memory_limit=memory_limit)
    first, second = (split.read(np.arange(len(split))) for split in (dataset.train, dataset.test))
    assert (np.bincount(first.labels).tolist(), np.bincount(second.labels).tolist()) == ([8] * 4, [2] * 4)
    both = np.concatenate([first.images, second.images])
    assert sorted(both.tolist()) == sorted(train.images.tolist())


def test_a_class_that_test_lacks(original, tmp_path):
    where = shutil.copytree(original[0], tmp_path / "own")
    shutil.rmtree(where / "test/dog")
    dataset = load("folder", where)
    assert (dataset.num_classes, np.bincount(dataset.test.labels).tolist()) == (4, [3, 0, 3, 3])


def test_pixels_as_they_are_stored(own):
    """A photo that its EXIF data turn on its side."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.fromarray(np.full(COLOUR, 7, np.uint8))
    image.save(own / "test/cat/0000.jpg", exif=exif)
    assert (load("folder", own).test.images == 7).all((1, 2, 3)).sum() == 1


def test_hidden_files_are_left_alone(original, tmp_path):
    where = shutil.copytree(original[0], tmp_path / "own")
    for place in ("train/.DS_Store", "test/.thumbnails", "train/cat/.hidden.txt"):
        (where / place).write_bytes(b"")
    (where / "README").write_bytes(b"")
    assert_equal(load("folder", where).test, original[2])


# The cache.


def zero(path):
    """The same size and time, but nothing left to decode."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_decoded_once(own, caches):
    decoded = load("folder", own)
    for path in own.rglob("*.png"):
        if path not in (own / "train/cat/0000.png", own / "test/cat/0000.png"):  # whose headers say the shape
            zero(path)
    again = load("folder", own)
    assert_equal(again.train, decoded.train)
    assert_equal(again.test, decoded.test)
    assert again.class_names == NAMES
    assert len(list(caches.iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "renamed", "test_fraction"])
def test_a_changed_folder_is_decoded_again(own, change):
    if change == "test_fraction":
        shutil.rmtree(own / "test")
    before = load("folder", own, test_fraction=0.5 * (change == "test_fraction"))
    path = own / "train/cat/0004.png"
    if change == "content":
        PIL.Image.fromarray(np.full(COLOUR, 7, np.uint8)).save(path)
        assert (load("folder", own).train.images == 7).all((1, 2, 3)).sum() == 1
    elif change == "renamed":
        path.rename(own / "train/fox/0004.png")
        assert np.bincount(load("folder", own).train.labels).tolist() == [9, 10, 10, 11]
    else:
        assert len(before.test) == 20
        assert len(load("folder", own, test_fraction=0.1).test) == 4


def test_a_bar_on_a_terminal(own, monkeypatch, capsys):
    load("folder", own)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    os.utime(own / "train/cat/0004.png")
    load("folder", own)
    assert "own: decoding: 100%" in capsys.readouterr().err


# What may be wrong.


def png(width, height, colour=2, scanlines=b""):
    """A PNG file that claims a size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


def encoded(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


GREY = PIL.Image.fromarray(np.zeros((8, 9), np.uint8))
OTHER = PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8))
WHOLE = encoded(PIL.Image.fromarray(examples(1, seed=3, shape=COLOUR).images[0]))
BOMB = png(60_000, 60_000, scanlines=bytes(2**20))


def replace(content, name="train/dog/0005.png"):
    return name, lambda path: path.write_bytes(content)


def replace_by_directory(path):
    path.unlink()
    path.mkdir()


def empty(path):
    for image in path.iterdir():
        image.unlink()


def only_one_class(path):
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other)


DAMAGE = {
    "size": (*replace(encoded(OTHER)), "got an image of 9 x 9, colour; expected 8 x 9, colour, as the first image has"),
    "grey_among_colour": (*replace(encoded(GREY)), "got an image of 8 x 9, grey; expected 8 x 9, colour"),
    "test_size": (*replace(encoded(GREY), "test/cat/0000.png"), "got an image of 8 x 9, grey; expected 8 x 9, colour"),
    "transparent": (*replace(encoded(OTHER.convert("RGBA"))), "got pixels of the kind RGBA; expected grey or RGB of 8"),
    "palette": (*replace(encoded(OTHER.convert("P"))), "got pixels of the kind P; expected"),
    "empty": (*replace(b""), "got neither PNG nor JPEG; expected a whole PNG or JPEG image"),
    "another_format": (*replace(encoded(OTHER, "bmp")), "got neither PNG nor JPEG"),
    "truncated": (*replace(WHOLE[:-40]), "got a damaged image .*; expected a whole PNG or JPEG image"),
    "truncated_jpeg": (*replace(encoded(OTHER.resize((9, 8)), "jpeg")[:-20]), "got a damaged image"),
    "garbage": (*replace(WHOLE[:30] + bytes(100)), "got a damaged image .*; expected a whole PNG or JPEG image"),
    "bomb": (*replace(BOMB), "got an image of 60000 x 60000, colour; expected 8 x 9, colour"),
    "bomb_first": (
        *replace(BOMB, "train/cat/0000.png"),
        "got an image of 60000 x 60000, 3600 million pixels;",
    ),
    "directory": ("train/dog/0005.png", replace_by_directory, "got another kind of file; expected .png, .jpg, .jpeg"),
    "text": (*replace(b"", "train/dog/notes.txt"), "got another kind of file; expected .png"),
    "stray_image": (*replace(WHOLE, "train/0000.png"), "got a file; expected folders alone, one for each class"),
    "empty_class": ("train/dog", empty, "got an empty folder; expected the images of a class"),
    "empty_test_class": ("test/dog", empty, "got an empty folder"),
    "unknown_class": ("test/dog", lambda path: path.rename(path.with_name("cow")), "test/cow: got a class that train"),
    "no_train": ("train", shutil.rmtree, "got No such file or directory; expected a folder, in the form train/<class>"),
    "no_test_folders": ("test", lambda path: [shutil.rmtree(p) for p in path.iterdir()], "got no folder; expected one"),
    "no_test": ("test", shutil.rmtree, "own: got no test split; expected one, or a data.test_fraction"),
    "one_class": ("train/dog", only_one_class, r"train: got 1 folders of a class \(dog\); expected two or more"),
}


@pytest.mark.parametrize(("file", "damage", "match"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_line_naming_the_file(own, file, damage, match):
    damage(own / file)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=match) as error:
            load("folder", own)
        assert tracemalloc.get_traced_memory()[1] < 5e7  # with imports of Pillow
    finally:
        tracemalloc.stop()
    start = re.match(r"(.*?): got", str(error.value))[1]
    assert (own / file).is_relative_to(start) or start == str(own / "test/cow")
    assert "\n" not in str(error.value)


def test_a_chunk_that_claims_more_than_the_file_has(tmp_path):
    """Pillow decodes such an image; of an open file, it would first allocate 3 GB."""
    path = tmp_path / "claim.png"
    path.write_bytes(WHOLE[:33] + b"\xcf" + WHOLE[34:])
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(images.read_image(path, COLOUR), examples(1, seed=3, shape=COLOUR).images[0])
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damage_is_found_when_it_is_read(own, damage):
    train = load("folder", own, memory_limit=TINY).train
    path = own / "train/fox/0039.png"
    damage(path)
    with pytest.raises(UsageError, match=rf"^{path}: got (No such file|neither PNG).*; expected a whole PNG or JPEG"):
        train.read(np.arange(40))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), max_size=4), st.integers(0, len(WHOLE)))
def test_any_bytes_are_an_image_or_refused(tmp_path_factory, changes, missing):
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    content = bytearray(WHOLE)
    for position, bits in changes:
        content[position] ^= bits
    path.write_bytes(content[: len(content) - missing * (missing % 2)])
    tracemalloc.start()
    try:
        assert images.read_image(path, COLOUR).shape == COLOUR
    except UsageError:
        pass
    finally:
        assert tracemalloc.get_traced_memory()[1] < 3e6
        tracemalloc.stop()
