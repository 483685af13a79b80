"""The `--config` flag: a config file of ml_collections, with overrides, or one line that says what is wrong."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vmapbn_flax.errors import UsageError, UserError


def parse_config(arguments: Sequence[str]) -> tuple[ConfigDict, Path]:
    """The config that `--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...` spells, and its run's workdir.

    The workdir is `runs/<name of the file>`, or for a file that takes a workdir as its argument, such as
    `configs/saved.py`, that one.

    Raises:
      UsageError: a flag, a field, a value or the file is wrong.
    """
    argv = ["train.py", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        stray = values(argv)[1:]
        config, source = values["config"].value, values["config"].config_filename
    except UserError:
        raise
    # Whatever the config file's own code raises arrives here as well.
    except Exception as error:
        raise UsageError(_explain(error)) from error
    if stray:
        raise UsageError(f"got the stray argument {stray[0]!r}, expected only flags, such as --config.seed=1")
    if config is None:
        raise UsageError("got no --config, expected a config file, such as --config=configs/vmap_bn.py")
    config.lock()
    path, _, workdir = source.partition(":")
    return config, Path(workdir) if workdir else Path("runs") / Path(path).stem


def _explain(error: Exception) -> str:
    """The one line of an error from absl, ml_collections or a config file that says what is wrong.

    Theirs may quote a whole traceback, its newlines spelled out; the reason comes last.
    """
    if isinstance(error, config_flags.config_flags.UnparsedFlagError):
        return "got no --config, expected a config file, such as --config=configs/vmap_bn.py"
    lines = [line.strip(" '\"\\") for line in str(error).replace("\\n", "\n").splitlines() if line.strip()]
    first, last = lines[0].removesuffix(":"), lines[-1]
    reason = last if isinstance(error, OSError) or first == last else f"{first}: {last}"
    return f"got a command line that cannot be used ({reason}), expected flags of fields in configs/default.py"
