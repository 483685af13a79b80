"""The command line: `python train.py ...` and `python -m vmapbn_flax <command> ...`.

What takes time to import is imported where it is used, by when `main` sees to signals and errors.
"""

import argparse
import atexit
import gc
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vmapbn_flax import signals
from vmapbn_flax.cli.cache import keep_compiled_programs
from vmapbn_flax.errors import EndedElsewhere, Interrupted, UsageError, UserError


def main(argv: Sequence[str], started: float | None = None) -> int:
    """Runs one command and returns its exit status; what goes wrong is one line on standard error."""
    started = time.monotonic() if started is None else started
    atexit.register(gc.freeze)  # or the interpreter searches JAX for garbage before it exits, which takes half a second
    try:
        with signals.fatal():
            keep_compiled_programs()
            arguments, rest = _parser().parse_known_args(argv)
            return arguments.run(arguments, rest, started) or 0
    except UserError as error:
        return _report(str(error), error.exit_status)
    except Interrupted as stop:
        return _report(str(stop), stop.exit_status)
    except EndedElsewhere as end:
        return end.exit_status
    except KeyboardInterrupt as stop:
        return _report(signals.STOPPED, 128 + (stop.args or (signal.SIGINT,))[0])
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            hint = "Lower model.hidden, train.batch_size or train.eval_batch_size."
            return _report(f"got out of memory ({error}); expected the network and its batches to fit. {hint}", 1)
        raise
    except OSError as error:
        where = error.filename or "the operating system"
        return _report(f"{where}: got {error.strerror or error}; expected to read or write there", 1)


def _report(message: str, status: int) -> int:
    print("error:" if status in (1, 2) else "note:", " ".join(message.split()), file=sys.stderr)
    return status


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("got an empty path")
    return Path(text)


_CONFIG_HELP = """\
  --config=FILE         the config: configs/vmap_bn.py, configs/batched_bn.py, configs/no_bn.py, a file of your own
  --config=configs/saved.py:DIRECTORY
                        the config that the run in DIRECTORY was made with, to continue it
  --config.FIELD=VALUE  changes a field; configs/default.py says what there is

examples:
  python train.py --config=configs/vmap_bn.py
  python train.py --config=configs/vmap_bn.py --config.optimizer.learning_rate=3e-3 --workdir=runs/slower
  python train.py --config=configs/saved.py:runs/slower --config.train.num_epochs=40"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.format_usage()}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m vmapbn_flax", description=__doc__, allow_abbrev=False)
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
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="evaluate a checkpoint", allow_abbrev=False)
    command.add_argument("workdir", type=_path)
    command.add_argument("--step", type=int, help="default: the newest checkpoint")
    command.add_argument("--norm", choices=("vmap", "batched"), help="default: as the run was trained")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("refresh", help="recompute running statistics exactly", allow_abbrev=False)
    command.add_argument("workdir", type=_path)
    command.add_argument("--step", type=int, help="default: the newest checkpoint")
    command.set_defaults(run=_refresh)

    command = commands.add_parser("parity", help="compare the vmapped and the batched network", allow_abbrev=False)
    command.set_defaults(run=_parity)

    command = commands.add_parser("selftest", help="compare a resumed run with an undisturbed one", allow_abbrev=False)
    command.set_defaults(run=_selftest)

    command = commands.add_parser("plot", help="lay runs over one another in a picture", allow_abbrev=False)
    command.add_argument("workdirs", type=_path, nargs="+", metavar="workdir")
    command.add_argument("-o", "--output", type=_path, required=True, help="the picture, a .png, .pdf or .svg")
    command.set_defaults(run=_plot)

    command = commands.add_parser("report", help="rank the members of a sweep, and draw them", allow_abbrev=False)
    command.add_argument("workdir", type=_path)
    command.set_defaults(run=_report_sweep)
    return parser


def _train(arguments: argparse.Namespace, rest: list[str], started: float) -> int:
    from vmapbn_flax.cli.flags import parse_config

    config, workdir = parse_config(rest)  # before the slow imports, so that a typo answers at once
    workdir = arguments.workdir or workdir
    from vmapbn_flax.config import is_sweep, validate

    if is_sweep(config):
        from vmapbn_flax.sweeps.train import train_sweep

        ledger = train_sweep(config, workdir)
        return 1 if ledger and ledger.count("failed") else 0
    validate(config)
    from vmapbn_flax.data import bundled

    if config.data.name == bundled.NAME:
        bundled.read_ahead(config.data.dir)  # beside the imports that follow
    from vmapbn_flax.runs.train import train

    train(config, workdir, started)
    return 0


def _evaluate(arguments: argparse.Namespace, rest: list[str], started: float) -> None:
    _refuse(rest)
    from vmapbn_flax.cli.evaluate import evaluate

    for name, value in evaluate(arguments.workdir, arguments.step, arguments.norm).items():
        print(name, value)


def _refresh(arguments: argparse.Namespace, rest: list[str], started: float) -> None:
    _refuse(rest)
    from vmapbn_flax.cli.refresh import refresh
    from vmapbn_flax.runs.console import table

    figures = refresh(arguments.workdir, arguments.step)
    rows = [(name, figures["before"][name], figures["after"][name]) for name in figures["before"]]
    table(rows, ("", "running statistics", "refreshed"), file=sys.stdout)


def _parity(arguments: argparse.Namespace, rest: list[str], started: float) -> int:
    from vmapbn_flax.cli.flags import parse_config

    config, _ = parse_config(rest)
    from vmapbn_flax.cli.parity import parity
    from vmapbn_flax.runs.console import table

    rows = parity(config)
    cells = [(*row, "yes" if row.within else "NO") for row in rows]
    header = ("vmapped against batched", "largest difference", "in ulps", "relative", "tolerance", "within")
    table(cells, header, file=sys.stdout)
    return 0 if all(row.within for row in rows) else 1


def _selftest(arguments: argparse.Namespace, rest: list[str], started: float) -> int:
    from vmapbn_flax.cli.flags import parse_config

    config, _ = parse_config(rest)
    from vmapbn_flax.cli.selftest import selftest
    from vmapbn_flax.runs.console import table

    found = selftest(config, rest)
    cells = [
        (what, size, f"NO: {len(different)} differ, first {different[0]}" if different else "yes")
        for what, size, different in found
    ]
    table(cells, ("stopped and resumed against undisturbed", "compared", "equal"), file=sys.stdout)
    return 1 if any(comparison.different for comparison in found) else 0


def _plot(arguments: argparse.Namespace, rest: list[str], started: float) -> None:
    _refuse(rest)
    from vmapbn_flax.runs.pictures import plot_runs

    plot_runs(arguments.workdirs, arguments.output)
    print(arguments.output)


def _report_sweep(arguments: argparse.Namespace, rest: list[str], started: float) -> None:
    _refuse(rest)
    from vmapbn_flax.sweeps.report import report

    report(arguments.workdir, file=sys.stdout)


def _refuse(rest: list[str]) -> None:
    if rest:
        raise UsageError(f"got the unknown argument {rest[0]!r}, expected those that --help lists")
