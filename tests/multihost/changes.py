"""What can be different or go wrong in one of several processes; each is called in it before the command runs."""

import dataclasses
import os
import time

from tests.helpers import small
from vmapbn_flax.data import Split
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import AppendLog
from vmapbn_flax.runs import checkpoints, train
from vmapbn_flax.training.programs import Programs

DAMAGED = "data: got a damaged record, expected a whole one"


def _note_the_moment():
    os.write(2, f"failing at {time.monotonic()}\n".encode())


def damaged_record():
    """An example that is read in the midst of the run cannot be, by this process's thread."""
    read, calls = Split.read, 0

    def read_until_damage(self, rows):
        nonlocal calls
        calls += 1
        if calls == 20:
            _note_the_moment()
            raise UsageError(DAMAGED)
        return read(self, rows)

    Split.read = read_until_damage


def bug():
    """An exception that nobody expects, between two calls of all processes."""
    advance, calls = Programs.advance, 0

    def advance_until_bug(self, state, step, count):
        nonlocal calls
        calls += 1
        if calls == 10:
            _note_the_moment()
            raise ZeroDivisionError("a bug")
        return advance(self, state, step, count)

    Programs.advance = advance_until_bug


def full_disk():
    """No more rows can be written, from the twentieth on."""
    append, calls = AppendLog.append, 0

    def append_until_full(self, row):
        nonlocal calls
        calls += 1
        if calls > 20:
            _note_the_moment()
            raise RunError("metrics.jsonl: got No space left on device")
        append(self, row)

    AppendLog.append = append_until_full


def failing_save():
    """The third checkpoint's sums cannot be written, in orbax's thread."""
    write_sums, calls = checkpoints.write_sums, 0

    def write_until_full(path):
        nonlocal calls
        calls += 1
        if calls == 3:
            _note_the_moment()
            raise OSError(28, "No space left on device")
        write_sums(path)

    checkpoints.write_sums = write_until_full


def failing_directory():
    """The directory of the third checkpoint cannot be made, while the others wait for it."""
    makedirs, calls = os.makedirs, 0

    def make_until_full(path, *arguments, **options):
        nonlocal calls
        calls += str(path).endswith("-tmp") and "/state" not in str(path) and "/meta" not in str(path)
        if calls == 3:
            _note_the_moment()
            raise OSError(28, "No space left on device")
        makedirs(path, *arguments, **options)

    os.makedirs = make_until_full


def noted_saves():
    """Where this process saves checkpoints is said."""
    save = checkpoints.Checkpoints.save

    def noted(self, *arguments):
        os.write(2, f"saving in {self._directory}\n".encode())
        save(self, *arguments)

    checkpoints.Checkpoints.save = noted


def reversed_rows():
    _change_data(lambda split: Split(split.images[::-1].copy(), split.labels[::-1].copy()))


def fewer_rows():
    _change_data(lambda split: split[:96])


def _change_data(change):
    def load(data):
        dataset = small.load(data)
        return dataclasses.replace(dataset, train=change(dataset.train))

    train.load_dataset = load


def other_packages():
    train.versions = lambda: checkpoints.versions() | {"optax": "0.0.1"}
