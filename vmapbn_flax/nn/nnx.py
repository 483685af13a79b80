"""The norms as modules of Flax NNX, and the conversion of variables between NNX and Linen.

Their arithmetic is that of the Linen layers, which they call. Import this module by its name; `vmapbn_flax.nn` does
without it, since flax.nnx takes a while to load.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from flax.typing import Initializer
from jaxtyping import Array, Float, Int, Num

from vmapbn_flax.nn import batch_norm, batch_renorm
from vmapbn_flax.nn.axes import AxisName
from vmapbn_flax.nn.batch_norm import Mask
from vmapbn_flax.nn.checks import require_bool

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class BatchNorm(nnx.Module):
    """`vmapbn_flax.BatchNorm` for NNX: batch norm for one example, under `nnx.vmap` with a named axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from vmapbn_flax.nn.nnx import BatchNorm
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
      ...         self.norm = BatchNorm(3, axis_name="batch", rngs=rngs)
      ...     def __call__(self, x, mask=None):  # (4,) -> (3,)
      ...         return nnx.relu(self.norm(self.linear(x), mask=mask))
      >>> net = Net(nnx.Rngs(0))
      >>> forward = nnx.vmap(lambda net, x: net(x), in_axes=(None, 0), axis_name="batch")
      >>> forward(net, jnp.ones((8, 4))).shape, net.norm.mean.shape
      ((8, 3), (3,))
      >>> net.eval()
      >>> net(jnp.ones(4)).shape
      (3,)

    The statistics exist once, since `in_axes` is None for the network. The variables are those of
    `flax.nnx.BatchNorm`, which has the same names: `scale` and `bias`, of type `nnx.Param`, `mean` and `var`, of type
    `nnx.BatchStat`; with `momentum=None` there is a `count` too. `model.train()`, `model.eval()` and `nnx.view` say
    which statistics to normalise by.

    Attributes:
      num_features: the size of the last axis.
      use_running_average: whether to normalise by the running statistics, as in evaluation, or by those of the batch,
        which moves the running ones. As in `flax.nnx`, the default is False, and an argument of the call wins.
      dtype: of the result. If it is complex, so is the running mean from the start.
      rngs: the stream `params` initialises `scale` and `bias`.
      scale_metadata: of the variable `scale`, such as its sharding.
      bias_metadata: of the variable `bias`.

    The others are those of `vmapbn_flax.BatchNorm`. `frozen` outlasts `model.train()`, `use_running_average` does not.
    """

    linen: ClassVar[type[batch_norm.BatchNorm]] = batch_norm.BatchNorm

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis_name: AxisName | None = "batch",
        replica_axis_name: AxisName = (),
        momentum: float | Float[Array, ""] | None = 0.99,
        epsilon: float | Float[Array, ""] = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        use_fast_variance: bool = False,
        unbiased_running_var: bool = False,
        frozen: bool = False,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis_name = axis_name
        self.replica_axis_name = replica_axis_name
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.use_fast_variance = use_fast_variance
        self.unbiased_running_var = unbiased_running_var
        self.frozen = frozen

        def parameter(init: Initializer, metadata: Mapping[str, Any]) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype), **metadata)

        self.scale = parameter(scale_init, scale_metadata) if use_scale else nnx.data(None)
        self.bias = parameter(bias_init, bias_metadata) if use_bias else nnx.data(None)
        bare, x = self._linen().clone(use_scale=False, use_bias=False), jnp.zeros(num_features, dtype or param_dtype)
        for name, value in bare.init({}, x, train=False)["batch_stats"].items():
            setattr(self, name, nnx.BatchStat(value))

    def __call__(
        self,
        x: Num[Array, "*positions features"],
        use_running_average: bool | None = None,
        *,
        mask: Mask | None = None,
    ) -> Num[Array, "*positions features"]:
        """Normalises `x`, and moves the running statistics if it does so by those of the batch.

        Args:
          x: as the Linen layer takes it.
          use_running_average: in place of the attribute.
          mask: booleans or weights that say which values count, as the Linen layer takes them.

        Raises:
          NameError, ValueError: as the Linen layer's, whose `train=False` is `use_running_average=True` here.
          TypeError: `use_running_average` is not a bool, or is neither in the call nor the attribute.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        require_bool(evaluate, type(self).__name__, "use_running_average")
        variables = {kind: self._values(type_) for kind, type_ in _COLLECTIONS.items()}
        train = not evaluate
        y, updates = self._linen().apply(variables, x, train=train, mask=mask, mutable=["batch_stats"] * train)
        for name, value in updates.get("batch_stats", {}).items():
            getattr(self, name).set_value(value)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view(model, use_running_average=...)` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _linen(self) -> batch_norm.BatchNorm:
        """The Linen layer of these attributes."""
        names = {field.name for field in dataclasses.fields(self.linen)} & vars(self).keys()
        return self.linen(**{name: getattr(self, name) for name in names}, parent=None)

    def _values(self, type_: type[nnx.Variable]) -> dict[str, Array]:
        return {name: value.get_value() for name, value in vars(self).items() if isinstance(value, type_)}


class BatchedBatchNorm(BatchNorm):
    """`vmapbn_flax.BatchedBatchNorm` for NNX, on a whole batch, in place of `flax.nnx.BatchNorm`."""

    linen: ClassVar[type[batch_norm.BatchNorm]] = batch_norm.BatchedBatchNorm

    def __init__(self, num_features: int, *, axis_name: AxisName | None = (), **attributes: Any) -> None:
        super().__init__(num_features, axis_name=axis_name, **attributes)


class BatchRenorm(BatchNorm):
    """`vmapbn_flax.BatchRenorm` for NNX, with its attributes, those of `BatchNorm` and a statistic `count`."""

    linen: ClassVar[type[batch_norm.BatchNorm]] = batch_renorm.BatchRenorm

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | Float[Array, ""] = 3.0,
        d_max: float | Float[Array, ""] = 5.0,
        warmup_steps: int | Int[Array, ""] = 5_000,
        r_max_steps: int | Int[Array, ""] = 40_000,
        d_max_steps: int | Int[Array, ""] = 25_000,
        **attributes: Any,
    ) -> None:
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        self.r_max_steps = r_max_steps
        self.d_max_steps = d_max_steps
        super().__init__(num_features, **attributes)


class BatchedBatchRenorm(BatchRenorm, BatchedBatchNorm):
    """`vmapbn_flax.BatchedBatchRenorm` for NNX, on a whole batch."""

    linen: ClassVar[type[batch_norm.BatchNorm]] = batch_renorm.BatchedBatchRenorm


def from_nnx(model: nnx.Module) -> dict[str, Any]:
    """The variables of an NNX model as those of a Linen model that has the same names.

    Returns:
      `{"params": ..., "batch_stats": ...}`, without those there are none of. Entries of lists get the names that
      Linen gives them: `layers[0]` becomes `layers_0`.
    """
    variables = {kind: _values(model, type_) for kind, type_ in _COLLECTIONS.items()}
    return {kind: traverse_util.unflatten_dict(values) for kind, values in variables.items() if values}


def to_nnx(variables: Mapping[str, Any], model: nnx.Module) -> None:
    """The inverse of `from_nnx`: `model` gets the numbers of `variables`.

    Raises:
      ValueError: the names or shapes of `variables` are not those of `model`.
    """
    new = {kind: traverse_util.flatten_dict(variables.get(kind, {})) for kind in _COLLECTIONS}
    for kind, type_ in _COLLECTIONS.items():
        old = _values(model, type_)
        for path in old | new[kind]:
            got, wanted = (np.shape(values[path]) if path in values else "nothing" for values in (new[kind], old))
            if got != wanted:
                raise ValueError(f"got {got} for {kind}/{'/'.join(path)} in the variables; the model has {wanted}.")
    for kind, type_ in _COLLECTIONS.items():
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, type_))]
        state = [(path, type_(jnp.asarray(new[kind][_linen_path(path)]))) for path in paths]
        nnx.update(model, nnx.from_flat_state(state))


def _values(model: nnx.Module, type_: type[nnx.Variable]) -> dict[tuple[str, ...], Array]:
    state = nnx.to_flat_state(nnx.state(model, type_))
    return {_linen_path(path): variable.get_value() for path, variable in state}


def _linen_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of `path` with a number joined to the name of the list that it is of."""
    names: list[str] = []
    for part in path:
        names[-1:] = [f"{names[-1]}_{part}"] if isinstance(part, int) else [*names[-1:], part]
    return tuple(names)
