"""The lift that takes a one-example module over a batch."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core.scope import DenyList
from jaxtyping import Array, Num

from vmapbn_flax.nn.axes import AxisName, as_axes
from vmapbn_flax.nn.batch_norm import BatchNorm, Mask
from vmapbn_flax.nn.checks import require_bool, require_weights

_SHARED = ("params", "batch_stats")


class VmapBatch(nn.Module):
    """A one-example module over one or several leading batch axes, with the module's own variables.

    This is `flax.linen.vmap` with the settings that batch norm needs:

    - The mapped axis has a name.
    - `params` and `batch_stats` exist once, not once per example (`variable_axes` None, like `out_axes=None`
      of `jax.vmap`). Other collections gain the batch axes.
    - Every random stream but `params` differs between examples.

    The variables are those of `module`, without an additional level. Inside a larger network they bear the name of
    `module` if it was given one, else that of the `VmapBatch`.

    Attributes:
      module: called as `module(x, train=train, mask=mask)` on one example `x`. Called without `train`, the lift
        calls `module(x, mask=mask)`, or `module(x)` if there is no mask, either: a module may have `train` as an
        attribute, as `flax.linen.Sequential` of layers that do.
      axis_name: name of the leading axis, or a tuple of names, outermost first.
    """

    module: nn.Module
    axis_name: AxisName = "batch"

    @nn.compact
    def __call__(
        self, x: Num[Array, "*batch_and_example"], *, train: bool | None = None, mask: Mask | None = None
    ) -> Any:
        """The module's result for each example.

        Args:
          x: `(*batch, *example)`, with one leading axis per name in `axis_name`.
          train: True or False, passed to the module. Left out if it is an attribute of the module or of its layers.
          mask: `(*batch,)` or `(*batch, *spatial)`, booleans or finite, non-negative weights, which are checked
            unless they are traced; the module gets the part of each example. Values of weight zero are replaced
            by zeros before the module sees them, so that no NaN in them can reach a gradient.

        Raises:
          TypeError: `train` is not a bool, or the module needs one.
          ValueError: `mask` does not fit `x`, or has weights that are negative, infinite or NaN; or a `BatchNorm`
            inside names a batch axis neither in its `axis_name` nor in its `replica_axis_name`.
        """
        names = as_axes(self.axis_name)
        if train is not None:
            require_bool(train, "VmapBatch")
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

        if mask is not None:
            require_weights(mask, "VmapBatch")

        def call(module: nn.Module, x: Array, mask: Array | None) -> Any:
            if train is not None:
                return module(x, train=train, mask=mask)
            return module(x) if mask is None else module(x, mask=mask)

        for name in reversed(names):
            call = nn.vmap(
                call,
                variable_axes={**dict.fromkeys(_SHARED), DenyList(_SHARED): 0},
                split_rngs={"params": False, DenyList("params"): True},
                in_axes=0,
                axis_name=name,
            )
        module = self.module
        if _named_by_flax(module) and not _named_by_flax(self):
            module = module.clone(parent=self)
        nn.share_scope(self, module)
        with nn.intercept_methods(_require_axes(names)):
            return call(module, zero_masked(x, mask), mask)


def _named_by_flax(module: nn.Module) -> bool:
    """Whether the name was made up, such as `MLP_0`, since none was given."""
    return re.fullmatch(rf"{type(module).__name__}_\d+", module.name or "") is not None


def zero_masked(x: Array, mask: Array | None) -> Array:
    """`x` with zeros wherever `mask`, whose axes are the leading ones of `x`, is zero."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) != 0, x, 0)


def _require_axes(names: tuple[str, ...]) -> Callable:
    """Refuses a `BatchNorm` that, in training, names only some of the mapped axes `names`.

    Its statistics would differ along the axis left out, but the collection holds one set of them.
    """

    def interceptor(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, BatchNorm) and context.method_name == "__call__" and not layer.frozen:
            told = (layer.train, kwargs.get("train"))  # what is no bool is for the layer to refuse
            training = any(isinstance(train, bool | np.bool_) and train for train in told)
            own, replicas = as_axes(layer.axis_name), as_axes(layer.replica_axis_name)
            for name in names:
                if training and name not in own + replicas:
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
