import errno
import io
import os
import pwd
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.helpers.prepare import DIGITS, as_examples, png, prepare
from vmapbn_flax import default_config
from vmapbn_flax.data import Split, arrays, load_dataset
from vmapbn_flax.errors import UsageError


def load(name, root="", **fields):
    """The data set `name` in the directory `root`, with `fields` of `config.data`."""
    data = default_config().data
    data.update(name=name, dir=str(root), **fields)
    return load_dataset(data)


@pytest.fixture(scope="module")
def digits():
    """The first of the bundled images."""
    mnist = load("mnist")
    return {"train": mnist.train[:100], "test": mnist.test[:20]}


@pytest.fixture(scope="module")
def original(digits, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"), {split: as_examples(digits[split]) for split in digits})


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tfds")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The directory of the caches, empty at first, on a machine without a network."""

    def connect(*_):
        raise AssertionError("the program downloads nothing")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(arrays, "_BLOCK", 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path / "cache" / "vmapbn_flax"


def assert_equal(dataset, digits):
    for split, expected in digits.items():
        got = getattr(dataset, split)
        assert (got.images.dtype, got.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(got.images, expected.images)
        np.testing.assert_array_equal(got.labels, expected.labels)


def only_file(directory):
    (file,) = directory.iterdir()
    return file


def zero_shards(directory, keep_times):
    """Same names, same sizes and, with `keep_times`, same times: but nothing left to decode."""
    for shard in directory.glob("*array_record*"):
        stat = shard.stat()
        shard.write_bytes(bytes(stat.st_size))
        if keep_times:
            os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fails(name, root, match):
    """Checks that loading ends in one line that matches."""
    with pytest.raises(UsageError, match=match) as error:
        load(name, root)
    assert "\n" not in str(error.value)


def test_reads_back_identical(root, digits):
    dataset = load("digits", root, validation_size=10)
    assert (dataset.name, dataset.num_classes) == ("digits", 10)
    assert_equal(
        dataset,
        {"train": digits["train"][:-10], "validation": digits["train"][-10:], "test": digits["test"]},
    )
    assert "tensorflow" not in sys.modules


def test_second_read_is_the_cache(root, digits, caches):
    load("digits", root)
    assert only_file(caches).suffix == ".npz"
    zero_shards(root / "digits/1.0.0", keep_times=True)
    assert_equal(load("digits", root), digits)


def test_a_changed_file_makes_the_cache_stale(root, caches):
    load("digits", root)
    zero_shards(root / "digits/1.0.0", keep_times=False)
    fails("digits", root, rf"^{root}/digits/1.0.0: got .+; expected a complete data set. If .+: pip install ")


def test_prepared_anew_replaces_the_cache(root, digits, caches):
    load("digits", root)
    shutil.rmtree(root)
    half = {split: part[: len(part) // 2] for split, part in digits.items()}
    prepare(root, {split: as_examples(part) for split, part in half.items()})
    assert_equal(load("digits", root), half)
    assert only_file(caches)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1000]),
        lambda file: file.write_bytes(b"PK" + bytes(1000)),
        lambda file: np.savez(file, identity=np.array([None], dtype=object)),
        lambda file: np.savez(file, other=np.zeros(3)),
        lambda file: np.savez_compressed(file, **dict(np.load(file)) | {"train_images": np.zeros((10**5, 28, 28))}),
    ],
    ids=["flipped", "empty", "truncated", "garbage", "pickle", "other_arrays", "bomb"],
)
def test_a_damaged_cache_is_made_again(root, digits, caches, caplog, damage):
    load("digits", root)
    cache = only_file(caches)
    whole = cache.read_bytes()
    damage(cache)
    assert_equal(load("digits", root), digits)
    assert f"{cache}: got" in caplog.text
    assert len(whole) == len(cache.read_bytes())
    zero_shards(root / "digits/1.0.0", keep_times=True)
    assert_equal(load("digits", root), digits)


def test_no_place_for_a_cache(root, digits, caches, caplog):
    caches.parent.write_text("a file where a directory should be")
    assert_equal(load("digits", root), digits)
    assert "decoded at every start" in caplog.text


def test_no_part_of_a_cache_is_left(root, digits, caches, caplog, monkeypatch):
    def full_disk(file, **arrays):
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full_disk)
    assert_equal(load("digits", root), digits)
    assert list(caches.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_a_flipped_bit_never_comes_out_as_data(root, digits):
    shard = root / "digits/1.0.0/digits-train.array_record-00000-of-00001"
    content = shard.read_bytes()
    refused = 0
    for position in np.linspace(0, len(content) - 1, 20, dtype=int):
        damaged = bytearray(content)
        damaged[position] ^= 1
        shard.write_bytes(damaged)
        try:
            assert_equal(load("digits", root), digits)  # the bit was padding
        except UsageError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: shard.unlink(),
        lambda shard: shard.write_bytes(b""),
        lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
        lambda shard: shutil.copy(str(shard).replace("train", "test"), shard),
    ],
    ids=["missing", "empty", "truncated", "fewer_examples"],
)
def test_damaged_shard(root, damage):
    directory = root / "digits/1.0.0"
    damage(directory / "digits-train.array_record-00000-of-00001")
    fails("digits", root, rf"^{directory}: got .+; expected a complete data set. If .+: pip install .+$")


def test_link_to_nowhere(root):
    link = root / "digits/1.0.0/digits-train.array_record-00000-of-00001"
    link.unlink()
    link.symlink_to("nowhere")
    fails("digits", root, rf"^{link}: got No such file or directory; expected a readable file")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[", None], ids=["empty", "object", "torn", "missing"])
def test_damaged_description(root, file, content):
    path = root / "digits/1.0.0" / file
    path.unlink() if content is None else path.write_bytes(content)
    fails("digits", root, rf"^{root}/digits/1.0.0: got ")


@pytest.mark.parametrize("name", ["digits", "digits:1.0.0", "digits:1.*.*", "digits:*.*.*"])
def test_version_in_the_name(root, digits, name):
    assert_equal(load(name, root), digits)


def test_newest_version_by_number(root, digits):
    folder = root / "digits"
    (folder / "1.0.0").rename(folder / "1.10.0")
    for name in ("1.9.0", "1.10.0.incomplete.ABC", "notes"):
        (folder / name).mkdir()
    assert_equal(load("digits", root), digits)
    assert_equal(load("digits:1.10.*", root), digits)
    fails("digits:2.0.0", root, rf"got 'digits:2.0.0'; expected what is prepared in {folder}: 1.10.0, 1.9.0\.")


def test_config_in_the_name(root, digits):
    folder = root / "digits"
    (folder / "small+v1.0").mkdir()
    (folder / "1.0.0").rename(folder / "small+v1.0/1.0.0")
    assert_equal(load("digits/small+v1.0", root), digits)
    assert_equal(load("digits/small+v1.0:1.0.0", root), digits)
    fails("digits", root, r"expected what is prepared in .*: digits/small\+v1\.0\. Name one of them")


@pytest.mark.parametrize("set_by", ["environment", "home"])
def test_default_directory(root, digits, monkeypatch, set_by):
    if set_by == "environment":
        monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    else:
        monkeypatch.setenv("HOME", str(root.parent))
        root.rename(root.parent / "tensorflow_datasets")
    assert_equal(load("digits"), digits)


@pytest.fixture
def homeless(monkeypatch):
    """Neither the environment nor the list of users knows a home."""

    def getpwuid(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


def test_no_home_for_the_cache(root, digits, homeless, caplog):
    assert_equal(load("digits", root), digits)
    assert "decoded at every start" in caplog.text


def test_no_home_for_the_data(homeless):
    fails("digits", "", "^data.dir: got ~/tensorflow_datasets, a home that is not known here; expected a directory")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_while_images_are_decoded(root, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    load("digits", root)
    assert re.search(r"digits: decoding: 100%.* 120/120 ", sys.stderr.getvalue())
    monkeypatch.setattr(sys, "stderr", Terminal())
    load("digits", root)
    assert sys.stderr.getvalue() == ""  # from the cache


def test_not_prepared(tmp_path):
    command = (
        f"pip install -e '.[tensorflow]' && tfds build fashion_mnist --file_format=array_record --data_dir={tmp_path}"
    )
    expected = f"got 'fashion_mnist'; .*{tmp_path}/fashion_mnist holds none. Prepare it: {re.escape(command)}$"
    fails("fashion_mnist", tmp_path, expected)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("mnits", "Did you mean 'mnist'?"),
        ("FashionMNIST", "Did you mean 'fashion_mnist'?"),
        ("folders", "Did you mean 'folder'?"),
        ("zzzzzz", "Correct data.name"),
    ],
)
def test_unknown_name(tmp_path, name, suggestion):
    fails(name, tmp_path, f"tensorflow-datasets knows no '{name}'. {re.escape(suggestion)}")


@pytest.mark.parametrize("name", ["", "..", "../digits", "digits/..:1.0.0", "digits:1", "a b", "digits/", "digits\n"])
def test_malformed_name(root, name):
    fails(name, root, "^data.name: got .*; expected 'mnist' or .* Write name, ")


SMALL = [{"image": png(np.full((28, 28), 7, np.uint8)), "label": 3}] * 3


def features(**changed):
    return tfds.features.FeaturesDict({**DIGITS, **changed})


@pytest.mark.parametrize(
    ("examples", "feature_dict", "match"),
    [
        (
            {"train": SMALL, "test": SMALL},
            features(image=tfds.features.Image(shape=(None, None, 1))),
            r"got features image: Image \(None, None, 1\) uint8, label: ClassLabel of 10 classes; expected",
        ),
        (
            {"train": SMALL, "test": SMALL},
            features(label=tfds.features.Scalar(np.int64)),
            r"got features .*label: Scalar; expected",
        ),
        (
            {"train": [{"image": SMALL[0]["image"]}], "test": [{"image": SMALL[0]["image"]}]},
            tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(28, 28, 1))}),
            r"got features image: Image \(28, 28, 1\) uint8; expected",
        ),
        (
            {"train": SMALL, "validation": SMALL},
            DIGITS,
            r"got the splits train \(3 examples\), validation \(3 examples\); expected examples in train and test",
        ),
        (
            {"train": SMALL, "test": [{**SMALL[0], "label": -1}]},
            DIGITS,
            r"got labels from -1 to -1 in the test split; expected 0 to 9\.",
        ),
    ],
    ids=["sizes_vary", "number_label", "no_label", "no_test", "hidden_labels"],
)
def test_another_kind_of_data(tmp_path, examples, feature_dict, match):
    fails("digits", prepare(tmp_path / "tfds", examples, feature_dict), f"^{tmp_path}/tfds/digits/1.0.0: {match}")


@pytest.mark.parametrize("file_format", ["tfrecord", "parquet"])
def test_another_format(root, file_format):
    info = root / "digits/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', f'"{file_format}"'))
    fails("digits", root, f"got files in the format {file_format}; expected array_record. Remove .*: pip install ")


def test_further_features_are_left_alone(tmp_path):
    more = features(
        id=tfds.features.Text(),
        boxes=tfds.features.Sequence({"box": tfds.features.BBoxFeature()}),
        depth=tfds.features.Image(shape=(None, None, 1)),
    )
    image = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
    example = {"image": png(image), "label": 3, "id": "x", "boxes": [], "depth": SMALL[0]["image"]}
    more = tfds.features.FeaturesDict({**more, "image": tfds.features.Image(shape=(28, 28, 3))})
    root = prepare(tmp_path / "tfds", {"train": [example] * 2, "test": [example]}, more)
    expected = Split(np.stack([image] * 2), np.array([3, 3], np.int32))
    assert_equal(load("digits", root), {"train": expected, "test": expected[:1]})


def test_names_of_the_classes(tmp_path):
    names = features(label=tfds.features.ClassLabel(names=["cat", "dog", "big eel", "fox"]))
    root = prepare(tmp_path / "tfds", {"train": SMALL, "test": SMALL}, names)
    for limit in (1.0, 1.0, TINY):  # decoded, from the cache, streamed
        assert load("digits", root, memory_limit=limit).class_names == ("cat", "dog", "big eel", "fox")
    (root / "digits/1.0.0/label.labels.txt").unlink()
    assert load("digits", root).class_names == ("0", "1", "2", "3")


# Larger than the memory it may take.

TINY = 1e-9  # GB


def test_larger_than_the_limit_is_read_by_number(root, digits, caches):
    whole = load("digits", root, validation_size=10)
    shutil.rmtree(caches)
    streamed = load("digits", root, validation_size=10, memory_limit=TINY)
    assert (streamed.streamed, whole.streamed) == (True, False)
    assert (streamed.name, streamed.num_classes, streamed.nbytes) == ("digits", 10, whole.nbytes)
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        got, expected = getattr(streamed, split), getattr(whole, split)
        assert (len(got), got.image_shape) == (len(expected), (28, 28))
        assert got.nbytes == expected.nbytes == expected.images.nbytes + expected.labels.nbytes
        rows = rng.integers(0, len(got), 50)
        read = got.read(rows)
        np.testing.assert_array_equal(read.images, expected.images[rows])
        np.testing.assert_array_equal(read.labels, expected.labels[rows])
    assert not caches.exists()
    assert "tensorflow" not in sys.modules


def test_the_limit_itself_fits(root, digits):
    num_bytes = 120 * (28 * 28 + 4)
    assert not load("digits", root, memory_limit=num_bytes / 1e9).streamed
    assert load("digits", root, memory_limit=(num_bytes - 1) / 1e9).streamed  # nor is the cache loaded
    assert_equal(load("digits", root, memory_limit=num_bytes / 1e9), digits)


def test_bundled_may_be_streamed():
    mnist = load("mnist", validation_size=5, memory_limit=0.055)
    assert mnist.streamed
    assert not load("mnist", validation_size=5, memory_limit=0.056).streamed
    np.testing.assert_array_equal(mnist.validation.read(np.array([4, 0])).images, mnist.validation.images[[4, 0]])


def test_blocks_are_gathered(root, digits):
    train = load("digits", root, memory_limit=TINY).train
    rows = np.arange(99, 9, -1)  # in blocks of 32
    blank = np.full(3, -1)
    got = arrays.gather(train, np.concatenate([blank, rows, blank]))
    np.testing.assert_array_equal(got.images[3:-3], digits["train"].images[rows])
    np.testing.assert_array_equal(got.labels[3:-3], digits["train"].labels[rows])
    for end in (slice(3), slice(-3, None)):
        assert not got.images[end].any()
        assert not got.labels[end].any()
    answers = iter([False, True])
    got = arrays.gather(train, rows, stopped=lambda: next(answers))
    np.testing.assert_array_equal(got.images[:32], digits["train"].images[rows[:32]])
    assert not got.images[32:].any()


def test_damage_is_found_when_it_is_read(root):
    train = load("digits", root, memory_limit=TINY).train  # without having read an example
    zero_shards(root / "digits/1.0.0", keep_times=True)
    with pytest.raises(UsageError, match=rf"^{root}/digits/1.0.0: got .+; expected a complete data set\. If .+: pip"):
        train.read(np.array([0]))


@pytest.mark.parametrize("memory_limit", [TINY, 1.0], ids=["streamed", "in_memory"])
@pytest.mark.parametrize(
    ("example", "match"),
    [
        ({**SMALL[0], "label": -1}, r"labels from -1 to 3 in the train split; expected 0 to 9\."),
        (
            {"image": png(np.zeros((14, 28), np.uint8)), "label": 3},
            r"an image of shape \(14, 28, 1\), not \(28, 28, 1\)",
        ),
        ({"image": png(np.zeros((1, 1), np.uint8)), "label": 3}, r"an image of shape \(1, 1, 1\), not \(28, 28, 1\)"),
    ],
    ids=["label", "shape", "broadcastable_shape"],
)
def test_examples_are_checked_as_they_are_read(tmp_path, memory_limit, example, match):
    root = prepare(tmp_path / "tfds", {"train": [SMALL[0], example], "test": SMALL})
    with pytest.raises(UsageError, match=f"^{root}/digits/1.0.0: got .*{match}"):
        arrays.gather(load("digits", root, memory_limit=memory_limit).train, np.array([0, 1]))
    if memory_limit == TINY:
        assert load("digits", root, memory_limit=TINY).train.read(np.array([0])).labels == 3
