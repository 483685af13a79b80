"""The defaults; vmapbn_flax/defaults.py has a comment on each. The other files here change a few of them."""

from vmapbn_flax import default_config as get_config  # noqa: F401
