"""Data sets in MNIST's format, and what may be wrong with one: one line that names the file."""

import gzip
import os
import re
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.own import assert_equal, examples, idx_bytes, load, write_idx
from vmapbn_flax.data import idx
from vmapbn_flax.errors import UsageError

TRAIN, TEST = examples(40, seed=1), examples(12, seed=2)
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture
def directory(tmp_path):
    return write_idx(tmp_path / "own", train=TRAIN, test=TEST)


def test_reads_back_identical(directory):
    dataset = load("idx", directory, validation_size=10)
    assert (dataset.name, dataset.num_classes, dataset.class_names) == (str(directory), 4, ("0", "1", "2", "3"))
    assert_equal(dataset.train, TRAIN[:-10])
    assert_equal(dataset.validation, TRAIN[-10:])
    assert_equal(dataset.test, TEST)
    assert not dataset.streamed


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"emnist-letters-{name.replace('t10k', 'test')}",
        lambda name: name.replace("-idx", ".idx"),
        lambda name: name.upper(),
    ],
    ids=["emnist", "dots", "capitals"],
)
def test_other_names_and_uncompressed(directory, rename):
    for path in list(directory.iterdir()):
        (directory / rename(path.name).removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
        if rename("x.gz").endswith(".GZ"):  # compressed, then, by its name
            file = directory / rename(path.name)
            file.write_bytes(gzip.compress(file.read_bytes()))
    assert_equal(load("idx", directory).test, TEST)


def test_relative_and_home_directories(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    monkeypatch.setenv("HOME", str(directory.parent))
    for where in ("own", "~/own"):
        assert_equal(load("idx", where).train, TRAIN)


def test_labels_from_one(tmp_path):
    """EMNIST's letters: a class that no example has."""
    shifted = [type(part)(part.images, part.labels + 1) for part in (TRAIN, TEST)]
    dataset = load("idx", write_idx(tmp_path, train=shifted[0], test=shifted[1]))
    assert (dataset.num_classes, dataset.train.labels.min()) == (5, 1)


# What may be wrong.


def rewrite(name, content):
    """Damage that replaces the content of the file `name`."""
    return lambda directory: (directory / name).write_bytes(content)


def remove(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def truncate(directory):
    os.truncate(directory / IMAGES, 500)


def pipe(directory):
    (directory / IMAGES).unlink()
    os.mkfifo(directory / IMAGES)


def zipped(array, code=8, extra=b""):
    return gzip.compress(idx_bytes(array, code) + extra)


def header(*lengths):
    return bytes((0, 0, 8, len(lengths))) + b"".join(length.to_bytes(4, "big") for length in lengths)


DAMAGE = {
    "missing": (remove(IMAGES), IMAGES.removesuffix(".gz"), "got no such file"),
    "half_a_test_split": (remove("t10k-labels-idx1-ubyte.gz"), "t10k-labels-idx1-ubyte", "got no such file"),
    "twice": (rewrite(IMAGES.removesuffix(".gz"), b""), "", f"got {IMAGES.removesuffix('.gz')} and {IMAGES}; expected"),
    "empty": (rewrite(IMAGES, b""), IMAGES, "got Not a gzipped file"),
    "truncated": (truncate, IMAGES, "ended before the end-of-stream"),
    "pipe": (pipe, IMAGES, "got A pipe or a device"),
    "no_idx": (rewrite(IMAGES, gzip.compress(b"images")), IMAGES, "got no header of IDX"),
    "half_a_header": (rewrite(IMAGES, gzip.compress(header(40, 8, 9)[:-1])), IMAGES, "got a part of a header"),
    "floats": (rewrite(IMAGES, zipped(TRAIN.images, code=0x0D)), IMAGES, "got values of the type 0x0d, not 0x08"),
    "shorter": (rewrite(IMAGES, gzip.compress(header(40, 8, 9))), IMAGES, r"got 16 bytes; its header, 40 x 8 x 9, "),
    "longer": (rewrite(IMAGES, zipped(TRAIN.images, extra=b"0")), IMAGES, "got more bytes than its header, 40 x 8 x 9"),
    "appended": (rewrite(IMAGES, zipped(TRAIN.images) + b"0"), IMAGES, "got more bytes than its header"),
    "flat": (
        rewrite(IMAGES, zipped(TRAIN.images[:, 0])),
        IMAGES,
        r"got an array of shape \(40, 9\); expect",
    ),
    "no_images": (rewrite(IMAGES, zipped(TRAIN.images[:0])), IMAGES, r"got an array of shape \(0, 8, 9\)"),
    "fewer_labels": (rewrite(LABELS, zipped(TRAIN.labels[1:])), LABELS, r"shape \(39,\); expected 40 integers, one"),
    "images_as_labels": (rewrite(LABELS, zipped(TRAIN.images)), LABELS, r"uint8 of shape \(40, 8, 9\); expected 40"),
    "one_class": (rewrite(LABELS, zipped(0 * TRAIN.labels + 3)), LABELS, "got the one label 3 in all 40 examples"),
    "sparse_labels": (rewrite(LABELS, zipped(TRAIN.labels * 20)), LABELS, "got labels up to 60 for 40 examples"),
    "test_labels": (
        rewrite("t10k-labels-idx1-ubyte.gz", zipped(TEST.labels + 2)),
        "t10k-labels-idx1-ubyte.gz",
        "got labels up to 5; expected 0 to 3",
    ),
    "test_size": (
        rewrite("t10k-images-idx3-ubyte.gz", zipped(TEST.images[:, 1:])),
        "t10k-images-idx3-ubyte.gz",
        "got images of 7 x 9, grey; expected 8 x 9, grey, as in",
    ),
    "absurd_header": (
        rewrite(IMAGES, gzip.compress(header(*[2**32 - 1] * 4))),
        IMAGES,
        r"got a header that says .*: 3\.4e\+29 GB, more than 2 GB",
    ),
}


@pytest.mark.parametrize(("damage", "file", "match"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_line_naming_the_file(directory, damage, file, match):
    damage(directory)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(directory / file))}: .*{match}") as error:
        load("idx", directory)
    assert "\n" not in str(error.value)


def test_no_directory(tmp_path):
    with pytest.raises(UsageError, match=rf"^{tmp_path}/none: got No such file or directory; expected a directory"):
        load("idx", tmp_path / "none")
    with pytest.raises(UsageError, match=r"^data\.dir: got ''; expected where the files are, for data\.name=idx"):
        load("idx", "")


def test_larger_than_the_limit(directory):
    num_bytes = 52 * (8 * 9 + 4)
    assert not load("idx", directory, memory_limit=(num_bytes + 1) / 1e9).streamed
    with pytest.raises(UsageError, match=rf"^{directory}: got 0\.01 GB of images; expected .*memory_limit=3\.95e-06"):
        load("idx", directory, memory_limit=(num_bytes - 1) / 1e9)
    with pytest.raises(UsageError, match=r"images.*: got File too large; expected .*memory_limit=1e-06"):
        load("idx", directory, memory_limit=1e-6)


def test_a_bomb_is_not_expanded(directory):
    """A small file that expands to 64 MB of zeros after a header of 40 images."""
    deflate = zlib.compressobj(1, wbits=31)
    parts = [deflate.compress(header(40, 8, 9)), *(deflate.compress(bytes(2**20)) for _ in range(64))]
    (directory / IMAGES).write_bytes(b"".join([*parts, deflate.flush()]))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=f"{IMAGES}: got more bytes than its header, 40 x 8 x 9, says"):
            load("idx", directory)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@given(
    st.one_of(
        st.binary(max_size=40),
        st.builds(bytes.__add__, st.binary(max_size=6).map(b"\0\0\x08".__add__), st.binary(max_size=40)),
        st.builds(lambda lengths, rest: header(*lengths) + rest, st.lists(st.integers(0, 5)), st.binary(max_size=60)),
    ),
    st.booleans(),
    st.integers(0, 60),
    st.integers(0, 255),
)
def test_any_bytes_are_an_array_or_refused(tmp_path_factory, content, compressed, position, bits):
    path = tmp_path_factory.getbasetemp() / ("fuzz.gz" if compressed else "fuzz")
    damaged = bytearray(gzip.compress(content) if compressed else content)
    damaged[position : position + 1] = bytes(byte ^ bits for byte in damaged[position : position + 1])
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        array = idx.parse(idx.read(path, 1e6))
        assert array.tobytes() == (content if compressed else damaged)[4 + 4 * array.ndim :]
    except ValueError:
        pass
    finally:
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()
