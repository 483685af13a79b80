"""The commands and their arguments."""

import argparse
from pathlib import Path
from typing import NoReturn

from vmapbn_flax.errors import UsageError

_CONFIG_HELP = """\
  --config=FILE         the config: configs/vmap_bn.py, configs/batched_bn.py, configs/no_bn.py, a file of your own
  --config=configs/saved.py:DIRECTORY
                        the config that the run in DIRECTORY was made with, to continue it
  --config.FIELD=VALUE  changes a field of vmapbn_flax.default_config()

examples:
  python train.py --config=configs/vmap_bn.py
  python train.py --config=configs/vmap_bn.py --config.optimizer.learning_rate=3e-3 --workdir=runs/slower
  python train.py --config=configs/saved.py:runs/slower --config.train.num_epochs=40"""

_NETWORK_HELP = "the name of the run's network, if that is a module of your own: package.module:Class"


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("got an empty path")
    return Path(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.format_usage()}")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vmapbn-flax",
        description="Trains networks with batch norm that are written one example at a time, and evaluates them.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    command = commands.add_parser(
        "train",
        help="train or resume one run",
        description="Trains the run that a config describes. The same command resumes one that was stopped.",
        usage="python train.py --config=FILE [--config.FIELD=VALUE ...] [--workdir=DIRECTORY]",
        epilog=_CONFIG_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--workdir", type=_path, help="where the run lives; default: runs/<config name>")
    command.set_defaults(command="train", takes_config=True)

    command = commands.add_parser("evaluate", help="evaluate a checkpoint", allow_abbrev=False)
    command.add_argument("workdir", type=_path)
    command.add_argument("--step", type=int, help="default: the newest checkpoint")
    command.add_argument("--network", help=_NETWORK_HELP)
    command.add_argument("--norm", choices=("vmap", "batched"), help="default: as the run was trained")
    command.set_defaults(command="evaluate", takes_config=False)

    command = commands.add_parser("refresh", help="recompute running statistics exactly", allow_abbrev=False)
    command.add_argument("workdir", type=_path)
    command.add_argument("--step", type=int, help="default: the newest checkpoint")
    command.add_argument("--network", help=_NETWORK_HELP)
    command.set_defaults(command="refresh", takes_config=False)

    command = commands.add_parser("parity", help="compare the vmapped and the batched network", allow_abbrev=False)
    command.set_defaults(command="parity", takes_config=True)

    command = commands.add_parser("selftest", help="compare a resumed run with an undisturbed one", allow_abbrev=False)
    command.set_defaults(command="selftest", takes_config=True)

    command = commands.add_parser("plot", help="draw several runs in one picture", allow_abbrev=False)
    command.add_argument("workdirs", type=_path, nargs="+", metavar="workdir")
    command.add_argument("-o", "--output", type=_path, required=True, help="the picture, a .png, .pdf or .svg")
    command.set_defaults(command="plot", takes_config=False)

    command = commands.add_parser("report", help="rank the members of a sweep and draw them", allow_abbrev=False)
    command.add_argument("workdir", type=_path)
    command.set_defaults(command="report", takes_config=False)
    return parser
