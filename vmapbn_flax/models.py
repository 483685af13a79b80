"""The networks, and the lift that takes a one-example network over a batch."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core.scope import DenyList
from jaxtyping import Array, Float

from vmapbn_flax.batch_norm import AxisName, BatchedBatchNorm, BatchNorm, Mask, as_axes

_SHARED = ("params", "batch_stats")


class MLP(nn.Module):
    """A multilayer perceptron for one example: dense, norm, sigmoid, ..., dense.

    >>> import jax, jax.numpy as jnp
    >>> from vmapbn_flax import MLP, VmapBatch
    >>> model = MLP(hidden=(100, 100, 100), num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.ones(784), train=False)
    >>> model.apply(variables, jnp.ones(784), train=False).shape
    (10,)
    >>> VmapBatch(model).apply(variables, jnp.ones((128, 784)), train=False).shape
    (128, 10)

    Attributes:
      hidden: widths of the hidden layers.
      num_classes: width of the output.
      norm: makes the layer between each hidden product and its sigmoid from a `name`: `BatchNorm`, or a
        `functools.partial` of it; None for the plain network.
    """

    hidden: Sequence[int]
    num_classes: int
    norm: Callable[..., nn.Module] | None = BatchNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, " features"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, " classes"]:
        """Logits of one example; `train` and the scalar `mask` are `BatchNorm`'s.

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
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width, name=f"dense_{i}")(x)
            if self.norm is not None:
                x = self.norm(name=f"norm_{i}")(x, train=train, mask=mask)
            x = nn.sigmoid(x)
        return nn.Dense(self.num_classes, name="logits")(x)


class BatchedMLP(MLP):
    """The same network, with the same variables, written the textbook way for a whole batch."""

    norm: Callable[..., nn.Module] | None = BatchedBatchNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool, mask: Mask | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits of each example; `mask` is `(batch,)`, and examples of weight zero may be NaN.

        Raises:
          ValueError: `x` is not a batch.
        """
        if x.ndim != 2:
            raise ValueError(
                f"BatchedMLP: got x of shape {x.shape}; expected a batch, (batch, features). "
                f"For one example use MLP, which has the same variables."
            )
        return self._logits(_zero_masked(x, mask), train, mask)


class VmapBatch(nn.Module):
    """A one-example module over one or several leading batch axes, with the module's own variables.

    `flax.linen.vmap` with the axis named and everything said that batch norm needs said: `params` and
    `batch_stats` exist once, not once per example (`variable_axes` None, the `out_axes=None` of
    `jax.vmap`), random streams but `params` differ between examples, and other collections gain the
    batch axes. The variables are those of `module`, without a level of their own; inside a larger network
    it is `module` that takes the `name`.

    Attributes:
      module: takes `(x, *, train, mask)` for one example `x`.
      axis_name: name of the leading axis, or a tuple of names, outermost first.
    """

    module: nn.Module
    axis_name: AxisName = "batch"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch_and_example"], *, train: bool, mask: Mask | None = None) -> Any:
        """The module's result for each example.

        Args:
          x: `(*batch, *example)`, with one leading axis per name in `axis_name`.
          train: passed on.
          mask: `(*batch,)` or `(*batch, *spatial)`, booleans or non-negative weights, split along the
            batch axes and passed on. Values of weight zero are replaced by zeros first, so that whatever
            they hold, NaN included, cannot reach a gradient.

        Raises:
          ValueError: `mask` does not fit `x`; or a `BatchNorm` inside names a batch axis neither in its
            `axis_name` nor in its `replica_axis_name`.
        """
        names = as_axes(self.axis_name)
        if x.ndim < len(names):
            raise ValueError(
                f"VmapBatch(axis_name={self.axis_name!r}): got x of shape {x.shape}; expected a leading axis "
                f"for each name, {names}. For one example apply the module itself."
            )
        if mask is not None and (mask.ndim < len(names) or mask.shape != x.shape[: mask.ndim]):
            raise ValueError(
                f"VmapBatch(axis_name={self.axis_name!r}): got a mask of shape {mask.shape} for x of shape "
                f"{x.shape}; expected {x.shape[: len(names)]}, the batch axes, or those and spatial ones."
            )

        def call(module: nn.Module, x: Array, mask: Array | None) -> Any:
            return module(x, train=train, mask=mask)

        for name in reversed(names):
            call = nn.vmap(
                call,
                variable_axes={**dict.fromkeys(_SHARED), DenyList(_SHARED): 0},
                split_rngs={"params": False, DenyList("params"): True},
                in_axes=0,
                axis_name=name,
            )
        nn.share_scope(self, self.module)
        with nn.intercept_methods(_require_axes(names)):
            return call(self.module, _zero_masked(x, mask), mask)


def _zero_masked(x: Array, mask: Array | None) -> Array:
    """`x` with zeros wherever `mask`, whose axes are the leading ones of `x`, is zero."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) != 0, x, 0)


def _require_axes(names: tuple[str, ...]) -> Callable:
    """Refuses a `BatchNorm` in training that leaves out one of the mapped axes `names`.

    Its statistics would differ along that axis, where the collection holds them once.
    """

    def interceptor(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, BatchNorm) and context.method_name == "__call__" and kwargs.get("train"):
            own, replicas = as_axes(layer.axis_name), as_axes(layer.replica_axis_name)
            for name in names:
                if name not in own + replicas:
                    raise ValueError(_unnamed_axis(layer, names, name, own, replicas))
        return next_method(*args, **kwargs)

    return interceptor


def _unnamed_axis(
    layer: BatchNorm, names: tuple[str, ...], name: str, own: tuple[str, ...], replicas: tuple[str, ...]
) -> str:
    def spell(axes: tuple[str, ...]) -> str:
        return repr(axes[0] if len(axes) == 1 else axes)

    kind = type(layer).__name__
    return (
        f"{kind} {'/'.join(layer.path)}: got axis_name={layer.axis_name!r} under "
        f"VmapBatch(..., axis_name={spell(names)}); expected it to name {name!r} too, or its statistics "
        f"would come out once per {name!r}. Write {kind}(axis_name={spell((*own, name))}) to normalise over "
        f"{name!r}, or {kind}(axis_name={spell(own)}, replica_axis_name={spell((*replicas, name))}) to keep "
        f"its groups apart (ghost batches)."
    )
