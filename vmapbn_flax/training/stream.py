"""Data larger than memory, a window at a time: a thread reads the next one while the device works on the last."""

import functools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Int

from vmapbn_flax.data import Dataset, Examples
from vmapbn_flax.data.arrays import gather
from vmapbn_flax.training.layout import Arrays, Layout

_WINDOW_BYTES = 4e6  # at the most, unless a batch is larger: about as much as is decoded in a second

_NOWHERE = -2  # no window, nor the one before any

Window = TypeVar("Window")


class Stream:
    """The batches of a run on `dataset`, and what it evaluates, in windows that lie on the device.

    The examples of an epoch, in the order of its permutation, are cut into windows of equally many whole
    batches; the end of the last may be blank. Each is a small training set of its own, already in order, so that
    one program serves them all, batch k stays the same function of the seed and k, and no position is ever saved.

    Two windows of training examples are alive at a time, and two batches of those that are evaluated.

    Args:
      layout: of the batches over the devices; each process reads its share of them.
      order: the permutation of the training examples in an epoch.
      put_order: a permutation to the device.
      num_steps: of the run.
      group: the examples of a batch that are not divided over devices.
      max_bytes: of all windows that are alive at a time; a window has one batch at least.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: Layout,
        order: Callable[[int], np.ndarray],
        put_order: Callable[[np.ndarray], Array],
        *,
        num_steps: int,
        batch_size: int,
        group: int,
        eval_batch_size: int,
        max_bytes: float,
    ):
        self._train, self._layout, self._group = dataset.train, layout, group
        self._order = functools.lru_cache(maxsize=1)(order)
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._epoch_steps = len(dataset.train) // batch_size
        window_bytes = min(_WINDOW_BYTES, max_bytes / 2)
        most = max(1, int(window_bytes / dataset.train[:batch_size].nbytes))
        self._window_steps = -(-self._epoch_steps // -(-self._epoch_steps // most))  # none much shorter than the rest
        self._epoch_windows = -(-self._epoch_steps // self._window_steps)
        self._end = self._locate(num_steps - 1)[0] + 1
        # One more than a window has: of a window that is one batch XLA would make another program, with other bits.
        self._in_order = put_order(np.arange(self._window_steps * batch_size + 1, dtype=np.int32))
        self._windows: Generator[Arrays, None, None] | None = None
        self._window: tuple[Array, ...] = ()
        self._number = _NOWHERE

    def position(self, step: int) -> tuple[Array, Array, Array, np.int32]:
        """The window that `step` is in, its order, and the number of the batch there; another one is let go.

        Raises:
          UsageError: an example of the window cannot be read.
        """
        number, batch = self._locate(step)
        if number != self._number:
            if self._windows is None or number != self._number + 1:
                self.close()
                self._windows = read_ahead(self._read, range(number, self._end))
            self._number, self._window = _NOWHERE, ()  # before the next is asked for, whose memory it may need
            self._window = next(self._windows)
            self._number = number
        images, labels = self._window
        return images, labels, self._in_order, np.int32(batch)

    def steps_left(self, step: int) -> int:
        """How many steps there are from `step` to the end of its window."""
        batch = step % self._epoch_steps
        return min(self._window_steps - batch % self._window_steps, self._epoch_steps - batch)

    def _locate(self, step: int) -> tuple[int, int]:
        """The number of a step's window, counted from the start of the run, and of its batch there."""
        epoch, batch = divmod(step, self._epoch_steps)
        return epoch * self._epoch_windows + batch // self._window_steps, batch % self._window_steps

    def _read(self, number: int, stopped: Callable[[], bool]) -> Arrays:
        epoch, part = divmod(number, self._epoch_windows)
        first = part * self._window_steps
        last = min(first + self._window_steps, self._epoch_steps)
        batches = self._order(epoch)[first * self._batch_size : last * self._batch_size].reshape(-1, self._batch_size)
        blank = np.full((self._window_steps - len(batches), self._batch_size), -1)
        return self._gather(self._train, np.concatenate([batches, blank]), self._group, stopped)

    def _gather(
        self, split: Examples, batches: Int[np.ndarray, "batches batch"], group: int, stopped: Callable[[], bool]
    ) -> Arrays:
        """On the devices, the examples that have the numbers in `batches`; -1 is a blank one."""
        return self._layout.put_batches(batches, group, lambda rows: gather(split, rows, stopped))

    def batches(self, split: Examples) -> Generator[tuple[Array, Array, np.int32], None, None]:
        """Images and labels of `split`, a batch of evaluation at a time, and how many of them are not blank."""
        size = self._eval_batch_size

        def read(number: int, stopped: Callable[[], bool]) -> tuple[Array, Array, np.int32]:
            rows = np.arange(number * size, (number + 1) * size)
            batch = np.where(rows < len(split), rows, -1)
            return (*self._gather(split, batch[np.newaxis], 1, stopped), np.int32(np.sum(batch >= 0)))

        return read_ahead(read, range(-(-len(split) // size)))

    def close(self) -> None:
        """Ends the thread and lets go of the windows; who asks for another starts it again."""
        if self._windows is not None:
            self._windows.close()
        self._windows, self._number, self._window = None, _NOWHERE, ()


def read_ahead(read: Callable[[int, Callable[[], bool]], Window], numbers: range) -> Generator[Window, None, None]:
    """`read(number, stopped)` for each of `numbers`, the next of them in a thread while the caller works on the last.

    Two results are alive at a time, if the caller lets go of the one it has before it asks for the next. What `read`
    raises is raised here. Closing the generator, or dropping it, waits for the thread; until then `stopped()` is true.
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
