"""The examples in the array_record files of a prepared data set, read by their numbers, without TensorFlow."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from vmapbn_flax.data.arrays import Dataset, Examples, Split
from vmapbn_flax.errors import UsageError

SPLITS = ("train", "test")


def open_records(name: str, directory: Path, command: str) -> Dataset:
    """The data set prepared in `directory`, with splits of `Records`; no example is read yet.

    Args:
      name: of the data set.
      directory: of one prepared version.
      command: prepares the data set again; quoted in errors.

    Raises:
      UsageError: the data set cannot be read, or is not of the kind that `prepared.load` describes.
    """
    import tensorflow_datasets as tfds

    with _reading(directory, command):
        builder = tfds.builder_from_directory(directory)
        _require_image_classification(builder, directory, command, tfds)
        features = {key: builder.info.features[key] for key in ("image", "label")}
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        sources = {
            split: builder.as_data_source(split, deserialize_method=raw, file_format="array_record") for split in SPLITS
        }
        train, test = (
            Records(directory, command, split, source, tfds.features.FeaturesDict(features), range(len(source)))
            for split, source in sources.items()
        )
    return Dataset(name, features["label"].num_classes, train, test)


@dataclasses.dataclass(frozen=True)
class Records(Examples):
    """The examples `numbers` of the split `name` in `directory`, decoded whenever they are read.

    Several threads may read at the same time.
    """

    directory: Path
    command: str
    name: str
    source: Any
    features: Any
    numbers: range

    @property
    def image_shape(self) -> tuple[int, ...]:
        shape = self.features["image"].shape
        return shape[:-1] if shape[-1] == 1 else shape

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, examples: slice) -> "Records":
        return dataclasses.replace(self, numbers=self.numbers[examples])

    def read(self, rows: Integer[np.ndarray, " rows"]) -> Split:
        shape, num_classes = self.features["image"].shape, self.features["label"].num_classes
        images = np.empty((len(rows), *shape), np.uint8)
        labels = np.empty(len(rows), np.int64)
        with _reading(self.directory, self.command):
            for i, record in enumerate(self.source.__getitems__([self.numbers[row] for row in rows.tolist()])):
                example = self.features.deserialize_example_np(record)
                if example["image"].shape != shape:
                    raise ValueError(f"an image of shape {example['image'].shape}, not {shape}")
                images[i], labels[i] = example["image"], example["label"]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(
                f"{self.directory}: got labels from {labels.min()} to {labels.max()} in the {self.name} split; "
                f"expected 0 to {num_classes - 1}. Choose a data set whose {self.name} labels are public."
            )
        return Split(images.reshape(len(rows), *self.image_shape), labels.astype(np.int32))


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


def _require_image_classification(builder: Any, directory: Path, command: str, tfds: Any) -> None:
    info, wanted_format = builder.info, tfds.core.FileFormat.ARRAY_RECORD
    if wanted_format not in info.available_file_formats():
        raise UsageError(
            f"{directory}: got files in the format {info.file_format.value}; expected {wanted_format.value}. "
            f"Remove that directory, or choose another data.dir, and prepare it there: {command}"
        )
    features = dict(info.features.items())
    image, label = features.get("image"), features.get("label")
    if not (
        isinstance(image, tfds.features.Image)
        and None not in image.shape
        and image.np_dtype == np.uint8
        and isinstance(label, tfds.features.ClassLabel)
        and label.num_classes
    ):
        got = ", ".join(f"{key}: {_describe(feature)}" for key, feature in sorted(features.items()))
        raise UsageError(
            f"{directory}: got features {got}; expected image: Image of one known size in uint8, and label: "
            f"ClassLabel with a number of classes. Choose an image classification set of that kind."
        )
    counts = {split: info.splits[split].num_examples for split in info.splits}
    if not all(counts.get(split) for split in SPLITS):
        got = ", ".join(f"{split} ({count} examples)" for split, count in counts.items())
        raise UsageError(
            f"{directory}: got the splits {got}; expected examples in {' and '.join(SPLITS)}. "
            f"Choose a data set that has both."
        )


def _describe(feature: Any) -> str:
    """A feature in words, such as "Image (None, None, 3) uint8"."""
    if hasattr(feature, "num_classes"):
        return f"{type(feature).__name__} of {feature.num_classes} classes"
    return f"{type(feature).__name__} {feature.shape} {np.dtype(feature.np_dtype).name}"


def first_line(error: Exception) -> str:
    """The first line of the message of `error`, at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), "no message")[:200]
