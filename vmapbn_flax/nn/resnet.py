"""Residual networks (He et al. 2015, Deep Residual Learning) for one image, and their batched twin."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmapbn_flax.nn import images
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm, Mask
from vmapbn_flax.nn.vmap_batch import zero_masked


class ResNet(nn.Module):
    """A residual network for one image; by default ResNet-20 for images of about 32x32 (section 4.2).

    | | `blocks` | `width` | `bottleneck` | `imagenet` |
    |---|---|---|---|---|
    | 6n + 2 layers for CIFAR | `(n, n, n)` | 16 | False | False |
    | ResNet-18, ResNet-34 | `(2, 2, 2, 2)`, `(3, 4, 6, 3)` | 64 | False | True |
    | ResNet-50, ResNet-101 | `(3, 4, 6, 3)`, `(3, 4, 23, 3)` | 64 | True | True |

    Examples:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp
      >>> from vmapbn_flax import ResNet, VmapBatch
      >>> model = VmapBatch(ResNet(num_classes=10, blocks=(3, 3, 3)))
      >>> init = partial(model.init, jax.random.key(0), train=True)
      >>> variables = jax.eval_shape(init, jnp.ones((128, 32, 32, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      269722

    Attributes:
      num_classes: width of the output.
      norm: called with a `name`, makes the layer after each convolution: `BatchNorm`, or a `functools.partial` of it.
        None leaves the layer out, and gives the convolutions a bias.
      blocks: number of residual blocks in each stage. Each stage but the first halves height and width, rounding up,
        and doubles the channels.
      width: channels of the first stage; a bottleneck has four times as many at its end.
      bottleneck: whether a block is 1x1, 3x3 and 1x1 convolutions instead of two of 3x3.
      imagenet: whether the stem is a 7x7 convolution and a maximum over 3x3, each of stride 2, and a shortcut that
        changes shape is a 1x1 convolution (section 4.1); otherwise the stem is a 3x3 convolution, and a shortcut drops
        positions and adds channels of zeros (section 4.2).
      zero_scale: whether the last scale of each block starts at zero, so that the block starts as the identity
        (Goyal et al. 2017, section 5.1).
      dtype: of the convolutions' computation; by default the type that the image and the variables promote to.
    """

    num_classes: int
    norm: Callable[..., nn.Module] | None = BatchNorm
    blocks: Sequence[int] = (3, 3, 3)
    width: int = 16
    bottleneck: bool = False
    imagenet: bool = False
    zero_scale: bool = False
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
            weight zero is not part of the image: an image padded to a larger one at the bottom and on the right, and
            masked there, has the logits and the statistics of the image itself.

        Raises:
          ValueError: `x` is not one image.
        """
        images.require(self, x, batched=False)
        return self._logits(x, train, mask)

    def _logits(self, x: Array, train: bool, mask: Array | None) -> Array:
        if self.zero_scale and self.norm is None and self.is_initializing():
            raise ValueError(f"{type(self).__name__}: got zero_scale=True and norm=None; expected a norm.")
        x = zero_masked(x, mask)
        size, stride = (7, 2) if self.imagenet else (3, 1)
        common = {"norm": self.norm, "dtype": self.dtype}
        x, mask = images.conv_norm(x, mask, self.width, size, stride=stride, train=train, suffix="stem", **common)
        x = images.zero_positions(nn.relu(x), mask)
        if self.imagenet:
            mask = images.stride_mask(mask, x, 2)
            x = images.zero_positions(nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), mask)
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                block = ResidualBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    projection=self.imagenet,
                    zero_scale=self.zero_scale,
                    name=f"stage_{stage}_block_{i}",
                    **common,
                )
                x, mask = block(x, train=train, mask=mask)
        return nn.Dense(self.num_classes, name="logits")(images.mean_of_positions(x, mask))


class BatchedResNet(ResNet):
    """`ResNet` written the textbook way, for a whole batch; it has the same variables."""

    norm: Callable[..., nn.Module] | None = BatchedBatchNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits of each image; `mask` is `(batch,)` or `(batch, height, width)`. Masked values may be NaN.

        Raises:
          ValueError: `x` is not a batch of images.
        """
        images.require(self, x, batched=True)
        return self._logits(x, train, mask)


class ResidualBlock(nn.Module):
    """The relu of a shortcut plus two or three convolutions, of one image or a batch.

    Attributes:
      features: channels of the convolutions; the last of a bottleneck has four times as many.
      stride: of the first 3x3 convolution and of the shortcut.
      projection: whether a shortcut that changes shape is a 1x1 convolution.
      Others: those of `ResNet`.
    """

    features: int
    stride: int
    bottleneck: bool
    projection: bool
    zero_scale: bool
    norm: Callable[..., nn.Module] | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Mask | None) -> tuple[Array, Array | None]:
        """The block's result and its mask."""
        layer = partial(images.conv_norm, norm=self.norm, train=train, dtype=self.dtype)
        last: dict[str, Any] = {"scale_init": nn.initializers.zeros} if self.zero_scale else {}
        if self.bottleneck:
            plan = [(self.features, 1, 1, {}), (self.features, 3, self.stride, {}), (4 * self.features, 1, 1, last)]
        else:
            plan = [(self.features, 3, self.stride, {}), (self.features, 3, 1, last)]

        y, y_mask = x, mask
        for i, (features, size, stride, attributes) in enumerate(plan):
            if i > 0:
                y = images.zero_positions(nn.relu(y), y_mask)
            y, y_mask = layer(y, y_mask, features, size, stride=stride, suffix=str(i), **attributes)
        return images.zero_positions(nn.relu(y + self._shortcut(x, mask, y, layer)), y_mask), y_mask

    def _shortcut(self, x: Array, mask: Mask | None, y: Array, layer: Callable) -> Array:
        """`x` in the shape of `y`."""
        if x.shape == y.shape:
            return x
        if self.projection:
            return layer(x, mask, y.shape[-1], 1, stride=self.stride, suffix="shortcut")[0]
        x = x[..., :: self.stride, :: self.stride, :]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, y.shape[-1] - x.shape[-1])])
