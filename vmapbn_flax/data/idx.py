"""IDX, the format in which MNIST, Fashion-MNIST, EMNIST and KMNIST are published: one array a file, gzipped or not.

A file is two zero bytes, the type of the values (8 is uint8), the number of axes, the length of each axis as four
bytes, and the values.
"""

import math
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vmapbn_flax.data.arrays import Dataset
from vmapbn_flax.data.splits import ArrayFile, make_dataset
from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import read_file

_UINT8 = 8
_MOST_AXES = 4
_LENGTHS = 4  # where the lengths of the axes begin
_BEGINNING = 2**16  # bytes of a compressed file, in which the header is
_NAME = re.compile(r".*?(?P<split>train|t10k|test)-(?P<kind>images|labels)[.-]idx\d-ubyte(\.gz)?", re.IGNORECASE)


def load(directory: Path, test_fraction: float, max_bytes: float) -> Dataset:
    """The data set in a directory with the four files of MNIST's format; without the two of the test split, a share
    of the training examples is the test split.

    The files are named `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and `t10k-...` or `test-...`, with or
    without a prefix and `.gz`.

    Raises:
      UsageError: a file is missing, damaged, or not images with one label each; or see `make_dataset`.
    """
    files = _find(directory)
    arrays = _read_all(list(files.values()), max_bytes)
    named = {key: ArrayFile(str(path), array) for (key, path), array in zip(files.items(), arrays, strict=True)}
    test = (named["test", "images"], named["test", "labels"]) if ("test", "images") in named else None
    train = (named["train", "images"], named["train", "labels"])
    return make_dataset(directory, train, test, test_fraction, max_bytes)


def read(path: Path, max_bytes: float) -> bytes:
    """The content of an IDX file, decompressed if the name of the file ends in `.gz`.

    Allocates little more than the values that the header declares, and than `max_bytes`.

    Raises:
      OSError: the file cannot be read, or is larger than `max_bytes`.
      ValueError: it is not an IDX file of uint8, is longer or shorter than its header says, or expands to more than
        `max_bytes`.
    """
    data = read_file(path, max_bytes)
    return _decompress(data, max_bytes) if path.suffix.lower() == ".gz" else _checked(data, max_bytes)


def parse(content: bytes) -> UInt8[np.ndarray, "..."]:
    """The array in the content of an IDX file. It is read-only."""
    shape = _shape(content)
    return np.frombuffer(content, np.uint8, offset=_LENGTHS + 4 * len(shape)).reshape(shape)


def _checked(content: bytes, max_bytes: float) -> bytes:
    shape = _shape(content)
    if len(content) != (expected := _num_bytes(shape, max_bytes)):
        raise ValueError(f"{len(content):,} bytes; its header, {_described(shape)}, says {expected:,}")
    return content


def _decompress(data: bytes, max_bytes: float) -> bytes:
    if data[:2] != b"\x1f\x8b":
        raise ValueError("Not a gzipped file")
    header, gzip = (zlib.decompressobj(16 + zlib.MAX_WBITS) for _ in range(2))
    try:
        shape = _shape(header.decompress(data[:_BEGINNING], _LENGTHS + 4 * _MOST_AXES))
        expected = _num_bytes(shape, max_bytes)
        content = gzip.decompress(data, expected + 1)  # one more, to see that the stream ends
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(content) > expected or gzip.unused_data:
        raise ValueError(f"more bytes than its header, {_described(shape)}, says")
    if not gzip.eof:
        raise ValueError("a file that ended before the end-of-stream marker")
    return _checked(content, max_bytes)


def _shape(content: bytes) -> tuple[int, ...]:
    if len(content) < _LENGTHS or content[:2] != b"\0\0" or not 1 <= (num_axes := content[3]) <= _MOST_AXES:
        raise ValueError("no header of IDX")
    if content[2] != _UINT8:
        raise ValueError(f"values of the type 0x{content[2]:02x}, not 0x{_UINT8:02x}, unsigned bytes")
    if len(content) < _LENGTHS + 4 * num_axes:
        raise ValueError("a part of a header")
    return tuple(np.frombuffer(content, ">u4", num_axes, offset=_LENGTHS).tolist())


def _num_bytes(shape: tuple[int, ...], max_bytes: float) -> int:
    """Of the whole content of a file."""
    if (num_values := math.prod(shape)) > max_bytes:
        gigabytes = f"{num_values / 1e9:.3g} GB, more than {max_bytes / 1e9:.3g} GB"
        raise ValueError(f"a header that says {_described(shape)}: {gigabytes}")
    return _LENGTHS + 4 * len(shape) + num_values


def _described(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _find(directory: Path) -> dict[tuple[str, str], Path]:
    """The files by split and kind: both of the training split, and both or none of the test split."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise UsageError(
            f"{directory}: got {error.strerror}; expected a directory with train-images-idx3-ubyte.gz, "
            f"train-labels-idx1-ubyte.gz and their t10k-... Correct data.dir."
        ) from None
    found: dict[tuple[str, str], Path] = {}
    for name in names:
        if (match := _NAME.fullmatch(name)) is None:
            continue
        key = ("train" if match["split"].lower() == "train" else "test", match["kind"].lower())
        if key in found:
            raise UsageError(
                f"{directory}: got {found[key].name} and {name}; expected one file of {key[0]} {key[1]}. Put the files "
                f"of one data set into a directory of their own."
            )
        found[key] = directory / name
    required = [("train", kind) for kind in ("images", "labels")]
    if any(split == "test" for split, _ in found):
        required += [("test", kind) for kind in ("images", "labels")]
    for split, kind in required:
        if (split, kind) not in found:
            file = f"{'train' if split == 'train' else 't10k'}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
            raise UsageError(
                f"{directory / file}: got no such file, nor one ending in .gz; expected the {kind} of the {split} "
                f"split. Put it there, or correct data.dir."
            )
    return found


def _read_all(paths: Sequence[Path], max_bytes: float) -> list[np.ndarray]:
    def read_one(path: Path) -> np.ndarray:
        try:
            return parse(read(path, max_bytes))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{path}: got {reason}; expected a whole IDX file of unsigned bytes, of at most data.memory_limit="
                f"{max_bytes / 1e9:.3g} GB. Put the original there, or raise the limit."
            ) from None

    with ThreadPoolExecutor(len(paths)) as pool:  # zlib releases the interpreter's lock
        return list(pool.map(read_one, paths))
