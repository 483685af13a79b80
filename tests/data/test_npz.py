"""Data sets in .npz files, and what may be wrong with one: one line that names the file and the array."""

import io
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.own import assert_equal, examples, load
from vmapbn_flax.data import npz
from vmapbn_flax.errors import UsageError

TRAIN, TEST = examples(40, seed=1), examples(12, seed=2)
ARRAYS = {
    "train_images": TRAIN.images,
    "train_labels": TRAIN.labels,
    "test_images": TEST.images,
    "test_labels": TEST.labels,
}
KERAS = dict(zip(("x_train", "y_train", "x_test", "y_test"), ARRAYS.values(), strict=True))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "own.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("arrays", [ARRAYS, KERAS], ids=["mnist", "keras"])
def test_reads_back_identical(file, arrays, save):
    save(file, **arrays, val_images=np.array([None], dtype=object))  # an array that nobody reads
    for where in (file, file.parent):
        dataset = load("npz", where, validation_size=10)
        assert (dataset.name, dataset.num_classes, dataset.class_names) == (str(where), 4, ("0", "1", "2", "3"))
        assert_equal(dataset.train, TRAIN[:-10])
        assert_equal(dataset.validation, TRAIN[-10:])
        assert_equal(dataset.test, TEST)


def test_other_layouts_of_the_same_numbers(file):
    """A last axis of one channel, columns first, labels of another type and with an axis of their own."""
    changed = {"train_images": TRAIN.images[..., None], "train_labels": TRAIN.labels[:, None].astype(">u2")}
    np.savez(file, **ARRAYS | changed | {"test_images": np.asfortranarray(TEST.images)})
    dataset = load("npz", file)
    assert_equal(dataset.train, TRAIN)
    assert_equal(dataset.test, TEST)
    assert dataset.test.images.flags.c_contiguous


def test_colour(file):
    train, test = examples(40, seed=1, shape=(8, 9, 3)), examples(12, seed=2, shape=(8, 9, 3))
    np.savez(file, x_train=train.images, y_train=train.labels, x_test=test.images, y_test=test.labels)
    assert_equal(load("npz", file).train, train)


# Holding out.


def test_held_out_of_each_class(file):
    labels = np.repeat([0, 1, 2, 3], [40, 20, 2, 1]).astype(np.int32)
    images = np.arange(63, dtype=np.uint8)[:, None, None] + np.zeros((2, 3), np.uint8)
    np.savez(file, x_train=images, y_train=labels)
    dataset = load("npz", file, test_fraction=0.1)
    assert np.bincount(dataset.test.labels).tolist() == [4, 2, 1]
    assert np.bincount(dataset.train.labels).tolist() == [36, 18, 1, 1]
    # The same in every version of NumPy.
    assert dataset.test.images[:, 0, 0].tolist() == [3, 11, 13, 20, 53, 59, 61]
    together = np.concatenate([dataset.train.images, dataset.test.images])[:, 0, 0]
    assert sorted(together.tolist()) == list(range(63))
    for split in (dataset.train, dataset.test):
        assert (np.diff(split.images[:, 0, 0].astype(int)) > 0).all()
        np.testing.assert_array_equal(split.labels, labels[split.images[:, 0, 0]])


@pytest.mark.parametrize(
    ("arrays", "fraction", "match"),
    [
        (ARRAYS, 0.1, r"^data\.test_fraction: got 0\.1; expected 0, for {file} has a test split\. Leave"),
        ({k: ARRAYS[k] for k in ("train_images", "train_labels")}, 0.0, r"^{file}: got no test split; expected one, "),
        ({"x_train": TRAIN.images[:4], "y_train": TRAIN.labels[:4]}, 0.5, r"^{file}, y_train: got one example of each"),
    ],
    ids=["both", "neither", "one_each"],
)
def test_held_out_or_a_test_split(file, arrays, fraction, match):
    np.savez(file, **arrays)
    with pytest.raises(UsageError, match=match.format(file=re.escape(str(file)))):
        load("npz", file, test_fraction=fraction)


def test_the_bundled_set_has_a_test_split():
    with pytest.raises(UsageError, match=r"^data\.test_fraction: got 0\.1; expected 0, for mnist has a test split"):
        load("mnist", "", test_fraction=0.1)


# What may be wrong.


class Payload:
    """Says so if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def npy(header, values=b"", version=b"\x01\x00"):
    """The bytes of an array that claims `header`."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + values


def claimed(shape, descr="|u1", values=b""):
    return npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}", values)


def archive(method=zipfile.ZIP_DEFLATED, **members):
    """A file of `ARRAYS` with some members replaced by other bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, array in ARRAYS.items():
            content = io.BytesIO()
            np.save(content, array)
            file.writestr(f"{name}.npy", members.get(name, content.getvalue()))
    return buffer.getvalue()


def saved(**changed):
    buffer = io.BytesIO()
    np.savez(buffer, **ARRAYS | changed)
    return buffer.getvalue()


def flipped():
    content = bytearray(saved())
    content[content.index(TRAIN.images.tobytes()) + 100] ^= 1
    return bytes(content)


DAMAGE = {
    "empty": (b"", "", "got File is not a zip file; expected a whole .npz file"),
    "truncated": (archive()[:-100], "", "got File is not a zip file"),
    "flipped": (flipped(), "", "got Bad CRC-32 for file 'train_images.npy'"),
    "bzip2": (archive(zipfile.ZIP_BZIP2), "", "got train_images compressed in another way"),
    "pickle": (saved(train_labels=np.array([Payload()] * 40)), "", "got train_labels with values of the type object"),
    "strings": (saved(train_labels=np.array(["cat"] * 40)), "", "got train_labels with values of the type <U3, not"),
    "no_npy": (archive(train_images=b"images"), "", "got "),
    "code": (archive(train_images=npy("__import__('os').abort()")), "", "got "),
    "deep": (archive(train_images=npy("(" * 5000)), "", "got "),
    "version": (archive(train_images=npy("{}", version=b"\x02\x00")), "", "got train_images in another version"),
    "absurd": (archive(train_images=claimed("(1000000000000, 8, 9)")), "", r"got train_images of the shape \(10000000"),
    "negative": (archive(train_images=claimed("(-1, -1)", values=b"1")), "", r"got train_images of the shape \(-1, -1"),
    "no_test_labels": (
        archive().replace(b"test_labels", b"best_labels"),
        "",
        "got no array test_labels; expected one beside",
    ),
    "other_names": (
        saved().replace(b"train", b"brain"),
        "",
        "got the arrays .*brain_images.*; expected train_ima",
    ),
    "floats": (saved(train_images=TRAIN.images / 255), ", train_images", "got images in float64; expected .* uint8"),
    "channels_first": (
        saved(train_images=np.zeros((40, 1, 8, 9), np.uint8)),
        ", train_images",
        r"got an array of shape \(40, 1, 8, 9\); expected .* at most 4 channels",
    ),
    "negative_labels": (saved(train_labels=-TRAIN.labels), ", train_labels", "got labels from -3 to 0; expected"),
    "huge_labels": (
        saved(train_labels=TRAIN.labels.astype(np.uint64) << 60),
        ", train_labels",
        "got labels from 0 to 3458764513820540928",
    ),
    "one_hot": (saved(train_labels=np.eye(4)[TRAIN.labels]), ", train_labels", r"got float64 of shape \(40, 4\)"),
    "test_kind": (
        saved(test_images=np.zeros((12, 8, 9, 3), np.uint8)),
        ", test_images",
        "got images of 8 x 9, colour; expected 8 x 9, grey",
    ),
    "test_labels": (saved(test_labels=TEST.labels * 2), ", test_labels", "got labels up to 6; expected 0 to 3"),
}


@pytest.mark.parametrize(("content", "array", "match"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_line_naming_the_file(file, content, array, match):
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(file))}{array}: .*{match}") as error:
        load("npz", file)
    assert "\n" not in str(error.value)


def test_where_no_file_is(tmp_path):
    with pytest.raises(UsageError, match=rf"^{tmp_path}: got no \.npz file; expected one \.npz file"):
        load("npz", tmp_path)
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=rf"^{tmp_path}: got a\.npz, b\.npz; expected one"):
        load("npz", tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UsageError, match=rf"^{tmp_path}/pipe\.npz: got Not a directory; expected a \.npz file"):
        load("npz", tmp_path / "pipe.npz")


def test_a_bomb_is_not_expanded(file):
    """A small file with an array of 64 MB, where 10 are allowed."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2**20, 8, 8), np.uint8))
    file.write_bytes(archive(train_images=buffer.getvalue()))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"got train_images of 0\.0671 GB, more than data\.memory_limit=0\.01 GB"):
            load("npz", file, memory_limit=0.01)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


WHOLE = archive(zipfile.ZIP_STORED)


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), max_size=4),
    st.one_of(st.just(len(WHOLE)), st.integers(0, len(WHOLE))),
)
def test_any_bytes_are_a_data_set_or_refused(tmp_path_factory, changes, length):
    file = tmp_path_factory.getbasetemp() / "fuzz.npz"
    content = bytearray(WHOLE)
    for position, bits in changes:
        content[position] ^= bits
    file.write_bytes(content[:length])
    check(file)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(npy),
        st.builds(
            lambda shape, descr, values: claimed(shape, descr, values),
            st.lists(st.integers(-(2**70), 2**70), max_size=5).map(tuple),
            st.sampled_from(["|u1", "<i8", "|O", "<f4", "|V9", "|S0", "M8[ns]"]),
            st.binary(max_size=20),
        ),
    )
)
def test_any_array_is_a_data_set_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.npz"
    file.write_bytes(archive(train_labels=content))
    check(file)


def check(file):
    tracemalloc.start()
    try:
        dataset = npz.load(file, 0.0, 1e6)
        assert (len(dataset.train), len(dataset.test)) == (40, 12)
    except UsageError as error:
        message = str(error)
    else:
        message = str(file)
    finally:
        assert tracemalloc.get_traced_memory()[1] < 3e6
        tracemalloc.stop()
    assert str(file) in message
    assert "\n" not in message
