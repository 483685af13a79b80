"""The `--config` flag: a config file of ml_collections, with overrides, or one line that says what is wrong."""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vmapbn_flax.cli import environment
from vmapbn_flax.config import flat
from vmapbn_flax.errors import UsageError, UserError
from vmapbn_flax.networks import choose_network, refuse_untrusted

_PROGRAM = "train.py"  # absl skips the first argument
_SAVED = "saved.py"  # the name of the config file whose argument is a workdir


def parse_config(arguments: Sequence[str]) -> tuple[ConfigDict, Path]:
    """The config that `--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...` describes, and the default workdir.

    The default workdir is `runs/<name of the file>`, or `runs/<name of the file>_<argument>`. The argument of a file
    called `saved.py`, such as `configs/saved.py`, is itself the workdir. The file can import modules of the current
    directory.

    Raises:
      UsageError: a flag, a field, a value or the file is wrong.
    """
    environment.import_from_here()  # a config file may import another
    try:
        config, source, rest = _read_file(arguments)
        stray = _override(config, rest)
    except UserError:
        raise
    # Whatever the config file's own code raises arrives here as well.
    except Exception as error:
        raise UsageError(_explain(error)) from error
    if stray:
        raise UsageError(f"got the stray argument {stray[0]!r}, expected only flags, such as --config.seed=1")
    return config, _default_workdir(source)


def _read_file(arguments: Sequence[str]) -> tuple[ConfigDict, str, list[str]]:
    """The config of the file that `--config` names, that name, and the other arguments."""
    values = flags.FlagValues()
    values.set_gnu_getopt()
    flags.DEFINE_string("config", None, "the config file", flag_values=values)
    values([_PROGRAM, *arguments], known_only=True)
    file = (values["config"].value or "").partition(":")[0]
    if file and Path(file).suffix != ".py":  # the file is run, and a workdir's must not be
        raise UsageError(
            f"--config={file}: got a file that is not Python, expected one that ends in .py and has a get_config(). "
            f"For the config of an earlier run write --config=configs/saved.py:{Path(file).parent}"
        )

    values = flags.FlagValues()
    values.set_gnu_getopt()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[_PROGRAM])
    rest = values([_PROGRAM, *arguments], known_only=True)[1:]
    config = values["config"].value
    source = config_flags.get_config_filename(values["config"])
    getattr(config, "lock", None)  # raises if the file could not be read
    if not isinstance(config, ConfigDict):
        raise UsageError(
            f"{source}: got a {type(config).__name__} from its get_config(), expected a ConfigDict. "
            f"Return one made from vmapbn_flax.default_config()."
        )
    return config, source, rest


def _override(config: ConfigDict, arguments: Sequence[str]) -> list[str]:
    """Changes the fields that `arguments` name, and returns the arguments that name none.

    The name of a network comes first: the attributes of the network are fields, too.
    """
    names = flags.FlagValues()
    names.set_gnu_getopt()
    flags.DEFINE_string("config.model.name", None, "the network", flag_values=names)
    rest = names([_PROGRAM, *arguments], known_only=True)
    if (name := names["config.model.name"].value) is not None:
        choose_network(config, name)
    refuse_untrusted(flat(config).get("model.name", ""))
    config.lock()
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    return values(rest)[1:]


def _default_workdir(source: str) -> Path:
    """The workdir of the config file and argument in `source`; no argument but that of `saved.py` leaves `runs/`."""
    file, _, argument = source.partition(":")
    if argument and Path(file).name == _SAVED:
        return Path(argument)
    suffix = "_" + re.sub(r"[^\w.,=+-]", "_", argument) if argument else ""
    return Path("runs") / (Path(file).stem + suffix)


def _explain(error: Exception) -> str:
    """One line that says what is wrong, from an error of absl, ml_collections or a config file."""
    if isinstance(error, config_flags.config_flags.UnparsedFlagError):
        return "got no --config, expected a config file, such as --config=configs/vmap_bn.py"
    text = str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"got the unknown flag --{error.flagname}, expected --config, --config.FIELD, or one that --help lists"
    if isinstance(error, KeyError | AttributeError):  # an unknown field, quoted once or twice
        lines = [line.strip(" '\"\\") for line in text.replace("\\n", "\n").splitlines()]
        return (
            f"got an unknown field ({': '.join(lines)}), expected one of vmapbn_flax.default_config(), or of those "
            f"that the config file sweeps"
        )
    # The message may quote a whole traceback, whose last line is the reason.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OSError):
        return f"got a config file that cannot be read ({lines[-1]}), expected one, such as --config=configs/vmap_bn.py"
    reason = lines[0] if len(lines) == 1 else f"{lines[0].removesuffix(':')}: {lines[-1]}"
    if not isinstance(error, flags.Error):
        reason = f"{type(error).__name__} in the config file: {reason}"
    return (
        f"got a command line or config file that cannot be used ({reason}), expected fields of "
        f"vmapbn_flax.default_config()"
    )
