"""A network of your own: a Flax module for one example, trained without touching the package.

python train.py --config=configs/own_network.py
python train.py --config=configs/own_network.py --config.model.width=8
"""

from collections.abc import Callable

from flax import linen as nn

from vmapbn_flax import default_config


class Net(nn.Module):
    """Two convolutions, each with a norm, and a mean over the positions."""

    num_classes: int
    norm: Callable[..., nn.Module] | None
    width: int = 16

    @nn.compact
    def __call__(self, x, *, train, mask=None):  # (height, width, channels) -> (num_classes,)
        for i in range(2):
            x = nn.Conv(self.width * 2**i, (3, 3), use_bias=self.norm is None, name=f"conv_{i}")(x)
            if self.norm is not None:
                x = self.norm(name=f"norm_{i}")(x, train=train, mask=mask)
            x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(self.num_classes, name="logits")(x.mean((0, 1)))


def get_config():
    config = default_config("configs.own_network:Net")
    config.train.num_epochs = 5.0
    return config
