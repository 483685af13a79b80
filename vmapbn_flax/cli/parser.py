"""The commands and their arguments."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from vmapbn_flax.errors import UsageError

_CONFIG = "--config=FILE [--config.FIELD=VALUE ...]"
_CONFIG_HELP = """\
  --config=FILE         the config: configs/vmap_bn.py, configs/batched_bn.py, configs/no_bn.py, a file of your own
  --config=FILE:ARGUMENT
                        passes a text to the file's get_config()
  --config=configs/saved.py:DIRECTORY
                        the config that the run in DIRECTORY was made with, to continue it
  --config.FIELD=VALUE  changes a field of vmapbn_flax.default_config()

examples:
"""


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("got an empty path")
    return Path(text)


def _step(text: str) -> int | str:
    if text in ("best", "latest"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected the number of a step, best or latest")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.format_usage()}")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vmapbn-flax",
        description="Trains networks with batch norm that are written one example at a time, and evaluates them.",
        epilog="`vmapbn-flax command --help` describes a command. `python -m vmapbn_flax` is the same program; "
        "`python train.py`, in a clone, is short for `vmapbn-flax train`.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, summary: str, more: str = "", *, config: str = "") -> argparse.ArgumentParser:
        """Adds a command; `config` has the examples of one that takes a config."""
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary.capitalize()}. {more}".strip(),
            usage=f"vmapbn-flax {name} {_CONFIG}" if config else None,
            epilog=_CONFIG_HELP + config if config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(takes_config=bool(config))
        return command

    command = add(
        "train",
        "train or resume a run or a sweep",
        "The same command resumes one that was stopped.",
        config="""\
  vmapbn-flax train --config=configs/vmap_bn.py
  vmapbn-flax train --config=configs/vmap_bn.py --config.optimizer.learning_rate=3e-3 --workdir=runs/slower
  vmapbn-flax train --config=configs/saved.py:runs/slower --config.train.num_epochs=40""",
    )
    command.usage = f"{command.usage} [--workdir=DIRECTORY]"
    command.add_argument(
        "--workdir",
        type=_path,
        metavar="DIRECTORY",
        help="where the run lives; default: runs/<name of the config file>, with _<argument> if it has one",
    )

    workdir: dict[str, Any] = {"type": _path, "metavar": "workdir", "help": "of a run, such as runs/vmap_bn"}
    step: dict[str, Any] = {"type": int, "help": "of the checkpoint; default: the newest"}
    choice: dict[str, Any] = {
        "type": _step,
        "help": "of the checkpoint, or best, or latest; default: the best that was evaluated",
    }
    network: dict[str, Any] = {
        "metavar": "MODULE:CLASS",
        "help": "the run's network, if it is a module of your own: a workdir cannot have code imported",
    }

    command = add("evaluate", "evaluate a checkpoint", "Prints loss and accuracy on the validation and test images.")
    command.add_argument("workdir", **workdir)
    command.add_argument("--step", **step)
    command.add_argument("--network", **network)
    command.add_argument(
        "--norm", choices=("vmap", "batched"), help="variant of the network; default: as the run was trained"
    )
    command.add_argument(
        "--classes", action="store_true", help="print precision, recall and F1 of each class, and what is most confused"
    )
    command.add_argument(
        "--picture",
        type=_path,
        metavar="FILE",
        help="draw the confusion matrix and the surest mistakes: .png, .pdf, .svg",
    )
    command.add_argument("--csv", type=_path, metavar="FILE", help="write what the network says of each example")

    command = add("refresh", "recompute running statistics exactly", "The result is a workdir, <workdir>/refreshed.")
    command.add_argument("workdir", **workdir)
    command.add_argument("--step", **step)
    command.add_argument("--network", **network)

    command = add(
        "predict",
        "name the classes of images",
        "Takes PNG and JPEG files, folders of them, .npy and .npz files.\n"
        "Images of another size or kind are converted, which it says. Exits with 1 if a file cannot be read.",
    )
    command.add_argument("workdir", **workdir)
    command.add_argument("images", nargs="+", type=_path, metavar="image", help="a file or a folder")
    command.add_argument("--step", **choice)
    command.add_argument("--network", **network)
    command.add_argument("--top", type=_count, default=3, metavar="N", help="how many classes to show; default: 3")
    command.add_argument("--csv", type=_path, metavar="FILE", help="writes the probabilities of all classes")
    command.add_argument("--strict", action="store_true", help="refuses images that would have to be converted")
    command.add_argument(
        "--invert",
        action="store_true",
        help="exchanges dark and bright, for ink on paper where the training images were the opposite",
    )

    for name, summary, more in (
        ("export", "write a trained network for other programs", ""),
        (
            "fold",
            "export a network without its batch norms",
            "They move into the layers before them, and the predictions stay the same.",
        ),
    ):
        command = add(name, summary, more)
        command.add_argument("workdir", **workdir)
        command.add_argument(
            "-o",
            "--output",
            type=_path,
            required=True,
            metavar="FILE",
            help="a file that ends in .stablehlo (for JAX), .safetensors (variables), .pt (PyTorch) or .onnx",
        )
        command.add_argument("--step", **choice)
        command.add_argument("--network", **network)

    add(
        "parity",
        "compare the vmapped and the batched network",
        "Takes up to 100 steps with each, on the same batches. Exits with 1 if a difference is too large.",
        config="  vmapbn-flax parity --config=configs/vmap_bn.py",
    )
    add(
        "selftest",
        "compare a resumed run with an undisturbed one",
        "Trains twice, once with a stop. Exits with 1 if a result differs.",
        config="  vmapbn-flax selftest --config=configs/tiny.py",
    )

    command = add("plot", "draw several runs in one picture")
    command.add_argument("workdirs", nargs="+", **workdir)
    command.add_argument(
        "-o", "--output", type=_path, required=True, metavar="PICTURE", help="a file that ends in .png, .pdf or .svg"
    )

    command = add("report", "rank the members of a sweep and draw them", "The sweep may still be running.")
    command.add_argument("workdir", **workdir | {"help": "of a sweep, such as runs/sweep_lr"})
    command.add_argument("--top", type=_count, default=20, metavar="N", help="settings in the table; default: 20")

    command = add("figure", "draw a sweep as in the paper's figure 1", "The sweep may still be running.")
    command.add_argument("workdir", **workdir | {"help": "of a sweep of configs/paper.py, such as runs/paper"})
    return parser
