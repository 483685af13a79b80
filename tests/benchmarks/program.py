"""An epoch within a run of the program, beside the same epoch alone and its floor."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from commands import Caches, Finished, train
from epochs import as_inputs, long_config, make_epochs, make_floor
from measure import median, say, spread, table, timed

from vmapbn_flax import default_config
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.programs import Programs

BATCHES = (128, 32)
EPOCHS = 3

Seconds = dict[str, float]  # an epoch, by what was timed

INTRO = """\
Seconds an epoch, in commands of {epochs} epochs of `configs/vmap_bn.py` with a filled cache, and in the same rounds of
the epoch alone and its matrix products, as in the section on epochs. "train" is `seconds.train` of `summary.json` for
each epoch. It has the compiled program, drawing the order of the epoch, and fetching what rows need after each chunk of
steps; "outside" is what of it is not the compiled program. "Rows" is what the loop takes beside training, evaluations
and saves. During the first epoch threads load the programs that evaluate, and import what draws the picture."""


def parts(seconds: Mapping[str, float], speed: Mapping[str, float], examples: int, epochs: int) -> Seconds:
    """Where the time of a run went.

    Args:
      seconds: of the summary.
      speed: of the loop, in the names of `Timing.speed`.
      examples: that the run trained on.
    """
    loop = examples / speed["examples_per_second"]
    in_program = loop * (1 - speed["fraction_outside_device_program"])
    of_run = {
        "train": seconds["train"],
        "outside": seconds["train"] - in_program,
        "rows": loop - seconds["train"],
        "evaluations": seconds["evaluate"],
        "saves": seconds["checkpoint"],
    }
    return {name: value / epochs for name, value in of_run.items()}


def said_speed(finished: Finished) -> dict[str, float]:
    """The speed of the loop, which a command says at its end."""
    pattern = re.compile(r"(examples_per_second|fraction_outside_device_program) +(\S+)")
    return {match[1]: float(match[2]) for _, line in finished.lines if (match := pattern.search(line))}


def make_round(dataset: Dataset, size: int, environment: Callable[[], dict[str, str]]) -> Callable[[], Seconds]:
    """A round of batches of `size`."""
    config = long_config()
    config.train.batch_size = size
    programs = Programs([config], dataset)
    steps = programs.steps_per_epoch
    floor, epoch = make_floor(config, as_inputs(dataset), steps), make_epochs(programs)
    flags = (f"--config.train.num_epochs={EPOCHS}", f"--config.train.batch_size={size}")

    def round_() -> Seconds:
        with tempfile.TemporaryDirectory() as directory:
            workdir = Workdir(Path(directory, "run"))
            speed = said_speed(train(environment(), *flags, workdir=workdir.path))
            seconds = json.loads(workdir.summary.read_text())["seconds"]
        return {"products": timed(floor), "alone": timed(epoch), **parts(seconds, speed, EPOCHS * steps * size, EPOCHS)}

    return round_


def run(repetitions: int, quick: bool) -> tuple[dict, str]:
    dataset = load_dataset(default_config().data)
    sizes = BATCHES[:1] if quick else BATCHES
    rounds: dict[int, list[Seconds]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as directory:
        caches = Caches(Path(directory))
        measure = {size: make_round(dataset, size, caches.filled) for size in sizes}
        for repetition in range(repetitions + 1):  # the first one compiles, and is not counted
            for size in sizes:
                rounds[size].append(measure[size]())
            say(f"  round {repetition} of {repetitions}")

    found, rows = {}, []
    for size, of_size in rounds.items():
        times = {name: [seconds[name] for seconds in of_size[1:]] for name in of_size[0]}
        found[size] = times
        to_alone, to_products = (np.array(times["train"]) / times[name] for name in ("alone", "products"))
        rows.append([str(size), *(median(times[name], 3) for name in ("products", "alone", "train"))])
        rows[-1] += [median(to_alone), spread(to_alone), median(to_products)]
        rows[-1] += [median(times[name], 3) for name in ("outside", "rows", "evaluations", "saves")]
    header = ["batch", "products", "alone", "train", "to alone", "quartiles", "to products"]
    header += ["outside", "rows", "evaluations", "saves"]
    return {"seconds": found}, f"{INTRO.format(epochs=EPOCHS)}\n\n{table(header, rows)}"
