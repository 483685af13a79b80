"""Image classification sets that tensorflow-datasets has prepared, read without TensorFlow.

A prepared set is a directory `<data_dir>/<name>[/<config>]/<version>`. If its images fit in memory, they are
decoded once, and the arrays are kept in the user's cache directory until a file of the prepared set changes.
Reading that cache does not import tensorflow-datasets. Nor is anything imported, executed or unpickled that a prepared
set names, wherever it comes from.
"""

import difflib
import fnmatch
import hashlib
import math
import os
import re
import shlex
from pathlib import Path

from vmapbn_flax.data.arrays import Dataset, expanded
from vmapbn_flax.data.cache import decoded
from vmapbn_flax.data.records import open_records
from vmapbn_flax.errors import UsageError

_NAME = re.compile(r"(?P<set>[A-Za-z]\w*)(/(?P<config>\w[\w+.-]*))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)


def load(name: str, data_dir: str = "", max_bytes: float = math.inf) -> Dataset:
    """The data set `name` as prepared in `data_dir`, by default in tensorflow-datasets' own directory.

    Its splits are arrays, or, if the arrays would take more than `max_bytes`, records in its files.

    Raises:
      UsageError: the data set is missing, cannot be read, or is not an image classification set with images
        of one size and the splits train and test.
    """
    root = expanded(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").absolute()
    build = ["tfds", "build", name, "--file_format=array_record", f"--data_dir={root}"]
    command = f"pip install -e '.[tensorflow]' && {shlex.join(build)}"

    directory = _find(name, root, command)
    identity = _identity(directory, command)
    return decoded(directory, name, identity, max_bytes, lambda: open_records(name, directory, command))


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
    close = difflib.get_close_matches(match["set"].lower(), ["mnist", "idx", "npz", "folder", *known], n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else "Correct data.name, or data.dir if it lies elsewhere."
    raise UsageError(f"{missing} holds none and tensorflow-datasets knows no {match['set']!r}. {remedy}")


def _versions(directory: Path) -> list[str]:
    """Names of the prepared versions; a version in preparation has another name until it is complete."""
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


def _identity(directory: Path, command: str) -> str:
    """A digest of the names, sizes and times of the prepared files."""
    try:
        stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir())
    except OSError as error:
        raise UsageError(
            f"{error.filename}: got {error.strerror}; expected a readable file of a prepared data set. "
            f"Make it readable, or remove {directory} and prepare it again: {command}"
        ) from error
    return hashlib.sha256(repr(stats).encode()).hexdigest()
