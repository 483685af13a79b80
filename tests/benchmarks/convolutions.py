"""Steps of the convolutional network: ours, two peers', and the floor, which is the convolutions alone.

They take turns in a process of its own, whose memory is kept as a command with convolutions keeps it.
`python convolutions.py 5` prints the seconds of a step, of each repetition, as JSON.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from epochs import OURS, make_epochs, make_peers
from measure import ROOT, median, ratio, spread, table, take_turns
from ml_collections import ConfigDict
from peers import CONV_NAMES

from configs import conv
from vmapbn_flax.cli.environment import keep_freed_memory
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.nn.images import _convolution
from vmapbn_flax.training.compiler import Compiler, Program
from vmapbn_flax.training.programs import Programs

FLOOR = "convolutions alone"
STEPS = 20  # of a turn

INTRO = """\
Steps of `configs/conv.py`: three blocks of 3x3 convolution, batch norm, relu and pooling, of 32, 64 and 64 channels,
and a dense layer; AdamW; batches of 128 of MNIST's training images, shifted at random. A turn is {steps} steps. The
floor is the convolutions and the dense product of the same network, forward and backward, in a compiled program that is
called for each step, as ours is: in a loop the gradients of convolutions take ten times as long on a CPU. There is
nothing elementwise in it. Flax Linen and PyTorch are written the way their own documentation writes them
(`tests/benchmarks/peers/`), PyTorch in its format `channels_last`."""


def make_floor(config: ConfigDict, side: int, num_steps: int) -> Callable[[], None]:
    """The convolutions and the dense product of `num_steps` steps: forward, and backward as in `backward`.

    Args:
      config: of the network and the batch size.
      side: the height and the width of the images, in pixels.
    """
    inputs, kernels = layers(config, side)
    program, compiler = Program("floor", backward), Compiler()

    def steps() -> None:
        for _ in range(num_steps):
            compiler.call(program, inputs, kernels)

    return steps


def layers(config: ConfigDict, side: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """What each convolution and the dense layer takes, from images of `side` x `side` pixels, and its kernel."""
    size, channels, inputs, kernels = config.train.batch_size, 1, [], []
    for features in config.model.features:
        inputs.append(jnp.full((size, side, side, channels), 1e-3))
        kernels.append(jnp.full((3, 3, channels, features), 1e-3))
        side, channels = side // 2, features
    inputs.append(jnp.full((size, side * side * channels), 1e-3))
    kernels.append(jnp.full((side * side * channels, 10), 1e-3))
    return inputs, kernels


def backward(inputs: list[jax.Array], kernels: list[jax.Array]) -> Any:
    """The gradients with respect to every kernel, and to every input but the images; each output is its own cotangent.

    All are results, so that the compiler drops none.
    """
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": None}

    def forward(hidden: list[jax.Array], kernels: list[jax.Array]) -> list[jax.Array]:
        *maps, flat = inputs[:1] + hidden
        convolved = zip(maps, kernels[:-1], strict=True)
        return [
            *(_convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), **options) for x, kernel in convolved),
            flat @ kernels[-1],
        ]

    outputs, pullback = jax.vjp(forward, inputs[1:], kernels)
    return pullback(outputs)


def make_ours(dataset: Dataset, norm: str) -> Callable[[], None]:
    config = conv.get_config()
    config.train.num_epochs = 1e5  # which no benchmark gets to the end of
    config.model.norm = norm
    return make_epochs(Programs([config], dataset))


def measure(repetitions: int) -> dict[str, list[float]]:
    """The seconds of a step, of each repetition."""
    keep_freed_memory()
    config = conv.get_config()
    dataset = load_dataset(config.data)
    # So few examples that an epoch is one turn.
    dataset = dataclasses.replace(dataset, train=dataset.train[: STEPS * config.train.batch_size])
    floor = make_floor(config, dataset.train.image_shape[0], STEPS)
    ours = {norm: make_ours(dataset, norm) for norm in OURS}
    peers = make_peers(dataset, "conv", CONV_NAMES)
    times = take_turns({FLOOR: floor, **ours, **peers}, repetitions)
    return {name: [value / STEPS for value in seconds] for name, seconds in times.items()}


def run(repetitions: int, quick: bool) -> tuple[dict, str]:
    command = [sys.executable, __file__, str(repetitions)]
    times = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
    others = [name for name in CONV_NAMES if name in times]
    rows = [
        [
            name,
            *(figure([1e3 * value for value in seconds], 1) for figure in (median, spread)),
            *(median(ratio(times, name, to)) for to in (FLOOR, *others)),
        ]
        for name, seconds in times.items()
    ]
    header = ["step, batch 128", "ms", "quartiles", "to the floor", *(f"to {name}" for name in others)]
    return {"seconds": times}, f"{INTRO.format(steps=STEPS)}\n\n{table(header, rows)}"


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
