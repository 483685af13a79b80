"""The multilayer perceptron for one example, and its batched twin with the same variables."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm, Mask
from vmapbn_flax.nn.vmap_batch import zero_masked


class MLP(nn.Module):
    """A multilayer perceptron for one example: dense, norm, sigmoid, ..., dense.

    A dense layer that a norm follows has no bias, because the norm subtracts it with the mean (Ioffe & Szegedy,
    2015, section 3.2). Its gradient would be rounding alone, of which Adam makes steps of full size.

    The input of each sigmoid is sown in the collection `intermediates`, as `pre_activation_0`, `pre_activation_1`, ...

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from vmapbn_flax import MLP, VmapBatch
      >>> model = MLP(hidden=(100, 100, 100), num_classes=10)
      >>> variables = model.init(jax.random.key(0), jnp.ones(784), train=False)
      >>> model.apply(variables, jnp.ones(784), train=False).shape
      (10,)
      >>> jax.tree.map(jnp.shape, variables["params"]["dense_0"])
      {'kernel': (784, 100)}
      >>> VmapBatch(model).apply(variables, jnp.ones((128, 784)), train=False).shape
      (128, 10)

    Attributes:
      hidden: widths of the hidden layers.
      num_classes: width of the output.
      norm: called with a `name`, makes the layer between each hidden dense layer and its sigmoid:
        `BatchNorm`, or a `functools.partial` of it. None leaves the layer out.
      kernel_std: standard deviation of the normal distribution of all initial kernels; 0 leaves them to
        `flax.linen.Dense`, whose variance is one over the number of inputs (LeCun).
    """

    hidden: Sequence[int]
    num_classes: int
    norm: Callable[..., nn.Module] | None = BatchNorm
    kernel_std: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, " features"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, " classes"]:
        """Logits of one example; `train` and the scalar `mask` go to each `BatchNorm`.

        Raises:
          ValueError: `x` is not one example.
        """
        if x.ndim != 1:
            raise ValueError(
                f"MLP: got x of shape {x.shape}; expected one example, (features,). "
                f"For a batch of them write VmapBatch(MLP(...)), or use BatchedMLP."
            )
        return self._logits(x, train, mask)

    def _logits(self, x: Array, train: bool, mask: Array | None) -> Array:
        dense = nn.Dense
        if self.kernel_std:
            dense = partial(nn.Dense, kernel_init=nn.initializers.normal(self.kernel_std))
        for i, width in enumerate(self.hidden):
            x = dense(width, use_bias=self.norm is None, name=f"dense_{i}")(x)
            if self.norm is not None:
                x = self.norm(name=f"norm_{i}")(x, train=train, mask=mask)
            self.sow("intermediates", f"pre_activation_{i}", x)
            x = nn.sigmoid(x)
        return dense(self.num_classes, name="logits")(x)


class BatchedMLP(MLP):
    """`MLP` written the textbook way, for a whole batch; it has the same variables."""

    norm: Callable[..., nn.Module] | None = BatchedBatchNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits of each example; `mask` is `(batch,)`. Examples of weight zero may be NaN.

        Raises:
          ValueError: `x` is not a batch.
        """
        if x.ndim != 2:
            raise ValueError(
                f"BatchedMLP: got x of shape {x.shape}; expected a batch, (batch, features). "
                f"For one example use MLP, which has the same variables."
            )
        return self._logits(zero_masked(x, mask), train, mask)
