"""The examples in the array_record files of a prepared data set, read by their numbers, without TensorFlow."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from vmapbn_flax.data.arrays import Dataset, Examples, Split
from vmapbn_flax.data.description import SPLITS, read_description
from vmapbn_flax.errors import UsageError, first_line

_MODES = {1: ("L", "1"), 3: ("RGB", "L", "1", "P"), 4: ("RGBA",)}  # of image files, by channels; the first is decoded


def open_records(name: str, directory: Path, command: str) -> Dataset:
    """The data set prepared in `directory`, with splits of `Records`; no example is read yet.

    Args:
      name: of the data set.
      directory: of one prepared version.
      command: prepares the data set again; quoted in errors.

    Raises:
      UsageError: the data set cannot be read, or is not of the kind that `prepared.load` describes.
    """
    with _reading(directory, command):
        described = read_description(directory, command)
        shape, num_classes = described.image_shape, described.num_classes
        train, test = (
            Records(directory, command, split, source, shape, num_classes, range(len(source)))
            for split in SPLITS
            for source in [_open_shards(described.shards[split], described.counts[split])]
        )
    return Dataset(name, num_classes, train, test, class_names=described.class_names)


def _open_shards(shards: list[Path], count: int) -> Any:
    """The records in files that should hold `count` of them; any of several threads may read them."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if strays := [shard.name for shard in shards if not shard.is_file()]:  # a pipe would be waited for
        raise ValueError(f"{strays[0]} is no file")
    source = ArrayRecordDataSource(shards)
    if len(source) != count or count > sum(shard.stat().st_size for shard in shards):
        raise ValueError(f"{shards[0].name} and its like hold {len(source)} examples, not {count}")
    return source


@dataclasses.dataclass(frozen=True)
class Records(Examples):
    """The examples `numbers` of the split `name` in `directory`, decoded whenever they are read.

    Several threads may read at the same time.

    Attributes:
      source: the records of the whole split.
      shape: of an image, `(height, width, channels)`.
      num_classes: the labels are below it.
    """

    directory: Path
    command: str
    name: str
    source: Any
    shape: tuple[int, int, int]
    num_classes: int
    numbers: range

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.shape[-1] == 1 else self.shape

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, examples: slice) -> "Records":
        return dataclasses.replace(self, numbers=self.numbers[examples])

    def read(self, rows: Integer[np.ndarray, " rows"]) -> Split:
        from tensorflow_datasets.proto import tf_example_pb2

        images = np.empty((len(rows), *self.image_shape), np.uint8)
        labels = np.empty(len(rows), np.int64)
        with _reading(self.directory, self.command):
            for i, record in enumerate(self.source.__getitems__([self.numbers[row] for row in rows.tolist()])):
                features = tf_example_pb2.Example.FromString(record).features.feature
                (file,), (labels[i],) = features["image"].bytes_list.value, features["label"].int64_list.value
                images[i] = _decode(file, self.shape)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UsageError(
                f"{self.directory}: got labels from {labels.min()} to {labels.max()} in the {self.name} split; "
                f"expected 0 to {self.num_classes - 1}. Choose a data set whose {self.name} labels are public."
            )
        return Split(images, labels.astype(np.int32))


def _decode(file: bytes, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width *channels"]:
    """The image in the content of a PNG or JPEG file, if its header says `shape`; otherwise nothing is decoded."""
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    # Not PIL.Image.open, which tries every format, and warns of a large image before we refuse it.
    with (PngImageFile if file.startswith(b"\x89PNG") else JpegImageFile)(io.BytesIO(file)) as image:
        got, modes = (image.height, image.width, len(image.getbands())), _MODES[shape[-1]]
        if got[:2] != shape[:2] or image.mode not in modes:
            raise ValueError(f"an image of shape {got}, not {shape}, in mode {image.mode}")
        return np.asarray(image.convert(modes[0]))


@contextlib.contextmanager
def _reading(directory: Path, command: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a damaged file may raise any exception in the libraries below
        raise UsageError(
            f"{directory}: got {type(error).__name__} when reading ({first_line(error)}); expected a "
            f"complete data set. If a file is damaged, remove that directory and prepare it again: {command}"
        ) from error
