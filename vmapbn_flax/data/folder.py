"""A folder of images: `train/<class>/*.png`, `*.jpg` or `*.jpeg`, and `test/<class>/...`."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from vmapbn_flax.data.arrays import Dataset, Examples, Split
from vmapbn_flax.data.cache import decoded
from vmapbn_flax.data.images import SUFFIXES, image_shape, read_image
from vmapbn_flax.data.splits import hold_out, permutation, require_test
from vmapbn_flax.errors import UsageError

_LARGE = 128 * 128  # pixels, from which on decoding in threads beats their quarrel over the interpreter's lock
_THREADS = 8


def load(directory: Path, test_fraction: float, max_bytes: float) -> Dataset:
    """The data set in a directory with `train/<class>/` and `test/<class>/`; without the latter, a share of each
    class is the test split.

    The classes are the names of the folders in `train`, sorted. The training examples are in the order of a fixed
    permutation, so that the end of the split, which may become the validation split, has every class.

    Returns:
      The data set as arrays or, if the arrays would take more than `max_bytes`, as files.

    Raises:
      UsageError: a folder or an image is missing, empty, damaged or of another kind or size than the first image.
    """
    directory = directory.absolute()
    names = tuple(_folders(directory / "train"))
    if len(names) < 2:
        raise UsageError(
            f"{directory / 'train'}: got {len(names)} folders of a class ({', '.join(names)}); expected two or more. "
            f"Put the images of each class into a folder of its own."
        )
    has_test = (directory / "test").exists()
    require_test(has_test, test_fraction, str(directory))
    train = _list(directory, "train", names)
    train = train.select(permutation(len(train)))
    if has_test:
        test = _list(directory, "test", names)
        if test.shape != train.shape:
            read_image(directory / test.files[0], train.shape)  # raises
    else:
        rest, held_out = hold_out(train.labels, test_fraction, str(directory / "train"))
        train, test = train.select(rest), train.select(held_out)
    name = str(directory)
    dataset = Dataset(name, len(names), train, test, class_names=names)
    if dataset.nbytes > max_bytes:
        return dataset
    return decoded(directory, name, _identity(train, test), max_bytes, lambda: dataset)


@dataclasses.dataclass(frozen=True)
class ImageFiles(Examples):
    """Images in files, decoded whenever they are read.

    Attributes:
      directory: that `files` are in.
      files: a name for each example, such as `train/cat/1.png`.
      labels: the class of each image.
      shape: of each image.
    """

    directory: Path
    files: Sequence[str]
    labels: Int32[np.ndarray, " examples"]
    shape: tuple[int, ...]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, examples: slice) -> "ImageFiles":
        return dataclasses.replace(self, files=self.files[examples], labels=self.labels[examples])

    def select(self, rows: Integer[np.ndarray, " rows"]) -> "ImageFiles":
        """The examples whose numbers are `rows`, in that order; none is read."""
        files = [self.files[row] for row in rows.tolist()]
        return dataclasses.replace(self, files=files, labels=self.labels[rows])

    def read(self, rows: Integer[np.ndarray, " rows"]) -> Split:
        images = np.empty((len(rows), *self.shape), np.uint8)

        def fill(start: int, step: int) -> None:
            for i in range(start, len(rows), step):
                images[i] = read_image(self.directory / self.files[rows[i]], self.shape)

        if self.shape[0] * self.shape[1] < _LARGE:
            fill(0, 1)
        else:
            count = min(_THREADS, os.cpu_count() or 1)
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(fill, range(count), [count] * count))
        return Split(images, self.labels[rows])


def _folders(directory: Path) -> list[str]:
    """The names of the folders in a directory, sorted; hidden files are left alone, others refused."""
    with _scanned(directory) as entries:
        found = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    if files := [name for name, is_folder in found.items() if not is_folder]:
        raise UsageError(
            f"{directory / min(files)}: got a file; expected folders alone, one for each class. Move it elsewhere."
        )
    return sorted(found)


def _list(directory: Path, split: str, names: tuple[str, ...]) -> ImageFiles:
    """The files of a split, class by class and sorted."""
    files: list[str] = []
    counts = [0] * len(names)
    for folder in _folders(directory / split):
        if folder not in names:
            raise UsageError(
                f"{directory / split / folder}: got a class that train lacks; expected {', '.join(names[:8])}. "
                f"Rename the folder, or take it away."
            )
        images = _images(directory / split / folder)
        counts[names.index(folder)] = len(images)
        files += [f"{split}/{folder}/{image}" for image in images]
    if not files:
        raise UsageError(f"{directory / split}: got no folder; expected one for each class. Add them.")
    labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
    return ImageFiles(directory, files, labels, image_shape(directory / files[0]))


def _images(folder: Path) -> list[str]:
    """The names of the images of a class, sorted."""
    with _scanned(folder) as entries:
        found = {entry.name: entry.is_file() for entry in entries if not entry.name.startswith(".")}
    if others := [name for name in found if not (found[name] and name.lower().endswith(SUFFIXES))]:
        raise UsageError(
            f"{folder / min(others)}: got another kind of file; expected {', '.join(SUFFIXES)} alone. Convert it, or "
            f"move it elsewhere."
        )
    if not found:
        raise UsageError(f"{folder}: got an empty folder; expected the images of a class. Fill it, or take it away.")
    return sorted(found)


def _scanned(directory: Path) -> "os._ScandirIterator[str]":
    try:
        return os.scandir(directory)
    except OSError as error:
        raise UsageError(
            f"{directory}: got {error.strerror}; expected a folder, in the form train/<class>/*.png. Correct data.dir."
        ) from None


def _identity(*splits: ImageFiles) -> str:
    """A digest of the names, sizes and times of the files, and of the split that each is in."""
    digest = hashlib.sha256()
    for split in splits:
        for file in split.files:
            try:
                status = (split.directory / file).stat()
            except OSError as error:
                raise UsageError(
                    f"{error.filename}: got {error.strerror}; expected a readable image. Replace the file, or take it "
                    f"away."
                ) from None
            digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
        digest.update(b"end")
    return digest.hexdigest()
