"""What a prepared data set says about itself, read without tensorflow-datasets, which imports the classes it names."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import parse_json, read_file

SPLITS = ("train", "test")

_FORMAT = "array_record"
_FEATURES = "tensorflow_datasets.core.features."
_DICT, _IMAGE, _LABEL = (
    _FEATURES + name for name in ("features_dict.FeaturesDict", "image_feature.Image", "class_label_feature.ClassLabel")
)
_LARGEST_IMAGE = 10**8  # bytes
_MOST_CLASSES = 10**6
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclasses.dataclass(frozen=True)
class Description:
    """What the files of a prepared data set hold.

    Attributes:
      image_shape: `(height, width, channels)`.
      num_classes: the labels are below it.
      class_names: a name for each label; empty where the data set has no names.
      counts: the number of examples in each split of `SPLITS`.
      shards: the files of each of these splits, in order.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    counts: dict[str, int]
    shards: dict[str, list[Path]]


def read_description(directory: Path, command: str) -> Description:
    """The description of the data set prepared in `directory`.

    Only the features `image` and `label` are looked at, and only as plain JSON.

    Args:
      directory: of one prepared version.
      command: prepares the data set again; quoted in errors.

    Raises:
      UsageError: the data set has another file format, other features or other splits.
      Exception: of any kind; the files are missing or damaged.
    """
    info, features = (parse_json(read_file(directory / name)) for name in ("dataset_info.json", "features.json"))
    _require_format(info, directory, command)
    shape, num_classes = _read_features(features, directory)
    splits = {split["name"]: split for split in info.get("splits", [])}
    lengths = {name: [int(length) for length in split.get("shardLengths", [])] for name, split in splits.items()}
    counts = {name: sum(parts) for name, parts in lengths.items()}
    if not all(counts.get(split) for split in SPLITS):
        got = ", ".join(f"{split} ({count} examples)" for split, count in counts.items())
        raise UsageError(
            f"{directory}: got the splits {got}; expected examples in {' and '.join(SPLITS)}. "
            f"Choose a data set that has both."
        )
    shards = {}
    for name in SPLITS:
        names = (_shard_name(info["name"], splits[name], i, len(lengths[name])) for i in range(len(lengths[name])))
        shards[name] = [directory / shard for shard in names]
    names, counts = _read_names(directory, num_classes), {name: counts[name] for name in SPLITS}
    return Description(shape, num_classes, names, counts, shards)


def _require_format(info: dict[str, Any], directory: Path, command: str) -> None:
    got = info.get("fileFormat", "tfrecord")
    if _FORMAT not in (got, *info.get("alternativeFileFormats", [])):
        raise UsageError(
            f"{directory}: got files in the format {got}; expected {_FORMAT}. "
            f"Remove that directory, or choose another data.dir, and prepare it there: {command}"
        )


def _read_features(content: dict[str, Any], directory: Path) -> tuple[tuple[int, int, int], int]:
    """The shape of an image and the number of classes."""
    if content["pythonClassName"] != _DICT:
        raise UsageError(
            f"{directory}: got features of the class {_short(content['pythonClassName'])}; expected "
            f"{_short(_DICT)}. Choose an image classification set."
        )
    features = content["featuresDict"]["features"]
    image, label = features.get("image", {}), features.get("label", {})
    if image.get("pythonClassName") == _IMAGE and label.get("pythonClassName") == _LABEL:
        height, width, channels = _shape(image)
        num_classes = _num_classes(label)
        known = min(height, width) >= 1 and channels in (1, 3, 4) and height * width * channels <= _LARGEST_IMAGE
        if known and _dtype(image) == "uint8" and 1 <= num_classes <= _MOST_CLASSES:
            return (height, width, channels), num_classes
    got = ", ".join(f"{name}: {_describe(feature)}" for name, feature in sorted(features.items()))
    raise UsageError(
        f"{directory}: got features {got}; expected image: Image of one known size in uint8, of at most "
        f"{_LARGEST_IMAGE // 10**6} MB, and label: ClassLabel with 1 to {_MOST_CLASSES} classes. Choose an image "
        f"classification set of that kind."
    )


def _read_names(directory: Path, num_classes: int) -> tuple[str, ...]:
    path = directory / "label.labels.txt"
    names = tuple(read_file(path).decode().splitlines()) if path.exists() else ()
    return names if len(names) == num_classes else ()


def _shape(image: dict[str, Any]) -> tuple[int, int, int]:
    """The shape of an image, with -1 for what varies."""
    height, width, channels = map(int, image["image"]["shape"]["dimensions"])
    return height, width, channels


def _dtype(image: dict[str, Any]) -> str:
    return image["image"].get("dtype", "uint8")


def _num_classes(label: dict[str, Any]) -> int:
    return int(label["classLabel"].get("numClasses", 0))


def _describe(feature: dict[str, Any]) -> str:
    """A feature in words, such as "Image (None, None, 3) uint8"."""
    name = feature["pythonClassName"]
    if name == _IMAGE:
        return f"Image {tuple(None if size == -1 else size for size in _shape(feature))} {_dtype(feature)}"
    if name == _LABEL:
        return f"ClassLabel of {_num_classes(feature)} classes"
    return _short(name)


def _short(name: str) -> str:
    """The name of a class, of those of tensorflow-datasets without the module."""
    return name.rpartition(".")[2] if name.startswith(_FEATURES) else name


def _shard_name(dataset: str, split: dict[str, Any], number: int, count: int) -> str:
    """The name of a file of `split`, which lies beside its description."""
    digits = max(5, len(str(count)))
    index, total = f"{number:0{digits}}", f"{count:0{digits}}"
    parts = {
        "DATASET": dataset,
        "SPLIT": split["name"],
        "FILEFORMAT": _FORMAT,
        "SHARD_INDEX": index,
        "NUM_SHARDS": total,
        "SHARD_X_OF_Y": f"{index}-of-{total}",
    }
    name = re.sub(r"{(\w+)}", lambda match: parts[match[1]], split.get("filepathTemplate") or _TEMPLATE)
    if Path(name).name != name:
        raise ValueError(f"a file in another directory, {name!r}")
    return name
