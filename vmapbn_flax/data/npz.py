"""NumPy's .npz files, with the names of arrays that Keras and MedMNIST use. Nothing is ever unpickled."""

import contextlib
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vmapbn_flax.data.arrays import Dataset
from vmapbn_flax.data.splits import ArrayFile, make_dataset
from vmapbn_flax.errors import UsageError, first_line

_NAMES = (
    {"train": ("train_images", "train_labels"), "test": ("test_images", "test_labels")},
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
)
_IMAGES = ("images", "test_images", "x_test")  # of an archive with several arrays
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those of NumPy; the others expand without a bound


def load(path: Path, test_fraction: float, max_bytes: float) -> Dataset:
    """The data set in the file `path`, or in the only .npz file of the directory `path`.

    The arrays are `train_images`, `train_labels`, `test_images`, `test_labels`, or Keras's `x_train`, `y_train`,
    `x_test`, `y_test`. Further arrays are left alone. Without the two of the test split, a share of the training
    examples is the test split.

    Raises:
      UsageError: the file is missing or damaged, lacks an array, or holds anything but images with one label each;
        or see `make_dataset`.
    """
    file = _find(path)
    with _damage(file, "a whole .npz file, as numpy.savez writes it"), zipfile.ZipFile(file) as archive:
        names = _names(file, {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")})
        train, *rest = (
            tuple(ArrayFile(f"{file}, {name}", _read(archive, name, max_bytes)) for name in pair) for pair in names
        )
    return make_dataset(path, train, rest[0] if rest else None, test_fraction, max_bytes)  # type: ignore[arg-type]


def read_array(path: Path, max_bytes: float) -> np.ndarray:
    """The array of a .npy file; of a .npz file the only one, or that called images, test_images or x_test.

    Raises:
      UsageError: the file cannot be read, or is not of this kind, or larger than `max_bytes`.
    """
    with _damage(path, "a whole file, as numpy.save or numpy.savez writes it"):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _parse(file, path.name, path.stat().st_size, max_bytes)
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            chosen = names if len(names) == 1 else [name for name in _IMAGES if name in names]
            if not chosen:
                raise UsageError(
                    f"{path}: got the arrays {', '.join(names[:8]) or 'none'}; expected a single one, or one called "
                    f"{' or '.join(_IMAGES)}. Write that alone."
                )
            return _read(archive, chosen[0], max_bytes)


@contextlib.contextmanager
def _damage(path: Path, expected: str) -> Iterator[None]:
    """Turns what a damaged file raises, which may be anything, into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        got = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"{path}: got {got}; expected {expected}. Write it again.") from None


def _find(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        files = sorted(file for file in path.iterdir() if file.suffix == ".npz")
    except OSError as error:
        raise UsageError(
            f"{path}: got {error.strerror}; expected a .npz file, or a directory with one. Correct data.dir."
        ) from None
    if len(files) != 1 or not files[0].is_file():
        got = ", ".join(file.name for file in files[:3]) or "no .npz file"
        raise UsageError(f"{path}: got {got}; expected one .npz file. Name the file itself as data.dir.")
    return files[0]


def _names(file: Path, there: set[str]) -> list[tuple[str, str]]:
    """The names of images and labels, of the training split and, where it is there, of the test split."""
    for names in _NAMES:
        if there.intersection(names["train"]):
            pairs = [pair for split, pair in names.items() if split == "train" or there.intersection(pair)]
            for name in (name for pair in pairs for name in pair):
                if name not in there:
                    raise UsageError(f"{file}: got no array {name}; expected one beside the others. Write it again.")
            return pairs
    got = ", ".join(sorted(there)[:8]) or "none"
    raise UsageError(
        f"{file}: got the arrays {got}; expected train_images, train_labels, test_images and test_labels, or x_train, "
        f"y_train, x_test and y_test. Rename them."
    )


def _read(archive: zipfile.ZipFile, name: str, max_bytes: float) -> np.ndarray:
    """One array, of at most `max_bytes`."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in _METHODS:
        raise ValueError(f"{name} compressed in another way than numpy.savez_compressed does")
    with archive.open(info) as member:
        return _parse(member, name, info.file_size, max_bytes)


def _parse(file: Any, name: str, size: int, max_bytes: float) -> np.ndarray:
    """The array in an open file of `size` bytes in NumPy's .npy format."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy repairs some headers, and says so
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} in another version of the format than arrays of numbers have")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} with values of the type {dtype}, not numbers")
    num_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or num_bytes != size - file.tell():
        raise ValueError(f"{name} of the shape {_short(shape)}, in {size:,} bytes")
    if num_bytes > max_bytes:
        raise ValueError(f"{name} of {num_bytes / 1e9:.3g} GB, more than data.memory_limit={max_bytes / 1e9:.3g} GB")
    array = np.frombuffer(file.read(num_bytes), dtype)
    if fortran_order:
        return np.ascontiguousarray(array.reshape(shape[::-1]).transpose())
    return array.reshape(shape)


def _short(shape: tuple[int, ...]) -> str:
    return str(shape)[:60]
