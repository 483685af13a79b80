"""The networks that a config can name: those of this package, and Flax modules of one's own.

A network is a Flax module for one example with the attributes `num_classes` and `norm`, called as
`network(image, train=train, mask=mask)`. Its other attributes are fields of `config.model`.
"""

import dataclasses
import difflib
import importlib
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from vmapbn_flax.errors import UsageError

# The fields of config.model that every network has; the others are attributes of its class.
COMMON = (
    "name",
    "norm",
    "batch_norm_momentum",
    "batch_norm_epsilon",
    "renorm_r_max",
    "renorm_d_max",
    "renorm_warmup_epochs",
    "renorm_full_epochs",
    "freeze_norm_after",
    "ghost_batch_size",
    "dtype",
)

# The values of config.model.norm that have a layer, in its form for one example, and in its form for a batch.
NORMS = {"vmap": "batched", "renorm": "batched_renorm"}

_PLAIN = (bool, int, float, str)
_UNTRUSTED = "untrusted:"  # before a name that a workdir gives: nothing imports it until a user says it


class _BuiltIn(NamedTuple):
    """A network of this package: its class in `vmapbn_flax.nn`, and the fields of its config, with their defaults."""

    class_name: str
    defaults: dict[str, Any]


BUILT_IN = {
    "mlp": _BuiltIn("MLP", {"hidden": (100, 100, 100), "kernel_std": 0.0}),
    "conv": _BuiltIn("ConvNet", {"features": (32, 64, 64)}),
    "resnet": _BuiltIn(
        "ResNet",
        {"blocks": (3, 3, 3), "width": 16, "bottleneck": False, "imagenet": False, "zero_scale": False},
    ),
}


def is_batched(norm: str) -> bool:
    """Whether `norm`, a value of `config.model.norm`, is the form of a layer for a whole batch."""
    return norm in NORMS.values()


def in_form(norm: str, *, batched: bool) -> str:
    """The value of `config.model.norm` for the same layer as `norm`, in its form for one example or for a batch."""
    one, batch = next(pair for pair in NORMS.items() if norm in pair)
    return batch if batched else one


def attributes(model: ConfigDict) -> dict[str, Any]:
    """The fields of `config.model` that are attributes of the network's class; lists become tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in model.items() if name not in COMMON
    }


def choose_network(config: ConfigDict, name: str) -> None:
    """Sets `config.model.name`, and replaces the attributes of the network before by the new one's, with its defaults.

    An attribute without a default becomes None, which `check_network` refuses. Those of an `untrusted` one are unknown.

    Raises:
      UsageError: see `import_network`.
    """
    model = config.model
    with model.unlocked():
        if model.name not in (name, untrusted(name)):
            defaults = _defaults(name)
            for attribute in attributes(model):
                del model[attribute]
            for attribute, value in defaults.items():
                model[attribute] = config_dict.placeholder(object) if value is dataclasses.MISSING else value
        model.name = name


def restore_network(config: ConfigDict, saved: dict[str, Any]) -> None:
    """Gives `config.model` the network in `saved`, the section `model` of a workdir's config; nothing is imported."""
    choose_network(config, untrusted(saved["name"]))
    if config.model.name not in BUILT_IN:
        with config.model.unlocked():
            config.model.update({name: value for name, value in saved.items() if name not in COMMON})
    saved["name"] = config.model.name


def untrusted(name: str) -> str:
    """The name of a network that a workdir gives: it may come from anywhere, and nothing imports what it names."""
    return _UNTRUSTED + name if ":" in name else name


def displayed(name: str) -> str:
    """The name of a network, `untrusted` or not, as a user says it."""
    return name.removeprefix(_UNTRUSTED)


def refuse_untrusted(name: str) -> None:
    """Refuses a name that a workdir, and nobody else, gave.

    Raises:
      UsageError: `name` is `untrusted`.
    """
    if name.startswith(_UNTRUSTED):
        name = displayed(name)
        raise UsageError(
            f"config.model.name: got {name!r} from a workdir, which must not name code to run. If you trust that "
            f"code, name it yourself: --config.model.name={name} for train, --network={name} for evaluate, refresh and "
            f"predict, network={name!r} for load_run"
        )


def check_network(model: ConfigDict) -> None:
    """Checks the name of the network, and that `model` has exactly the attributes of its class.

    An `untrusted` name is left to `import_network`.

    Raises:
      UsageError: see `import_network`; or an attribute is unknown or missing.
    """
    if model.name.startswith(_UNTRUSTED):
        return
    defaults = _defaults(model.name)
    if model.name not in BUILT_IN:
        import_network(model.name, batched=is_batched(model.norm))
    for name in attributes(model):
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            known = f"did you mean {close[0]}?" if close else f"it has: {', '.join(defaults) or 'none'}."
            raise UsageError(
                f"config.model.{name}: got an attribute that the network {model.name} does not have; {known} "
                f"Start from vmapbn_flax.default_config({model.name!r}), or correct the name."
            )
    for name in defaults:
        if model.get(name) is None:
            raise UsageError(
                f"config.model.{name}: got no value, expected one: the network {model.name} has no default for it. "
                f"Set it with --config.model.{name}=..."
            )


def _defaults(name: str) -> dict[str, Any]:
    """The attributes of a network that a config can set, with their defaults or `dataclasses.MISSING`."""
    if name in BUILT_IN:
        return BUILT_IN[name].defaults
    defaults: dict[str, Any] = {}
    if name.startswith(_UNTRUSTED):
        return defaults
    for field in dataclasses.fields(import_network(name)):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in ("num_classes", "norm", "parent", "name", *COMMON) and _is_plain(value):
            defaults[field.name] = value
    return defaults


def _is_plain(value: Any) -> bool:
    """Whether a config can hold `value`, and JSON save it; functions, for one, keep the class's default."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is dataclasses.MISSING or isinstance(value, _PLAIN)


def import_network(name: str, *, batched: bool = False) -> Any:
    """The class that `config.model.name` names.

    Args:
      name: of a network of this package, or `package.module:Class`.
      batched: whether to return the twin for a whole batch, `Batched<Class>` of the same module.

    Raises:
      UsageError: there is no such class, or it is not a network.
    """
    module, class_name = _import_module(name)
    if not hasattr(module, class_name):
        close = difflib.get_close_matches(class_name, dir(module), n=1)
        raise UsageError(
            f"config.model.name: got {name!r}, but {module.__name__} has no {class_name}; expected a Flax module there"
            f"{f'. Did you mean {close[0]}?' if close else ''}"
        )
    found = getattr(module, class_name)
    require_network(found, name)
    if not batched:
        return found
    if not has_twin(name):
        raise UsageError(
            f"config.model.norm: got a batched norm for {name!r}, but {module.__name__} has no Batched{class_name}; "
            f"expected it there: the network for a whole batch, with the same variables. Write it, or train with "
            f"--config.model.norm=vmap"
        )
    twin = getattr(module, f"Batched{class_name}")
    require_network(twin, f"{module.__name__}:Batched{class_name}")
    return twin


def has_twin(name: str) -> bool:
    """Whether there is a `Batched<Class>` beside the network; see `import_network`."""
    module, class_name = _import_module(name)
    return hasattr(module, f"Batched{class_name}")


def _import_module(name: str) -> tuple[ModuleType, str]:
    """The module of the network that `config.model.name` names, and the name of its class there."""
    refuse_untrusted(name)
    module_name, colon, class_name = name.partition(":")
    if name in BUILT_IN:
        module_name, class_name = "vmapbn_flax.nn", BUILT_IN[name].class_name
    elif not (colon and module_name and class_name):
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise UsageError(
            f"config.model.name: got {name!r}, expected one of {', '.join(BUILT_IN)}, or package.module:Class, a Flax "
            f"module of your own. {f'Did you mean {close[0]}? ' if close else ''}Change it with --config.model.name=..."
        )
    try:
        return importlib.import_module(module_name), class_name
    except ImportError as error:
        raise UsageError(
            f"config.model.name: got {name!r}, whose module cannot be imported ({error}); expected a module that "
            f"`python -c 'import {module_name}'` finds from the current directory."
        ) from error


def require_network(found: Any, name: str) -> None:
    """Checks that `found`, which `name` names, is a network's class.

    Raises:
      UsageError: it is not.
    """
    from flax import linen as nn  # here, since reading a config must not take the time of importing JAX

    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UsageError(
            f"config.model.name: got {name!r}, which is no flax.linen.Module; expected a class of that kind"
        )
    fields = {field.name for field in dataclasses.fields(found)}
    if missing := [field for field in ("num_classes", "norm") if field not in fields]:
        raise UsageError(
            f"config.model.name: got {name!r}, which has no attribute {' and no '.join(missing)}; expected both: the "
            f"number of logits, and what makes a norm (or None). See docs/your-network.md."
        )
