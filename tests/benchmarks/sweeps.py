"""How soon a sweep finds good members: random draws, with halving, and proposed by Optuna with halving.

    python tests/benchmarks/sweeps.py                                         # an hour; for docs/sweeps.md
    python tests/benchmarks/sweeps.py --draws 6 --batch 3 --epochs 3 --first-rung 1 --seeds 0 --output trial.png

On MNIST, from the space of configs/sweep_best.py. Sweeps take turns, each a command with an empty cache of compiled
programs, and its seconds count from the start of that command. What a finished sweep found is kept in the directory,
and read instead of measured again. Prints a table and draws the best validation accuracy so far against seconds.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from commands import Caches
from matplotlib.figure import Figure
from measure import ROOT, machine, say, table

from vmapbn_flax.runs.pictures import PERCENT

# The changes of `sweep_options`, and how a line is drawn.
METHODS: dict[str, tuple[dict[str, Any], str, str]] = {
    "random": ({}, "tab:gray", ":"),
    "random, halving": ({"halving": 3}, "tab:blue", "--"),
    "Optuna, halving": ({"halving": 3, "mode": "optuna"}, "tab:red", "-"),
}
PLAIN, *OTHERS = METHODS
MARGIN = 0.0005  # below the best of the plain sweep

Curve = list[tuple[float, float]]  # seconds, and the best validation accuracy by then


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=48, help="members of a sweep, default: %(default)s")
    parser.add_argument("--batch", type=int, default=12, help="members that Optuna proposes at once: %(default)s")
    parser.add_argument("--epochs", type=float, default=30.0, help="of a member that is not stopped: %(default)s")
    parser.add_argument("--first-rung", type=float, default=3.0, help="epochs up to the first rung: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the draws, default: 0 1 2")
    parser.add_argument("--directory", type=Path, default=ROOT / "runs" / "benchmark_sweeps", help="of the sweeps")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "sweeps.png", help="default: %(default)s")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # a method, a seed, and when it was started
    return parser.parse_args()


def measure(arguments: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    """Trains one sweep, in this process."""
    from vmapbn_flax.cli.main import main
    from vmapbn_flax.sweeps.progress import SweepProgress
    from vmapbn_flax.sweeps.results import load_sweep

    method, seed, started = arguments.measure
    options = {"size": arguments.draws, "batch": arguments.batch, "first_rung": arguments.first_rung, "seed": seed}
    fields = {f"sweep_options.{name}": value for name, value in {**options, **METHODS[method][0]}.items()}
    fields["train.num_epochs"] = arguments.epochs
    fields["sweep.optimizer.warmup_epochs"] = ("uniform", 0.0, 4.0 * arguments.epochs / 30.0)
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    curve: Curve = []
    evaluated = SweepProgress.evaluated

    def noted(progress: SweepProgress, step: int, results: Any) -> None:
        best = max((result["validation_accuracy"] for result in results if result), default=0.0)
        curve.append((time.time() - float(started), max([best, *(accuracy for _, accuracy in curve[-1:])])))
        evaluated(progress, step, results)

    SweepProgress.evaluated = noted  # type: ignore[method-assign]
    if main(["train", "--config=configs/sweep_best.py", *flags, f"--workdir={workdir}"]):
        raise RuntimeError(f"the sweep {method}, seed {seed}, has failed members")
    members = load_sweep(workdir)
    steps = sum(member["step"] for member in members) / max(member["step"] for member in members)
    best = max(members, key=lambda member: member["best_validation_accuracy"] or 0.0)
    return {
        "curve": curve,
        "seconds": time.time() - float(started),
        "epochs": steps * arguments.epochs,
        "test_accuracy": best["best_test_accuracy"],
    }


def run(arguments: argparse.Namespace, method: str, seed: int, caches: Caches) -> dict[str, Any]:
    """What a sweep found, from its file or from a process of its own."""
    sizes = {name: getattr(arguments, name.replace("-", "_")) for name in ("draws", "batch", "epochs", "first-rung")}
    workdir = arguments.directory / "_".join(map(str, (method.replace(", ", "_"), *sizes.values(), seed)))
    result = Path(f"{workdir}.json")
    if not result.exists():
        shutil.rmtree(workdir, ignore_errors=True)  # one that was cut short has no time
        flags = [f"--{name}={value}" for name, value in sizes.items()]
        command = [sys.executable, __file__, *flags, f"--directory={workdir}", "--measure", method, str(seed)]
        subprocess.run([*command, str(time.time())], env=caches.empty(), cwd=ROOT, check=True)
    found = json.loads(result.read_text())
    say(f"  {method}, seed {seed}: {found['curve'][-1][1]:.2%} in {found['seconds']:.0f} s")
    return found


def seconds_to(curve: Curve, accuracy: float) -> float:
    """When the curve reaches `accuracy`; infinity if it does not."""
    return next((seconds for seconds, best in curve if best >= accuracy - 1e-9), np.inf)


def shares(found: dict[str, list[dict[str, Any]]], method: str) -> np.ndarray:
    """Of each seed, when `method` is as good as the plain sweep but for the margin, over all seconds of that sweep."""
    return np.array(
        [
            seconds_to(sweep["curve"], plain["curve"][-1][1] - MARGIN) / plain["seconds"]
            for sweep, plain in zip(found[method], found[PLAIN], strict=True)
        ]
    )


def mean(values: Any, scale: float = 1.0, digits: int = 2) -> str:
    """With the standard deviation over the seeds, if there are several."""
    values = scale * np.array(values)
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        [
            method,
            mean([sweep["curve"][-1][1] for sweep in sweeps], 100),
            mean([sweep["test_accuracy"] for sweep in sweeps], 100),
            mean([sweep["epochs"] for sweep in sweeps], digits=0),
            mean([sweep["seconds"] for sweep in sweeps], digits=0),
            ", ".join(f"{share:.2f}" if np.isfinite(share) else "never" for share in shares(found, method)),
        ]
        for method, sweeps in found.items()
    ]
    header = ["sweep", "best validation accuracy, %", "its test accuracy, %", "epochs", "seconds", "share of the time"]
    lines = [table(header, rows), ""]
    for method in OTHERS:
        share = np.median(shares(found, method))
        reached = f"after {share:.2f} of its time" if np.isfinite(share) else "for less than half of the seeds"
        lines.append(f"{method} reaches the plain sweep's best minus {MARGIN:.2%} {reached} (median over the seeds).")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], output: Path) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    last = max(sweep["seconds"] for sweeps in found.values() for sweep in sweeps)
    seconds = np.linspace(0, last, 1000)
    for method, (_, colour, style) in METHODS.items():
        curves = []
        for sweep in found[method]:
            times, best = np.array(sweep["curve"]).T
            axes.step(times, best, where="post", color=colour, linewidth=0.6, alpha=0.7)
            index = np.searchsorted(times, seconds, side="right") - 1
            curves.append(np.where(index >= 0, best[index], np.nan))
        end = np.max([sweep["seconds"] for sweep in found[method]])
        middle = np.where(seconds <= end, np.median(curves, axis=0), np.nan)
        axes.step(seconds, middle, where="post", color=colour, linestyle=style, linewidth=2, label=method)
    best = max(sweep["curve"][-1][1] for sweeps in found.values() for sweep in sweeps)
    worst = min(sweep["curve"][-1][1] for sweeps in found.values() for sweep in sweeps)
    axes.set(xlabel="seconds", ylabel="best validation accuracy so far", xlim=(0, None))
    axes.set_ylim(worst - max(0.01, best - worst), best + 0.001)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(METHODS))
    figure.savefig(output, dpi=120)


def main() -> None:
    arguments = parse()
    if arguments.measure:
        found = measure(arguments, arguments.directory)
        Path(f"{arguments.directory}.json").write_text(json.dumps(found))
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    sweeps: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as directory:
        for seed in arguments.seeds:
            for method, found in sweeps.items():
                found.append(run(arguments, method, seed, Caches(Path(directory))))
    draw(sweeps, arguments.output)
    described = machine()
    where = f"{described['processor']}, {described['cores']} cores"
    print(f"{where}; {arguments.draws} members, {arguments.epochs:g} epochs.\n\n{report(sweeps)}")


if __name__ == "__main__":
    main()
