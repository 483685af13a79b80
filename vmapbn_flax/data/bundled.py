"""MNIST as it was published: four gzipped IDX files, which are a part of the package."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vmapbn_flax.data import idx
from vmapbn_flax.data.arrays import Dataset, Split, expanded
from vmapbn_flax.errors import UsageError

NAME = "mnist"

_BUNDLED = Path(__file__).parent / "mnist"
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MOST_BYTES = 64e6  # of one file; the largest has 47 million

_ahead: dict[str, Future[Dataset]] = {}


def read_ahead(data_dir: str = "") -> None:
    """Starts reading what `load(data_dir)` will return, in a thread, which imports nothing."""
    pool = ThreadPoolExecutor(1)
    _ahead[data_dir] = pool.submit(_load, data_dir)
    pool.shutdown(wait=False)


def load(data_dir: str = "") -> Dataset:
    """MNIST from the package, or from the same four files in `data_dir`. Its arrays are read-only.

    Raises:
      UsageError: a file is missing, unreadable, or not the original.
    """
    return _ahead.pop(data_dir).result() if data_dir in _ahead else _load(data_dir)


def _load(data_dir: str) -> Dataset:
    return read_mnist(expanded(data_dir) if data_dir else _BUNDLED)


def read_mnist(directory: Path, sums: Path = _BUNDLED / "SHA256") -> Dataset:
    """MNIST from the four files in `directory`, whose contents must have the SHA-256 listed in `sums`."""
    expected = _read_sums(sums)

    def read(file: str) -> np.ndarray:
        return _read_idx(directory / f"{file}.gz", expected[file])

    # Threads help: zlib and hashlib release the interpreter's lock.
    with ThreadPoolExecutor(len(_FILES)) as pool:
        train_images, train_labels, test_images, test_labels = pool.map(read, _FILES)
    return Dataset(
        name=NAME,
        num_classes=10,
        train=Split(train_images, train_labels.astype(np.int32)),
        test=Split(test_images, test_labels.astype(np.int32)),
    )


def _read_sums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        sums = {file: sum_ for sum_, file in map(str.split, lines)}
    except (OSError, ValueError) as error:
        raise UsageError(_unusable(path, error)) from error
    if missing := set(_FILES) - set(sums):
        raise UsageError(_unusable(path, f"no sum of {min(missing)}"))
    return sums


def _read_idx(path: Path, expected: str) -> np.ndarray:
    try:
        content = idx.read(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(_unusable(path, error)) from error
    if (got := hashlib.sha256(content).hexdigest()) != expected:
        raise UsageError(_unusable(path, f"contents of SHA-256 {got}, not {expected}"))
    return idx.parse(content)


def _unusable(path: Path, got: object) -> str:
    reason = getattr(got, "strerror", None) or got
    if path.parent == _BUNDLED:
        return f"{path}: got {reason}; expected a file of the bundled MNIST. Install vmapbn-flax again."
    return (
        f"{path}: got {reason}; expected an original file of MNIST. "
        f"Put it there, or leave data.dir empty for the bundled one."
    )
