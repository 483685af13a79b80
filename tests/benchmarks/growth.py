"""How the time of an example grows with the batch, the width, the data set and the number of members."""

import time
from collections.abc import Callable

import jax
import numpy as np
from epochs import as_inputs, long_config, make_epochs, make_floor, make_traffic
from measure import Times, median, say, spread, table, take_turns

from vmapbn_flax import default_config
from vmapbn_flax.data import Dataset, Split, load_dataset
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs

BATCHES = (32, 128, 512, 2048, 8192)
WIDTHS = (100, 200, 400, 800, 1600)
EXAMPLES = (60_000, 120_000, 300_000, 600_000)
MEMBERS = (1, 4, 16, 64, 256)
SECONDS = 0.3  # of a turn, about
CHUNK_SECONDS = (
    1.0  # of a turn of members: a run's chunk, after which the state of every member has been read and written
)

INTRO = """\
Microseconds of training per example, and member, on one device: constant where time grows in proportion. All but what
is named stays 60,000 examples, batches of 128, three layers of 100 and one run. A turn is a few steps, as many as
take about {seconds} s. For the size of the data set it is a whole epoch, of MNIST repeated, drawing its order
included; for members it is a chunk of a run, of about {chunk_seconds} s. The floor is two programs that run in the same
rounds, over the same batches: the matrix products alone, and the least memory traffic of Adam, in which parameters and
both moments are read and written once and gradients are read once."""

# What a turn trains, and the examples, times members, that it goes through.
Turn = tuple[Callable[[], object], int]


def make_turn(programs: Programs, examples_a_step: int, seconds: float = SECONDS) -> Turn:
    """The first steps of a run or a group, over and over, as many as take so many seconds."""
    state = programs.create()

    def take(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        state = jax.block_until_ready(programs.advance(state, 0, steps))
        return time.perf_counter() - started

    few = min(3, programs.steps_per_epoch)
    take(few)  # compiles
    steps = int(np.clip(seconds * few / take(few), 1, programs.steps_per_epoch))
    return lambda: take(steps), steps * examples_a_step


def of_batches_or_widths(dataset: Dataset, images: jax.Array, field: str, values: tuple) -> dict[str, Turn]:
    turns = {}
    for value in values:
        config = long_config()
        config.update_from_flattened_dict({field: value})
        size, label = config.train.batch_size, str(value[0] if isinstance(value, tuple) else value)
        turn, examples = make_turn(Programs([config], dataset), size)
        turns[label] = turn, examples
        turns[f"{label} products"] = make_floor(config, images, examples // size), examples
        turns[f"{label} traffic"] = make_traffic(config, images.shape[1], examples // size), examples
    return turns


def repeated(dataset: Dataset, examples: int) -> Dataset:
    times = examples // len(dataset.train)
    train = Split(np.tile(dataset.train.images, (times, 1, 1)), np.tile(dataset.train.labels, times))
    return Dataset(dataset.name, dataset.num_classes, train, dataset.test)


def of_data(dataset: Dataset, sizes: tuple) -> dict[str, Turn]:
    turns = {}
    for size in sizes:
        programs = Programs([long_config()], repeated(dataset, size))
        turns[f"{size:,}"] = make_epochs(programs), programs.steps_per_epoch * 128
    return turns


def of_members(dataset: Dataset, counts: tuple) -> dict[str, Turn]:
    turns = {}
    for count in counts:
        configs = [long_config() for _ in range(count)]
        for seed, config in enumerate(configs):
            config.seed = seed
        devices = mesh.member_mesh(configs[0].mesh, 1)
        turns[str(count)] = make_turn(Programs(configs, dataset, devices), 128 * count, CHUNK_SECONDS)
    return turns


def microseconds(turns: dict[str, Turn], repetitions: int) -> Times:
    """Per example, and member."""
    times = take_turns({name: turn for name, (turn, _) in turns.items()}, repetitions)
    return {name: [1e6 * value / turns[name][1] for value in seconds] for name, seconds in times.items()}


def growth_table(what: str, times: Times) -> str:
    first = next(iter(times))
    header, rows = [what, "µs an example", "quartiles", f"to {first}"], []
    if f"{first} products" in times:
        header += ["products", "traffic", "to products", "to both"]
    for name, values in times.items():
        if name.endswith((" products", " traffic")):
            continue
        rows.append([name, median(values), spread(values), median(np.array(values) / times[first])])
        if f"{name} products" in times:
            products, traffic = np.array(times[f"{name} products"]), np.array(times[f"{name} traffic"])
            ratios = [values / products, values / (products + traffic)]
            rows[-1] += [median(figures) for figures in (products, traffic, *ratios)]
    return table(header, rows)


def run(repetitions: int, quick: bool) -> tuple[dict, str]:
    dataset = load_dataset(default_config().data)
    images = as_inputs(dataset)
    few = slice(2) if quick else slice(None)
    widths = tuple((width,) * 3 for width in WIDTHS)
    makers = {
        "batch": lambda: of_batches_or_widths(dataset, images, "train.batch_size", BATCHES[few]),
        "width": lambda: of_batches_or_widths(dataset, images, "model.hidden", widths[few]),
        "examples": lambda: of_data(dataset, EXAMPLES[few]),
        "members": lambda: of_members(dataset, MEMBERS[few]),
    }
    found, tables = {}, []
    for what, make in makers.items():
        say(f"  {what}")
        found[what] = microseconds(make(), repetitions)
        tables.append(growth_table(what, found[what]))
    return {"microseconds": found}, "\n\n".join([INTRO.format(seconds=SECONDS, chunk_seconds=CHUNK_SECONDS), *tables])
