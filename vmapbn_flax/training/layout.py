"""How a data set and its batches lie on the devices along the axis `data` of a mesh."""

import abc
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from vmapbn_flax.data import Dataset, Split
from vmapbn_flax.training.mesh import DATA, put

Arrays = tuple[Array, Array]  # images and labels


def make_layout(devices: Mesh | None, dataset: Dataset, replicate_limit: int) -> "Layout":
    """The layout of `dataset` on a mesh, or on the default device.

    Args:
      replicate_limit: the size in bytes up to which each device holds the whole data set.
    """
    if devices is None or devices.shape[DATA] == 1:
        return OneDevice(devices)
    if dataset.streamed:
        return InBatches(devices)
    if dataset.nbytes > replicate_limit:
        return Columns(devices, dataset.train.image_shape)
    return Whole(devices)


class Layout(abc.ABC):
    """Splits batches by examples over the devices; each subclass places the data set in a way of its own.

    Attributes:
      count: the number of devices that a batch is split over.
      held: the part of the data set that each device holds, in words.
    """

    held = "the data set"

    def __init__(self, devices: Mesh | None):
        self.count = devices.shape[DATA] if devices is not None else 1
        self._devices = devices

    def put(self, split: Split) -> Arrays:
        """Puts the images and labels of `split` on the devices; every process has the whole split."""
        return put((split.images, split.labels), self._sharding())

    def put_batches(
        self, batches: Int[np.ndarray, "batches batch"], group: int, read: Callable[[np.ndarray], Split]
    ) -> Arrays:
        """Puts the images and labels of streamed batches on the devices.

        Args:
          batches: the numbers of the examples; -1 is a blank example.
          group: as in `padded`.
          read: returns the examples with the given numbers, `(rows,)`.
        """
        return self.put(read(batches.reshape(-1)))

    @abc.abstractmethod
    def take(self, images: Array, labels: Array, rows: Int[Array, " batch"], number: Int[Array, ""]) -> Arrays:
        """The examples `rows`, padded, of the arrays that `put` returned. They are those of batch `number`."""

    def padded(self, size: int, group: int = 1) -> int:
        """`size` rounded up until its groups of `group` rows divide over the devices."""
        return -(-size // group // self.count) * self.count * group

    def pad(self, rows: Int[Array, " batch"], group: int = 1) -> Int[Array, " padded"]:
        """`rows`, padded until its groups of `group` rows divide over the devices."""
        return jnp.pad(rows, (0, self.padded(len(rows), group) - len(rows)))

    def mask(self, size: int, group: int = 1) -> Bool[Array, " padded"] | None:
        """Which rows of a padded batch of `size` examples are not padding; None if there is no padding."""
        padded = self.padded(size, group)
        return None if padded == size else self._constrain(jnp.arange(padded) < size, DATA)

    def _sharding(self, *axes: str | None) -> NamedSharding | None:
        return NamedSharding(self._devices, PartitionSpec(*axes)) if self._devices is not None else None

    def _constrain(self, x: Array, *axes: str | None) -> Array:
        return lax.with_sharding_constraint(x, self._sharding(*axes))


class OneDevice(Layout):
    """A batch lies on one device, and so does the data set: on every device that has members."""

    def take(self, images: Array, labels: Array, rows: Int[Array, " batch"], number: Int[Array, ""]) -> Arrays:
        return _rows(images, rows), _rows(labels, rows)


class Whole(Layout):
    """The data set lies whole on each device."""

    def take(self, images: Array, labels: Array, rows: Int[Array, " batch"], number: Int[Array, ""]) -> Arrays:
        rows = self._constrain(self._constrain(rows), DATA)  # first whole, or the compiler divides and gathers them
        return self._constrain(_rows(images, rows), DATA), self._constrain(_rows(labels, rows), DATA)


class Columns(Layout):
    """Each device holds a share of the pixels of every image, and all labels.

    An image is stored as a row of pixels, padded until they divide. Indexing stays local. One all-to-all reassembles
    the images of a batch, and moves as many bytes as the batch has.
    """

    held = "a share of the data set"

    def __init__(self, devices: Mesh, image_shape: tuple[int, ...]):
        super().__init__(devices)
        self._image_shape = image_shape

    def put(self, split: Split) -> Arrays:
        pixels = split.images.reshape(len(split), -1)
        images = np.pad(pixels, ((0, 0), (0, -pixels.shape[1] % self.count)))
        return put(images, self._sharding(None, DATA)), put(split.labels, self._sharding())

    def take(self, images: Array, labels: Array, rows: Int[Array, " batch"], number: Int[Array, ""]) -> Arrays:
        rows = self._constrain(rows)  # or the compiler divides them and gathers them again
        parts = self._constrain(_rows(images, rows), None, DATA)
        pixels, labels = self._constrain(parts, DATA), self._constrain(_rows(labels, rows))
        images = pixels[:, : math.prod(self._image_shape)].reshape(-1, *self._image_shape)
        return self._constrain(images, DATA), self._constrain(labels, DATA)


class InBatches(Layout):
    """Streamed batches are in order when they are read: a process reads, and a device holds, its share of each."""

    held = "a share of the data set"

    def put_batches(
        self, batches: Int[np.ndarray, "batches batch"], group: int, read: Callable[[np.ndarray], Split]
    ) -> Arrays:
        share = self.share(batches, group)
        split = read(share.reshape(-1))

        def put_share(array: np.ndarray) -> Array:
            in_batches = array.reshape(*share.shape, *array.shape[1:])
            return jax.make_array_from_process_local_data(self._sharding(None, DATA), in_batches)

        return put_share(split.images), put_share(split.labels)

    def share(self, batches: Int[np.ndarray, "batches batch"], group: int = 1) -> Int[np.ndarray, "batches share"]:
        """The numbers in `batches` whose examples go to the devices of this process; -1 is padding."""
        padding = self.padded(batches.shape[1], group) - batches.shape[1]
        padded = np.pad(batches, ((0, 0), (0, padding)), constant_values=-1)
        return np.split(padded, jax.process_count(), axis=1)[jax.process_index()]

    def take(self, images: Array, labels: Array, rows: Int[Array, " batch"], number: Int[Array, ""]) -> Arrays:
        def take_one(array: Array) -> Array:
            return self._constrain(lax.dynamic_index_in_dim(array, number, keepdims=False), DATA)

        return take_one(images), take_one(labels)


def _rows(x: Array, rows: Int[Array, " batch"]) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")  # without the bounds checks of `x[rows]`


ONE_DEVICE = OneDevice(None)
