"""Images that are decoded once: the arrays are kept in the user's cache directory until a file of the set changes."""

import dataclasses
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmapbn_flax.data.arrays import Dataset, Split, gather
from vmapbn_flax.errors import first_line

_FORMAT = 3  # increment it when the contents of a cache change
_SPLITS = ("train", "test")

_log = logging.getLogger(__name__)


def decoded(directory: Path, name: str, identity: str, max_bytes: float, open_set: Callable[[], Dataset]) -> Dataset:
    """A data set as arrays, from the cache or else decoded with a progress bar on a terminal; or as it is in its
    files, if the arrays would take more than `max_bytes`.

    Args:
      directory: of the data set; a cache of it is replaced when the identity changes.
      name: of the data set.
      identity: differs where the files do.
      max_bytes: that the arrays may take.
      open_set: returns the data set in its files.

    Raises:
      UsageError: `open_set` raises it, or an image cannot be read.
    """
    cache, identity = _cache_path(directory), f"{_FORMAT} {identity}"
    if cache is not None and (cached := _read_cache(cache, name, identity, max_bytes)) is not None:
        return cached
    dataset = open_set()
    if dataset.nbytes > max_bytes:
        return dataset
    splits = (dataset.train, dataset.test)
    total = sum(map(len, splits))
    with tqdm(total=total, unit="image", desc=f"{name}: decoding", disable=not sys.stderr.isatty()) as bar:
        train, test = (gather(split, np.arange(len(split)), on_read=bar.update) for split in splits)
    dataset = dataclasses.replace(dataset, train=train, test=test)
    if cache is not None:
        _write_cache(cache, dataset, identity)
    return dataset


def _cache_path(directory: Path) -> Path | None:
    """One file for each directory, so that a set that has changed replaces its old cache.

    None where the user has no home directory.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        _log.warning("got no home directory and no XDG_CACHE_HOME; the images are decoded at every start.")
        return None
    place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    return caches / "vmapbn_flax" / f"{place}.npz"


def _read_cache(path: Path, name: str, identity: str, max_bytes: float) -> Dataset | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as cache:
            if sum(member.file_size for member in cache.zip.infolist()) > path.stat().st_size:
                raise ValueError("more inside than the file has bytes")  # we compress nothing
            if cache["identity"].item() != identity or cache["num_bytes"].item() > max_bytes:
                return None
            train, test = (Split(cache[f"{split}_images"], cache[f"{split}_labels"]) for split in _SPLITS)
            class_names = tuple(cache["class_names"].tolist())
            return Dataset(name, len(class_names), train, test, class_names=class_names)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged header can raise anything
        _log.warning("%s: got %s; the images are decoded again.", path, first_line(error))
        return None


def _write_cache(path: Path, dataset: Dataset, identity: str) -> None:
    """Writes the whole cache or, with a warning, nothing."""
    facts = {"identity": identity, "num_bytes": dataset.nbytes, "class_names": dataset.class_names}
    arrays: dict[str, Any] = {name: np.array(fact) for name, fact in facts.items()}
    for split in _SPLITS:
        part = getattr(dataset, split)
        arrays |= {f"{split}_images": part.images, f"{split}_labels": part.labels}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A unique name, since several runs may start at the same time.
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
