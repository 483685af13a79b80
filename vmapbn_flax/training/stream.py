"""Data larger than memory, a window at a time: a thread reads the next window while the devices work on the last."""

import functools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vmapbn_flax.data import Dataset
from vmapbn_flax.data.arrays import gather
from vmapbn_flax.training.hyperparameters import steps_in
from vmapbn_flax.training.layout import Arrays, Layout

_WINDOW_BYTES = 4e6  # at most, unless a batch is larger: what is decoded in about a second

_NOWHERE = -2  # neither a window nor the predecessor of one

Part = tuple[Array, Array, np.int32]  # of a split: images, labels and the number of examples
Window = TypeVar("Window")


class Stream:
    """The training batches of the run of `config`, in windows that lie on the devices, and its evaluation batches.

    The examples of an epoch, in the order of its permutation, are cut into windows of equally many whole batches; the
    end of the last window may be blank. A window is a small training set, already in order. One program therefore
    serves all windows, batch k stays the same function of the seed and k, and no position is ever saved.

    At most two windows and two evaluation batches are in memory at a time. Two windows take at most
    `config.data.memory_limit`, unless a single batch is larger: a window has at least one.

    Attributes:
      whole: the splits that lie on the devices; none.

    Args:
      layout: of the batches on the devices; each process reads its share of them.
      order: returns the permutation of the training examples in an epoch.
      put_order: puts a permutation on the devices.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset,
        layout: Layout,
        order: Callable[[int], np.ndarray],
        put_order: Callable[[np.ndarray], Array],
    ):
        self.whole: dict[str, Arrays] = {}
        self._splits, self._layout = dataset.splits, layout
        self._order = functools.lru_cache(maxsize=1)(order)
        self._batch_size, self._eval_batch_size = config.train.batch_size, config.train.eval_batch_size
        self._group = config.model.ghost_batch_size or 1  # examples that stay together on a device
        self._epoch_steps = len(dataset.train) // self._batch_size
        window_bytes = min(_WINDOW_BYTES, config.data.memory_limit * 1e9 / 2)
        most = max(1, int(window_bytes / dataset.train[: self._batch_size].nbytes))
        self._window_steps = -(-self._epoch_steps // -(-self._epoch_steps // most))  # of nearly equal length
        self._epoch_windows = -(-self._epoch_steps // self._window_steps)
        self._end = self._locate(steps_in(config.train.num_epochs, self._epoch_steps) - 1)[0] + 1
        # One more than a window has: for a window of one batch XLA would compile another program, with other bits.
        self._in_order = put_order(np.arange(self._window_steps * self._batch_size + 1, dtype=np.int32))
        self._windows: Generator[Arrays, None, None] | None = None
        self._window: tuple[Array, ...] = ()
        self._number = _NOWHERE

    def position(self, step: int) -> tuple[Array, Array, Array, np.int32]:
        """The window of `step`, its order, and the number of the batch of `step` in it; the last window is freed.

        Raises:
          UsageError: an example of the window cannot be read.
        """
        number, batch = self._locate(step)
        if number != self._number:
            if self._windows is None or number != self._number + 1:
                self.close()
                self._windows = read_ahead(self._read, range(number, self._end))
            self._number, self._window = _NOWHERE, ()  # frees the last window: the next may need its memory
            self._window = next(self._windows)
            self._number = number
        images, labels = self._window
        return images, labels, self._in_order, np.int32(batch)

    def steps_left(self, step: int) -> int:
        """The number of steps from `step` to the end of its window, for which `position` differs in one number."""
        batch = step % self._epoch_steps
        return min(self._window_steps - batch % self._window_steps, self._epoch_steps - batch)

    def _locate(self, step: int) -> tuple[int, int]:
        """The number of the window of `step`, from the start of the run, and of its batch in the window."""
        epoch, batch = divmod(step, self._epoch_steps)
        return epoch * self._epoch_windows + batch // self._window_steps, batch % self._window_steps

    def _read(self, number: int, stopped: Callable[[], bool]) -> Arrays:
        epoch, part = divmod(number, self._epoch_windows)
        first = part * self._window_steps
        last = min(first + self._window_steps, self._epoch_steps)
        batches = self._order(epoch)[first * self._batch_size : last * self._batch_size].reshape(-1, self._batch_size)
        blank = np.full((self._window_steps - len(batches), self._batch_size), -1)
        return self._gather("train", np.concatenate([batches, blank]), self._group, stopped)

    def _gather(
        self, split: str, batches: Int[np.ndarray, "batches batch"], group: int, stopped: Callable[[], bool]
    ) -> Arrays:
        """The examples with the numbers in `batches`, on the devices; -1 is a blank example."""
        return self._layout.put_batches(batches, group, lambda rows: gather(self._splits[split], rows, stopped))

    def parts(self, split: str) -> Generator[Part, None, None]:
        """The arguments of an evaluation of each batch of `split`: images, labels, and how many are not blanks."""
        number_of_batches = -(-len(self._splits[split]) // self._eval_batch_size)
        return read_ahead(functools.partial(self._read_part, split), range(number_of_batches))

    def first(self, split: str) -> Arrays:
        """The images and labels of the first evaluation batch of `split`."""
        images, labels, _ = self._read_part(split, 0, lambda: False)
        return images, labels

    def _read_part(self, split: str, number: int, stopped: Callable[[], bool]) -> Part:
        size = self._eval_batch_size
        rows = np.arange(number * size, (number + 1) * size)
        batch = np.where(rows < len(self._splits[split]), rows, -1)
        return (*self._gather(split, batch[np.newaxis], 1, stopped), np.int32(np.sum(batch >= 0)))

    def close(self) -> None:
        """Ends the thread and frees the windows; `position` starts it again."""
        if self._windows is not None:
            self._windows.close()
        self._windows, self._number, self._window = None, _NOWHERE, ()


def read_ahead(read: Callable[[int, Callable[[], bool]], Window], numbers: range) -> Generator[Window, None, None]:
    """`read(number, stopped)` for each of `numbers`; a thread reads the next while the caller works on the last.

    At most two results are in memory, if the caller frees its own before it asks for the next. An error of `read` is
    raised here. Closing or dropping the generator waits for the thread, and meanwhile `stopped()` is true.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        try:
            following = pool.submit(read, numbers[0], stop.is_set)
            for number in numbers[1:]:
                window = following.result()
                following = pool.submit(read, number, stop.is_set)
                yield window
                del window
            yield following.result()
        finally:
            stop.set()
