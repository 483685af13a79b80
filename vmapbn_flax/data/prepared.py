"""Image classification sets that tensorflow-datasets has prepared, read without TensorFlow.

A prepared set is a directory `<data_dir>/<name>[/<config>]/<version>`. Its images are decoded once: the
arrays stay in the user's cache directory until a file of the prepared set changes, and a set in the
cache does not even import tensorflow-datasets.
"""

import difflib
import fnmatch
import hashlib
import logging
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vmapbn_flax.data.arrays import Dataset, Split
from vmapbn_flax.errors import UsageError

_NAME = re.compile(r"(?P<set>[A-Za-z]\w*)(/(?P<config>\w[\w+.-]*))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_SPLITS = ("train", "test")
_BLOCK = 1024  # examples; read together they take a third of the time
_CACHE_FORMAT = 1  # part of a cache's identity: count up when what it holds changes

_log = logging.getLogger(__name__)


def load(name: str, data_dir: str = "") -> Dataset:
    """The data set `name` as prepared in `data_dir`, or else in tensorflow-datasets' own default.

    Raises:
      UsageError: it is not there, cannot be read, or is something else than image classification with
        images of one size and a train and a test split.
    """
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(root).expanduser().absolute()
    build = ["tfds", "build", name, "--file_format=array_record", f"--data_dir={root}"]
    command = f"pip install -e '.[tensorflow]' && {shlex.join(build)}"

    directory = _find(name, root, command)
    identity = _identity(directory, command)
    cache = _cache_path(directory)
    dataset = _read_cache(cache, name, identity)
    if dataset is None:
        dataset = _decode(name, directory, command)
        _write_cache(cache, dataset, identity)
    return dataset


def _find(name: str, root: Path, command: str) -> Path:
    """The directory of the newest prepared version that `name` allows."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"data.name: got {name!r}; expected 'mnist' or a data set of tensorflow-datasets. Write name, "
            f"name/config, name:1.0.0 or name/config:1.0.0."
        )
    parent = root / match["set"] / (match["config"] or "")
    versions = _versions(parent)
    if allowed := fnmatch.filter(versions, match["version"] or "*"):
        return parent / max(allowed, key=lambda version: tuple(map(int, version.split("."))))

    configs = [f"{match['set']}/{folder.name}" for folder in _folders(parent) if _versions(folder)]
    if there := sorted(versions or configs):
        raise UsageError(
            f"data.name: got {name!r}; expected what is prepared in {parent}: {', '.join(there)}. "
            f"Name one of them, or prepare yours: {command}"
        )
    missing = f"data.name: got {name!r}; expected 'mnist' or a data set prepared in {root}, but {parent}"
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if match["set"] in known:
        raise UsageError(f"{missing} holds none. Prepare it: {command}")
    close = difflib.get_close_matches(match["set"].lower(), ["mnist", *known], n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else "Correct data.name, or data.dir if it lies elsewhere."
    raise UsageError(f"{missing} holds none and tensorflow-datasets knows no {match['set']!r}. {remedy}")


def _versions(directory: Path) -> list[str]:
    """Names of the prepared versions; an unfinished one has another name until it is complete."""
    return [folder.name for folder in _folders(directory) if _VERSION.fullmatch(folder.name)]


def _folders(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(
            f"{directory}: got {error.strerror}; expected a readable directory of prepared data sets. "
            f"Change its permissions, or choose another data.dir."
        ) from error


def _decode(name: str, directory: Path, command: str) -> Dataset:
    import tensorflow_datasets as tfds

    _log.info("%s: decoding the images, this once", directory)
    try:
        builder = tfds.builder_from_directory(directory)
        _require_image_classification(builder, directory, command, tfds)
        num_classes = builder.info.features["label"].num_classes
        splits = [_decode_split(builder, split, tfds) for split in _SPLITS]
    except UsageError:
        raise
    except Exception as error:  # whatever the libraries below make of a damaged file
        raise UsageError(
            f"{directory}: got {type(error).__name__} when reading ({_first_line(error)}); expected a "
            f"complete data set. If a file is damaged, remove that directory and prepare it again: {command}"
        ) from error
    for split, (_, labels) in zip(_SPLITS, splits, strict=True):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(
                f"{directory}: got labels from {labels.min()} to {labels.max()} in the {split} split; "
                f"expected 0 to {num_classes - 1}. Choose a data set whose {split} labels are public."
            )
    train, test = (Split(images, labels.astype(np.int32)) for images, labels in splits)
    return Dataset(name, num_classes, train, test)


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
    if not all(counts.get(split) for split in _SPLITS):
        got = ", ".join(f"{split} ({count} examples)" for split, count in counts.items())
        raise UsageError(
            f"{directory}: got the splits {got}; expected examples in {' and '.join(_SPLITS)}. "
            f"Choose a data set that has both."
        )


def _describe(feature: Any) -> str:
    """Such as "Image (None, None, 3) uint8"."""
    if hasattr(feature, "num_classes"):
        return f"{type(feature).__name__} of {feature.num_classes} classes"
    return f"{type(feature).__name__} {feature.shape} {np.dtype(feature.np_dtype).name}"


def _decode_split(builder: Any, split: str, tfds: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images as in `Split`, and labels of any value in int64."""
    wanted = tfds.features.FeaturesDict({key: builder.info.features[key] for key in ("image", "label")})
    undecoded = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=undecoded, file_format="array_record")
    images = np.empty((len(source), *wanted["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int64)
    for start in range(0, len(source), _BLOCK):
        records = source.__getitems__(range(start, min(start + _BLOCK, len(source))))
        for i, record in enumerate(records, start):
            example = wanted.deserialize_example_np(record)
            images[i], labels[i] = example["image"], example["label"]
    return (images[..., 0] if images.shape[-1] == 1 else images), labels


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:200]


def _identity(directory: Path, command: str) -> str:
    """A digest that changes whenever the prepared files do."""
    try:
        stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir())
    except OSError as error:
        raise UsageError(
            f"{error.filename}: got {error.strerror}; expected a readable file of a prepared data set. "
            f"Make it readable, or remove {directory} and prepare it again: {command}"
        ) from error
    return hashlib.sha256(repr((_CACHE_FORMAT, stats)).encode()).hexdigest()


def _cache_path(directory: Path) -> Path:
    """One file for each prepared directory, so that a set prepared anew replaces its old cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    return caches / "vmapbn_flax" / f"{place}.npz"


def _read_cache(path: Path, name: str, identity: str) -> Dataset | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as cache:
            if cache["identity"].item() != identity:
                return None
            train, test = (Split(cache[f"{split}_images"], cache[f"{split}_labels"]) for split in _SPLITS)
            return Dataset(name, cache["num_classes"].item(), train, test)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile checks a CRC, and a damaged header can raise anything
        _log.warning("%s: got %s; the images are decoded again.", path, _first_line(error))
        return None


def _write_cache(path: Path, dataset: Dataset, identity: str) -> None:
    """Writes the cache whole or, with a warning, not at all."""
    arrays = {"identity": np.array(identity), "num_classes": np.array(dataset.num_classes)}
    for split in _SPLITS:
        part = getattr(dataset, split)
        arrays |= {f"{split}_images": part.images, f"{split}_labels": part.labels}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several runs may start at once.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                np.savez(file, **arrays)
                file.close()
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        _log.warning("%s: got %s; the images are decoded at every start.", path, error.strerror)
