"""A small convolutional network for one image, and its batched twin with the same variables."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from vmapbn_flax.nn import images
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm, Mask
from vmapbn_flax.nn.vmap_batch import zero_masked


class ConvNet(nn.Module):
    """A convolutional network for one image: blocks of convolution, norm, pooling and relu, then a dense layer.

    The convolutions are 3x3. Each block halves height and width, rounding down. The dense layer sees all positions of
    the last block, so that the variables fit images of one size.

    Examples:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp
      >>> from vmapbn_flax import ConvNet, VmapBatch
      >>> model, images = ConvNet(num_classes=10), jnp.ones((128, 28, 28, 1))
      >>> variables = jax.eval_shape(partial(model.init, jax.random.key(0), train=False), images[0])
      >>> jax.eval_shape(partial(model.apply, train=False), variables, images[0]).shape
      (10,)
      >>> jax.eval_shape(partial(VmapBatch(model).apply, train=False), variables, images).shape
      (128, 10)

    Attributes:
      num_classes: width of the output.
      norm: called with a `name`, makes the layer after each convolution: `BatchNorm`, or a `functools.partial` of it.
        None leaves the layer out, and gives the convolutions a bias.
      features: channels of each block.
      dtype: of the convolutions' computation; by default the type that the image and the variables promote to.
    """

    num_classes: int
    norm: Callable[..., nn.Module] | None = BatchNorm
    features: Sequence[int] = (32, 64, 64)
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "height width channels"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, " classes"]:
        """Logits of one image.

        Args:
          x: the image; grey has one channel.
          train: passed to each norm.
          mask: passed to each norm; a scalar for the image, or `(height, width)`, one entry per position. What has the
            weight zero is not part of the image: convolutions see zeros there, as around the image, and a pooling
            window with such a position in it has the weight zero.

        Raises:
          ValueError: `x` is not one image, or too small for so many blocks.
        """
        images.require(self, x, batched=False)
        return self._logits(x, train, mask)

    def _logits(self, x: Array, train: bool, mask: Array | None) -> Array:
        *batch, height, width, _ = x.shape
        if min(height, width) < 2 ** len(self.features):
            raise ValueError(
                f"{type(self).__name__}: got images of {height}x{width}, which {len(self.features)} blocks halve to "
                f"nothing; expected at least {2 ** len(self.features)} pixels a side, or fewer features."
            )
        x = zero_masked(x, mask)
        layer = partial(images.conv_norm, norm=self.norm, train=train, dtype=self.dtype)
        for i, features in enumerate(self.features):
            x, mask = layer(x, mask, features, 3, suffix=str(i))
            x, mask = images.max_pool_relu(x), images.pool_mask(mask, x)
            x = images.zero_positions(x, mask)
        return nn.Dense(self.num_classes, name="logits")(x.reshape(*batch, -1))


class BatchedConvNet(ConvNet):
    """`ConvNet` written the textbook way, for a whole batch; it has the same variables."""

    norm: Callable[..., nn.Module] | None = BatchedBatchNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits of each image; `mask` is `(batch,)` or `(batch, height, width)`. Masked values may be NaN.

        Raises:
          ValueError: `x` is not a batch of images, or they are too small for so many blocks.
        """
        images.require(self, x, batched=True)
        return self._logits(x, train, mask)
