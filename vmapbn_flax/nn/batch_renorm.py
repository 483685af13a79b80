"""Batch renormalisation (Ioffe, 2017): batch norm for small batches and for batches that are not alike.

Batch norm trains a network that sees mu_B and sigma_B, the statistics of the batch, and evaluates one that sees mu and
sigma, the running ones. The smaller the batch, the more the two differ. Batch renorm corrects the normalised value,

    (x - mu_B) / sigma_B * r + d,    r = sigma_B / sigma,    d = (mu_B - mu) / sigma,

which is (x - mu) / sigma, what evaluation computes. Gradients take r and d for constants, so that they still know of
mu_B and sigma_B. Limits on r and d keep training stable while the running statistics are poor.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from vmapbn_flax.nn.axes import AxisName
from vmapbn_flax.nn.batch_norm import BatchedBatchNorm, BatchNorm, Correction
from vmapbn_flax.nn.moments import Moments


class BatchRenorm(BatchNorm):
    """`BatchNorm` whose training batches are corrected towards the running statistics.

    r is limited to [1 / r_max, r_max] and d to [-d_max, d_max]; of complex `x`, the modulus of d. The limits follow the
    number of training steps: they are 1 and 0 for `warmup_steps` steps, in which the layer is `BatchNorm` bit for bit,
    and then grow linearly. The defaults are the paper's. A layer that starts to correct at once, at step N, has N for
    all three numbers of steps.

    The running statistics are those of `BatchNorm`: the average of the variances, where the paper averages standard
    deviations. Evaluation is the same. The number of steps with examples is `count` beside `mean` and `var`, as it is
    of `BatchNorm` with `momentum=None`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from vmapbn_flax import BatchRenorm
      >>> variables = BatchRenorm().init(jax.random.key(0), jnp.ones((28, 28, 3)), train=False)
      >>> jax.tree.map(jnp.shape, variables["batch_stats"])
      {'count': (), 'mean': (3,), 'var': (3,)}

    Attributes:
      r_max: the last limit of r, 1 or more. May be a traced scalar, as may the next four.
      d_max: the last limit of d, 0 or more.
      warmup_steps: the steps before the limits start to grow.
      r_max_steps: the steps before the limit of r is `r_max`.
      d_max_steps: the steps before the limit of d is `d_max`.
      Others: those of `BatchNorm`.
    """

    r_max: float | Float[Array, ""] = 3.0
    d_max: float | Float[Array, ""] = 5.0
    warmup_steps: int | Int[Array, ""] = 5_000
    r_max_steps: int | Int[Array, ""] = 40_000
    d_max_steps: int | Int[Array, ""] = 25_000

    _counts_steps = True

    def _correction(self, running: dict[str, nn.Variable], moments: Moments) -> Correction:
        inverse = lax.rsqrt(running["var"].value + self.epsilon)
        r = jnp.sqrt(moments.var + self.epsilon) * inverse
        # Far from zero, the two means agree in most digits: the difference needs those that rounding takes.
        d = (moments.mean - running["mean"].value + moments.lost) * inverse
        seen = running["count"].value
        r_max = 1 + (self.r_max - 1) * self._progress(seen, self.r_max_steps).astype(r.dtype)
        d_max = self.d_max * self._progress(seen, self.d_max_steps).astype(r.dtype)
        return lax.stop_gradient(Correction(jnp.clip(r, 1 / r_max, r_max), _within(d, d_max)))

    def _progress(self, seen: Int[Array, ""], end: int | Int[Array, ""]) -> Float[Array, ""]:
        """From 0 after `warmup_steps` steps to 1 after `end`."""
        part = (seen - self.warmup_steps) / jnp.maximum(end - self.warmup_steps, 1)
        return jnp.where(seen < end, jnp.clip(part, 0, 1), 1)


class BatchedBatchRenorm(BatchRenorm, BatchedBatchNorm):
    """`BatchRenorm` on a whole batch, `(batch, *spatial, features)`, as `BatchedBatchNorm` is `BatchNorm` on one."""

    axis_name: AxisName | None = ()


def _within(x: Inexact[Array, " features"], limit: Float[Array, ""]) -> Inexact[Array, " features"]:
    """`x`, where its modulus is larger than `limit` with that modulus."""
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -limit, limit)
    return jnp.where(jnp.abs(x) > limit, x * (limit / jnp.abs(x)), x)
