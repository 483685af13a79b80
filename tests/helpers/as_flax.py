"""A plugin of pytest: tests of flax.linen get this package's layer, by way of docs/batch-norm.md's class."""

import flax.linen as nn

from vmapbn_flax import BatchedBatchNorm


class FlaxBatchNorm(BatchedBatchNorm):
    use_running_average: bool | None = None

    def __call__(self, x, use_running_average=None, *, mask=None):
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        return super().__call__(x, train=not evaluate, mask=mask)


def pytest_configure():
    nn.BatchNorm = FlaxBatchNorm
