"""How fast training is, beside its matrix products and beside other libraries, in one command of about 25 minutes.

    pip install -e '.[peers]'
    python tests/benchmarks/performance.py > docs/performance.md
    python tests/benchmarks/performance.py --only epochs sweep --repetitions 5

Prints markdown, a table a section, and writes every single measurement to a JSON file. In each section everything takes
turns (A B C A B C ...); a figure is the median over the rounds, and a ratio the median of the ratios of each round.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import accuracy
import cold
import convolutions
import epochs
import growth
import program
import sweep
from measure import ROOT, machine, say

# What each section is called, its heading, what runs it, and its repetitions.
SECTIONS = {
    "epochs": ("Epochs", epochs.run, 8),
    "program": ("Epochs within a run", program.run, 5),
    "convolutions": ("Steps with convolutions", convolutions.run, 5),
    "cold": ("From the command to the end", cold.run, 3),
    "accuracy": ("To 97 and 98 %", accuracy.run_mlp, 3),
    "accuracy_conv": ("To 99 %, with convolutions", accuracy.run_conv, 1),
    "sweep": ("Members of a sweep", sweep.run, 3),
    "sweep_command": ("A whole sweep", sweep.run_command, 2),
    "growth": ("Growth", growth.run, 3),
}

HEAD = """\
# Performance

```bash
pip install -e '.[peers]'
python tests/benchmarks/performance.py > docs/performance.md
```

That takes about 25 minutes and leaves every single measurement in `docs/performance.json`. In each section everything
takes turns, so that other load on the machine affects all of it alike. Figures are medians over the rounds, with their
quartiles. A ratio is the median of the ratios of each round. [What makes it fast](speed.md) says what each change was
worth.

Machine: {processor}, {cores} cores, load {load:.2f} before the start. Python {python}, {versions}."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections")
    parser.add_argument("--repetitions", type=int, help="of every section; by default each has its own number")
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest sizes: a trial")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "performance.json", help="default: %(default)s")
    arguments = parser.parse_args()

    found = {"machine": machine(), "sections": {}}
    versions = ", ".join(f"{name} {version}" for name, version in found["machine"]["versions"].items())
    print(HEAD.format_map({**found["machine"], "versions": versions}), flush=True)
    status = 0
    for name in arguments.only:
        heading, run, repetitions = SECTIONS[name]
        repetitions = 1 if arguments.quick else arguments.repetitions or repetitions
        say(f"{name}: {repetitions} repetitions")
        started = time.monotonic()
        try:
            measured, markdown = run(repetitions, arguments.quick)
        except Exception:  # the others are still worth measuring
            traceback.print_exc()
            status = 1
            continue
        found["sections"][name] = {"repetitions": repetitions, **measured}
        arguments.json.write_text(json.dumps(found, indent=1))
        print(f"\n## {heading}\n\n{markdown}\n\nRounds: {repetitions}.", flush=True)
        say(f"{name}: {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
