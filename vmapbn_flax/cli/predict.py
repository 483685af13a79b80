"""`vmapbn-flax predict`: the classes of images in files."""

import argparse
import csv
import io
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vmapbn_flax.cli import environment
from vmapbn_flax.data.arrays import border
from vmapbn_flax.data.images import SUFFIXES, read_converted
from vmapbn_flax.data.npz import read_array
from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import write_whole
from vmapbn_flax.runs.console import say, table
from vmapbn_flax.runs.inputs import require_images
from vmapbn_flax.runs.trained import TrainedRun, load_run

Block = tuple[list[str], np.ndarray]  # names, and images `(images, *image_shape)` in uint8 or floats

_ARRAYS = (".npy", ".npz")
_BLOCK = 256  # images that are decoded at a time
_THREADS = 4
_CONTRAST = 0.5  # between borders, above which the colours are probably inverted


def run(arguments: argparse.Namespace, started: float) -> int:
    """Prints a row an image; the status is 1 if a file could not be read."""
    environment.import_from_here()
    environment.quieten_pillow()
    files = find(arguments.images)
    trained = load_run(arguments.workdir, arguments.step, network=arguments.network)
    reader = Reader(trained, strict=arguments.strict, invert=arguments.invert)
    top = min(arguments.top, len(trained.class_names))
    written = io.StringIO()
    sheet = csv.writer(written)
    sheet.writerow(["image", "class", "probability", *(f"p_{name}" for name in trained.class_names)])
    rows = []
    with tqdm(total=len(files), unit="file", disable=not sys.stderr.isatty()) as bar:
        for names, images in reader.read(files, bar.update):
            for name, found in zip(names, trained.predict(images), strict=True):
                order = np.argsort(-found, kind="stable")[:top]
                rows.append((name, *(text for i in order for text in (trained.class_names[i], f"{found[i]:.4f}"))))
                if arguments.csv:
                    best = order[0]
                    sheet.writerow([name, trained.class_names[best], found[best], *found])
    if rows:
        header = ("image", "class", "probability", *("next", "probability") * (top - 1))
        table(rows, header, file=sys.stdout)
        sys.stdout.flush()
    reader.say_notes(len(rows))
    if arguments.csv:
        write_whole(arguments.csv, os.fsencode(written.getvalue()))
    return 1 if reader.failures else 0


def find(paths: Iterable[Path]) -> list[Path]:
    """The files that `paths` name; of a folder all images in it, also in folders inside, sorted, but for hidden ones.

    Raises:
      UsageError: a path does not exist, or a folder has no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = list(_images(path))
            if not found:
                raise UsageError(
                    f"{path}: got a folder without images; expected files that end in {', '.join(SUFFIXES)}. "
                    f"Name arrays in .npy and .npz files one by one."
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            got = "a pipe or a device" if path.exists() else "no such file"
            raise UsageError(f"{path}: got {got}; expected an image, an array in a .npy or .npz file, or a folder")
    return files


def _images(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(directory, name)
            for name in sorted(names)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )


class Reader:
    """Reads images in the form that a run takes, and counts what had to be done to them.

    Attributes:
      failures: the number of files that could not be read; each has been named in a line.
    """

    def __init__(self, trained: TrainedRun, *, strict: bool, invert: bool):
        self._shape, self._border = trained.image_shape, trained.border
        self._most_bytes = trained.config.data.memory_limit * 1e9
        self._strict, self._invert = strict, invert
        self._changes = Counter[str]()
        self._converted = self._opposite = self.failures = 0

    def read(self, files: Iterable[Path], on_read: Callable[[int], object]) -> Iterator[Block]:
        """The images in `files`, block by block; calls `on_read` with the number of files that a block ends."""
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for is_array, group in itertools.groupby(files, lambda file: file.suffix in _ARRAYS):
                while block := list(itertools.islice(group, 1 if is_array else _BLOCK)):
                    names, images = self._array(block[0]) if is_array else self._images(block, pool)
                    if self._invert:
                        images = (255 if images.dtype == np.uint8 else 1) - images
                    self._opposite += int(np.sum(np.abs(border(images) - self._border) > _CONTRAST))
                    yield names, images
                    on_read(len(block))

    def _array(self, file: Path) -> Block:
        try:
            images = require_images(read_array(file, self._most_bytes), self._shape)
        except (UsageError, ValueError) as error:
            return self._fail(f"{file}: {error}" if isinstance(error, ValueError) else error)
        if images.ndim == len(self._shape):
            return [str(file)], images[np.newaxis]
        return [f"{file}[{i}]" for i in range(len(images))], images

    def _images(self, files: list[Path], pool: ThreadPoolExecutor) -> Block:
        names, images = [], []
        for file, outcome in zip(files, pool.map(self._image, files), strict=True):
            if isinstance(outcome, UsageError):
                self._fail(outcome)
                continue
            pixels, changes = outcome
            self._changes.update(changes)
            self._converted += bool(changes)
            names.append(str(file))
            images.append(pixels)
        return names, np.array(images, np.uint8).reshape(-1, *self._shape)

    def _image(self, file: Path) -> tuple[np.ndarray, tuple[str, ...]] | UsageError:
        try:
            return read_converted(file, self._shape, strict=self._strict)
        except UsageError as error:
            return error

    def _fail(self, error: object) -> Block:
        say(f"error: {' '.join(str(error).split())}")
        self.failures += 1
        return [], np.zeros((0, *self._shape), np.uint8)

    def say_notes(self, count: int) -> None:
        """Says what was converted of `count` images, and whether dark and bright seem to be exchanged."""
        if self._converted:
            changes = ", ".join(f"{number} {change}" for change, number in self._changes.items())
            say(f"note: converted {self._converted} of {count} images: {changes}")
        if self._opposite:
            border, trained = ("dark", "bright") if self._border > 0.5 else ("bright", "dark")
            change = "leave out" if self._invert else "add"
            say(
                f"note: {self._opposite} of {count} images have a {border} border, where the training images have a "
                f"{trained} one. If dark and bright are exchanged in them, {change} --invert."
            )
