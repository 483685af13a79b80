"""Where the batches of training and of evaluation come from: a data set in memory, or a stream of it.

`InMemory` and `Stream` have the same methods.
"""

import functools
from collections.abc import Callable, Generator
from typing import cast

import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vmapbn_flax.data import Dataset, Split
from vmapbn_flax.training.layout import Arrays, Layout
from vmapbn_flax.training.stream import Stream


class InMemory:
    """The splits of `dataset`, whole on the devices, and the order of the training examples in one epoch.

    Attributes:
      whole: the images and labels of each split on the devices; of a stream, none.

    Args:
      layout: of the data set on the devices.
      order: returns the permutation of the training examples in an epoch; of several members, one each.
      put_order: puts it on the devices.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset,
        layout: Layout,
        order: Callable[[int], np.ndarray],
        put_order: Callable[[np.ndarray], Array],
    ):
        self.whole = {name: layout.put(cast(Split, split)) for name, split in dataset.splits.items()}
        self._epoch_steps = len(dataset.train) // config.train.batch_size
        self._order = functools.lru_cache(maxsize=1)(lambda epoch: put_order(order(epoch)))

    def position(self, step: int) -> tuple[Array, Array, Array, np.int32]:
        """The training set, its order in the epoch of `step`, and the number of the batch of `step` in that order."""
        epoch, number = divmod(step, self._epoch_steps)
        return (*self.whole["train"], self._order(epoch), np.int32(number))

    def steps_left(self, step: int) -> int:
        """The number of steps from `step` for which `position` differs in the number of the batch alone."""
        return self._epoch_steps - step % self._epoch_steps

    def parts(self, split: str) -> Generator[Arrays, None, None]:
        """The arguments of an evaluation of `split`: its images and labels in one piece."""
        yield self.whole[split]

    def first(self, split: str) -> Arrays:
        """Images and labels that begin with the first evaluation batch of `split`."""
        return self.whole[split]

    def close(self) -> None:
        """Frees the order; `position` makes it again."""
        self._order.cache_clear()


Feed = InMemory | Stream
