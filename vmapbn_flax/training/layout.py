"""How batches, and the data set that they are taken from, lie over the axis `data` of a mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt8

from vmapbn_flax.data import Split
from vmapbn_flax.training.mesh import DATA, put


class Layout:
    """How batches, and the data set that they are taken from, lie over the axis `data` of a mesh.

    A batch is split by examples. The images of the data set, `(examples, features)`, lie whole on every
    device or, `by_columns`, a share of the features of each on every device. Then too a device takes the
    examples of a batch without asking another, and one all-to-all makes whole images of their parts,
    which moves as many bytes as the batch has. What is streamed, and so in order when it is read, lies
    `in_batches`, `(batches, batch, features)`: a process reads, and a device holds, its share of each.
    """

    def __init__(self, devices: Mesh | None = None, *, by_columns: bool = False, in_batches: bool = False):
        self.count = devices.shape[DATA] if devices is not None else 1
        self.in_batches = in_batches and self.count > 1
        self.by_columns = by_columns and self.count > 1 and not self.in_batches
        self._devices, self._num_features = devices, None

    def put(self, split: Split) -> tuple[Array, Array]:
        """The images and labels of examples, all of them in each process."""
        images, labels = split.images.reshape(len(split), -1), split.labels
        self._num_features = images.shape[1]
        if self.by_columns:
            images = np.pad(images, ((0, 0), (0, -images.shape[1] % self.count)))  # features that divide
        columns = self._sharding(None, DATA) if self.by_columns else self._sharding()
        return put(images, columns), put(labels, self._sharding())

    def share(self, batches: Int[np.ndarray, "batches batch"], group: int = 1) -> Int[np.ndarray, "batches share"]:
        """Which rows of the batches the devices of this process get, and -1 for padding."""
        padding = self.padded(batches.shape[1], group) - batches.shape[1]
        padded = np.pad(batches, ((0, 0), (0, padding)), constant_values=-1)
        return np.split(padded, jax.process_count(), axis=1)[jax.process_index()]

    def put_share(self, split: Split, num_batches: int) -> tuple[Array, Array]:
        """The images and labels of batches, of which each process has the examples that `share` names."""
        images = split.images.reshape(num_batches, -1, math.prod(split.image_shape))
        labels = split.labels.reshape(num_batches, -1)
        sharding = self._sharding(None, DATA)
        return tuple(jax.make_array_from_process_local_data(sharding, array) for array in (images, labels))

    def padded(self, size: int, group: int = 1) -> int:
        """The least number of rows, in groups of `group`, that divides and has room for `size`."""
        return -(-size // group // self.count) * self.count * group

    def pad(self, rows: Int[Array, " batch"], group: int = 1) -> Int[Array, " padded"]:
        """`rows` with further groups of `group`, if it takes any to divide."""
        return jnp.pad(rows, (0, self.padded(len(rows), group) - len(rows)))

    def mask(self, size: int, group: int = 1) -> Bool[Array, " padded"] | None:
        """The `size` rows of a padded batch that are not padding; None if there is no padding."""
        padded = self.padded(size, group)
        return None if padded == size else self._constrain(jnp.arange(padded) < size, DATA)

    def batch(
        self,
        images: UInt8[Array, "batches batch features"],
        labels: Int[Array, "batches batch"],
        number: Int[Array, ""],
    ) -> tuple[UInt8[Array, "batch features"], Int[Array, " batch"]]:
        """The `number`-th of what `put_share` placed."""
        taken = (lax.dynamic_index_in_dim(array, number, keepdims=False) for array in (images, labels))
        return tuple(self._constrain(array, DATA) for array in taken)

    def take(
        self,
        images: UInt8[Array, "examples stored"],
        labels: Int[Array, " examples"],
        rows: Int[Array, " batch"],
    ) -> tuple[UInt8[Array, "batch features"], Int[Array, " batch"]]:
        """The examples `rows`, which divide over the devices."""
        # Said of the rows too, or the compiler divides them, and gathers them again.
        rows = self._constrain(rows)
        if self.by_columns:
            parts = self._constrain(_rows(images, rows), None, DATA)
            taken = self.without_padding(self._constrain(parts, DATA)), self._constrain(_rows(labels, rows))
        else:
            rows = self._constrain(rows, DATA)
            taken = _rows(images, rows), _rows(labels, rows)
        return tuple(self._constrain(array, DATA) for array in taken)

    def without_padding(self, images: UInt8[Array, "examples stored"]) -> UInt8[Array, "examples features"]:
        """`images` without the zeros that `put` gave them."""
        return images[:, : self._num_features] if self.by_columns else images

    def _sharding(self, *axes: str | None) -> NamedSharding | None:
        return NamedSharding(self._devices, PartitionSpec(*axes)) if self._devices is not None else None

    def _constrain(self, x: Array, *axes: str | None) -> Array:
        return x if self.count == 1 else lax.with_sharding_constraint(x, self._sharding(*axes))


def _rows(x: Array, rows: Int[Array, " batch"]) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")  # without the checks of each element that `x[rows]` makes


ONE_DEVICE = Layout()
