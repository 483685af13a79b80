import gzip
import hashlib
import re
import shutil
import tracemalloc

import numpy as np
import pytest

from vmapbn_flax import default_config
from vmapbn_flax.data import bundled, load_dataset
from vmapbn_flax.errors import UsageError

FILES = sorted(bundled._BUNDLED.glob("*.gz"))


def load(**fields):
    """MNIST with `fields` of `config.data`."""
    data = default_config().data
    data.update(**fields)
    return load_dataset(data)


@pytest.fixture(scope="module")
def mnist():
    return load()


@pytest.fixture
def copy(tmp_path):
    """A directory with the four files, to damage one of."""
    for file in FILES:
        shutil.copy(file, tmp_path)
    return tmp_path


def test_every_published_example(mnist):
    assert (mnist.name, mnist.num_classes, mnist.validation) == ("mnist", 10, None)
    for split, histogram, first, pixels in (
        (mnist.train, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [5, 0, 4, 1, 9], 0.1307),
        (mnist.test, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], [7, 2, 1, 0, 4], 0.1325),
    ):
        assert len(split) == sum(histogram)
        assert split.images.shape == (len(split), 28, 28)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert np.bincount(split.labels).tolist() == histogram
        assert split.labels[:5].tolist() == first
        assert split.images.mean() / 255 == pytest.approx(pixels, abs=5e-5)


def test_pixels_are_where_the_file_has_them(mnist):
    test = mnist.test
    content = gzip.decompress((bundled._BUNDLED / "t10k-images-idx3-ubyte.gz").read_bytes())
    example, row, column = 1234, 14, 13
    assert test.images[example, row, column] == content[16 + (example * 28 + row) * 28 + column] > 0
    assert content[16:] == test.images.tobytes()


@pytest.mark.parametrize("size", [1, 59_999])
def test_validation_is_the_end_of_train(mnist, size):
    parted = load(validation_size=size)
    assert (len(parted.train), len(parted.validation), len(parted.test)) == (60_000 - size, size, 10_000)
    for field in ("images", "labels"):
        parts = [getattr(parted.train, field), getattr(parted.validation, field)]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(mnist.train, field))
        np.testing.assert_array_equal(getattr(parted.test, field), getattr(mnist.test, field))


@pytest.mark.parametrize("size", [-1, 60_000])
def test_impossible_validation_size(size):
    with pytest.raises(UsageError, match=rf"validation_size: got {size}; expected 0 to 59999.*Choose"):
        load(validation_size=size)


def test_own_copy_of_the_files(mnist, copy):
    own = load(dir=str(copy))
    np.testing.assert_array_equal(own.train.images, mnist.train.images)


def test_read_ahead_is_taken_once(mnist, copy):
    """The second time the files are read again, and what is wrong with one is said both times."""
    bundled.read_ahead(str(copy))
    ahead, again = (load(dir=str(copy)) for _ in range(2))
    for dataset in (ahead, again):
        np.testing.assert_array_equal(dataset.train.images, mnist.train.images)
    missing = copy / FILES[0].name
    missing.unlink()
    bundled.read_ahead(str(copy))
    for _ in range(2):
        with pytest.raises(UsageError, match=re.escape(str(missing))):
            load(dir=str(copy))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_directory(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "directory": replace_by_directory,
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "flipped": flip,
    "not_gzip": lambda file: file.write_bytes(gzip.decompress(file.read_bytes())),
    "appended": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "other_contents": lambda file: file.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x07")),
}


@pytest.mark.parametrize(
    ("number", "damage"), [*((0, damage) for damage in DAMAGE), *((number, "flipped") for number in (1, 2, 3))]
)
def test_damage_is_one_line_naming_the_file(copy, number, damage):
    file = copy / FILES[number].name
    DAMAGE[damage](file)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(file))}: got .+; expected .+\. Put") as error:
        load(dir=str(copy))
    assert "\n" not in str(error.value)


def test_a_bomb_is_not_expanded(copy):
    """A small file that expands to 64 MB of zeros after a label."""
    file = copy / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01" + bytes(2**26)))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=f"{file}: got more bytes than its header, 1, says; expected an original"):
            bundled._read_idx(file, "")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped", "garbled"])
def test_damaged_sums(tmp_path, damage):
    sums = tmp_path / "SHA256"
    shutil.copy(bundled._BUNDLED / "SHA256", sums)
    DAMAGE.get(damage, lambda file: file.write_bytes(b"\xff\n"))(sums)
    with pytest.raises(UsageError, match=r"^\S+: got .+ Install|^\S+: got .+ Put"):
        bundled.read_mnist(bundled._BUNDLED, sums)


def test_sums_are_those_of_the_contents():
    listed = bundled._read_sums(bundled._BUNDLED / "SHA256")
    found = {file.stem: hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest() for file in FILES}
    assert listed == found
