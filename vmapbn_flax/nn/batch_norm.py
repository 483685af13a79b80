"""Batch normalisation for networks that are written for one example.

Batch norm (Ioffe & Szegedy, 2015) needs the batch; a function under `jax.vmap` sees one example. A
named axis joins the two: inside a function mapped with `axis_name="batch"`, `lax.psum(x, "batch")`
sums over all examples and returns the same sum to each of them. `BatchNorm` is written that way.
`BatchedBatchNorm` is the textbook layer on a whole batch, with the same variables. The module `moments` has
the statistics.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Num

from vmapbn_flax.nn.axes import AxisName, as_axes, is_mapped, missing_axis
from vmapbn_flax.nn.checks import merge_train, require_weights
from vmapbn_flax.nn.moments import Moments, batch_moments, broadcasting, inverse_sqrt, unbiased_var
from vmapbn_flax.nn.positions import spread

Mask = Bool[Array, "*masked"] | Num[Array, "*masked"]


class Correction(NamedTuple):
    """What a normalised value is multiplied by, and what is then added to it: r and d of batch renormalisation."""

    factor: Float[Array, " features"]
    shift: Inexact[Array, " features"]


class BatchNorm(nn.Module):
    """Batch norm for one example; the named axis `axis_name` reaches the rest of the batch.

    `x` is one example, `(*spatial, features)`. In training, statistics run over its spatial axes and
    over every axis in `axis_name`, so the layer must be called where those axes are mapped. Evaluation
    needs no axis.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from vmapbn_flax import BatchNorm
      >>> layer, image = BatchNorm(axis_name="batch"), jnp.ones((28, 28, 3))
      >>> variables = layer.init(jax.random.key(0), image, train=False)
      >>> jax.tree.map(jnp.shape, variables)
      {'batch_stats': {'mean': (3,), 'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,)}}
      >>> images = jnp.ones((8, 28, 28, 3))
      >>> def forward(variables, image):
      ...     return layer.apply(variables, image, train=True, mutable=["batch_stats"])
      >>> mapped = jax.vmap(forward, in_axes=(None, 0), out_axes=(0, None), axis_name="batch")
      >>> y, updates = mapped(variables, images)
      >>> y.shape, updates["batch_stats"]["mean"].shape
      ((8, 28, 28, 3), (3,))

    `VmapBatch` does this for a whole Flax network. Statistics are computed in at least float32, and the
    variance is biased. Of complex `x` the mean is complex and the variance real, that of the modulus of x - mean.
    A training step moves the running statistics by

        running = momentum * running + (1 - momentum) * batch

    as in `flax.linen.BatchNorm` (PyTorch's `momentum` is 1 minus this one). `momentum=None` keeps the
    average over all steps instead, and stores their `count` beside `mean` and `var`.

    Ghost batches (Hoffer, Hubara & Soudry, 2017): name the axis within a group in `axis_name` and the
    axis of groups in `replica_axis_name`. Each group is normalised by its own statistics. The running
    statistics follow the average over the groups that hold examples.

    Frozen: with `frozen=True` a layer trains by its running statistics and leaves them, as `flax.linen.BatchNorm` does
    with `use_running_average=True`. It is then an affine map of each example, in training as in evaluation, and needs
    no axis.

    Attributes:
      axis_name: the axis or axes to normalise over.
      replica_axis_name: the mapped axes that are *not* normalised over; running statistics are
        averaged over them.
      momentum: decay of the running statistics, in [0, 1), or None. May be a traced scalar.
      epsilon: added to the variance. May be a traced scalar.
      dtype: of the result; by default the type that `x`, scale and bias promote to.
      param_dtype: of scale and bias. Running statistics have this type, or float32 if it is narrower.
      use_bias: whether a learned parameter shifts the result.
      use_scale: whether a learned parameter scales the result.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      use_fast_variance: compute E[x^2] - E[x]^2, in one reduction; loses all digits when the mean is large.
      unbiased_running_var: accumulate the running variance times n / (n - 1), as PyTorch does, where n is
        the number of values. Of weights w it is Kish's effective sample size, (sum w)^2 / sum w^2 (Kish, 1965,
        Survey Sampling), as in `numpy.cov(aweights=w)`. If one value has all the weight, n = 1, nothing is known of
        the variance and it is left as it is. Normalisation still uses the biased variance.
      frozen: normalise by the running statistics in training, too, and leave them.
      train: as in the call, where it is then left out: for `flax.linen.Sequential` and the lifted transformations,
        which would trace it. There is no default.
    """

    axis_name: AxisName | None = "batch"
    replica_axis_name: AxisName = ()
    momentum: float | Float[Array, ""] | None = 0.99
    epsilon: float | Float[Array, ""] = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Array] = nn.initializers.zeros
    scale_init: Callable[..., Array] = nn.initializers.ones
    use_fast_variance: bool = False
    unbiased_running_var: bool = False
    frozen: bool = False
    train: bool | None = None

    _counts_steps = False  # whether there is a `count` whatever the momentum

    @nn.compact
    @broadcasting
    def __call__(
        self, x: Num[Array, "*positions features"], *, train: bool | None = None, mask: Mask | None = None
    ) -> Num[Array, "*positions features"]:
        """Normalises one example.

        Args:
          x: one example, `(*spatial, features)`.
          train: if True, normalise by the statistics of the batch and move the running statistics
            (`batch_stats` must be mutable), unless the layer is frozen; if False, normalise by the running statistics.
            While the layer is initialised no statistics move, and the axes that are mapped are the batch, if any is.
          mask: booleans or finite, non-negative weights that say which values count in training: a scalar for the
            whole example, or `(*spatial,)` or `(*spatial, 1)`, one entry per position. Values of weight zero may
            be anything, NaN included, and their results are finite. If all weights of the batch are zero, the
            running statistics stay as they are. Under a transformation such as `jax.jit` weights are not checked,
            since they have no values yet.

        Returns:
          The normalised example, in the shape of `x`.

        Raises:
          NameError: in training, an axis in `axis_name` or `replica_axis_name` is not mapped.
          TypeError: `train` is not a bool, or is neither in the call nor the attribute.
          ValueError: `train` is in both, the batch has one value per feature, or the mask has another shape or
            weights that are negative, infinite or NaN.
        """
        train = merge_train(self.train, train, self._label())
        features = x.shape[-1:]
        stats_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        mean_dtype = jnp.promote_types(stats_dtype, jnp.complex64) if jnp.iscomplexobj(x) else stats_dtype
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, features, mean_dtype),
            "var": self.variable("batch_stats", "var", jnp.ones, features, stats_dtype),
        }
        if self.momentum is None or self._counts_steps:
            running["count"] = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", self.scale_init, features, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)

        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        correction = None
        if train and not self.frozen:
            axis_name, weights = self._batch_axes(x), self._weights(x, mask)
            moments = batch_moments(x, weights, axis_name, self.use_fast_variance)
            if not self.is_initializing():
                correction = self._correction(running, moments)
                self._update(running, moments, weights)
            centred, multiplier = moments.centred, moments.multiplier(self.epsilon)
            replicas = tuple(filter(is_mapped, as_axes(self.replica_axis_name)))
            broadcast = partial(spread, x=x, axis_name=axis_name, replica_axis_name=replicas)
        else:
            centred = x - running["mean"].value
            multiplier = inverse_sqrt(jnp.asarray(running["var"].value + self.epsilon))
            broadcast = jnp.asarray
        shift = bias
        if correction is not None:
            multiplier = multiplier * correction.factor
            added = correction.shift if scale is None else correction.shift * scale
            shift = added if bias is None else added + bias
        if scale is not None:
            multiplier = multiplier * scale
        y = centred * broadcast(multiplier)
        if shift is not None:
            y = y + broadcast(shift)
        return y.astype(dtype)

    def _batch_axes(self, x: Array) -> tuple[str, ...]:
        """The named axes of the batch, once they and its size are known to be right."""
        axis_name, replicas = as_axes(self.axis_name), as_axes(self.replica_axis_name)
        missing = [name for name in axis_name + replicas if not is_mapped(name)]
        if self.is_initializing():  # any batch will do, one example alone too
            return tuple(name for name in axis_name if name not in missing)
        if missing:
            raise NameError(f"{self._label()}: {missing_axis(missing[0], self.axis_name, self.replica_axis_name)}")
        if math.prod(x.shape[:-1]) * math.prod(map(lax.axis_size, axis_name)) == 1:
            raise ValueError(
                f"{self._label()}: got a training batch of one value per feature, whose variance is zero and "
                f"whose normalised value is zero whatever it was; expected two or more. Use a larger batch, "
                f"or train=False to normalise by the running statistics."
            )
        return axis_name

    def _weights(self, x: Array, mask: Array | None) -> Array | None:
        """The weight of each value, `(*positions, 1)`, once the mask is known to be right."""
        if mask is None:
            return None
        if mask.shape not in self._mask_shapes(x):
            raise ValueError(
                f"{self._label()}: got a mask of shape {mask.shape} for x of shape {x.shape}; "
                f"expected {' or '.join(map(str, self._mask_shapes(x)))}."
            )
        require_weights(mask, self._label())
        weights = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        if mask.dtype != jnp.bool:
            weights = weights.astype(jnp.finfo(x.dtype).dtype)
        return jnp.broadcast_to(weights, (*x.shape[:-1], 1))

    def _update(self, running: dict[str, nn.Variable], moments: Moments, weights: Array | None) -> None:
        """Moves the running statistics towards those of the batch, averaged over the replica axes."""
        var = moments.var
        if self.unbiased_running_var:
            var = unbiased_var(moments, weights, as_axes(self.axis_name))
        replicas = as_axes(self.replica_axis_name)
        present = jnp.asarray(moments.weight > 0, var.dtype)
        groups, mean, var = lax.psum((present, present * moments.mean, present * var), replicas)
        some = groups > 0
        groups = jnp.maximum(groups, 1)

        step_size = 1 / (running["count"].value + 1) if self.momentum is None else 1 - self.momentum
        if "count" in running:
            running["count"].value += some
        for name, batch in (("mean", mean / groups), ("var", var / groups)):
            old = running[name].value
            moved = (1 - step_size) * old + step_size * batch
            moved = jnp.where(some, moved, old)
            running[name].value = moved.astype(moved.dtype if jnp.iscomplexobj(moved) else old.dtype)

    def _correction(self, running: dict[str, nn.Variable], moments: Moments) -> Correction | None:
        """The correction of a training batch, by the running statistics before they move."""
        return None

    def _mask_shapes(self, x: Array) -> list[tuple[int, ...]]:
        return list(dict.fromkeys([(), x.shape[:-1], (*x.shape[:-1], 1)]))

    def _label(self) -> str:
        return f"{type(self).__name__} {'/'.join(self.path)}".rstrip()


class BatchedBatchNorm(BatchNorm):
    """The textbook layer: `BatchNorm` on a whole batch, `(batch, *spatial, features)`.

    Statistics run over every axis of `x` but the last, and over the named axes in `axis_name`, of
    which there are none by default. `mask` is `(batch,)`, `(batch, *spatial)` or `(batch, *spatial, 1)`.
    Everything else, the variables included, is `BatchNorm`'s.
    """

    axis_name: AxisName | None = ()

    def _mask_shapes(self, x: Array) -> list[tuple[int, ...]]:
        return list(dict.fromkeys([x.shape[:1], x.shape[:-1], (*x.shape[:-1], 1)]))
