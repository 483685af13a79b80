"""How smooth the loss is along a step, with and without batch norm: `python tests/benchmarks/smoothness.py`.

As in section 3 of Santurkar et al. (2018): the gradient of a training batch is measured at points along the step of
SGD, from half of it to four times as far. The smoothness is the largest difference from the gradient at the start,
relative to the distance. The network and the data are those of configs/paper.py. Prints a table and draws
docs/smoothness.png.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from configs import paper
from vmapbn_flax.data import load_dataset
from vmapbn_flax.training.programs import Programs

STEPS, EVERY, FARTHER = 3000, 100, (0.5, 1.0, 2.0, 4.0)
RATES = (0.1, 1.0)
OUTPUT = Path(__file__).parents[2] / "docs" / "smoothness.png"


def smoothness(programs: Programs, rate: float, num_steps: int = STEPS) -> np.ndarray:
    """The step, and there the largest difference of gradients relative to the distance, `(measurements, 2)`."""
    state, found = programs.create(), []
    for step in range(0, num_steps, EVERY):
        _, start = programs.gradients(state, step)
        quotients = []
        for times in FARTHER:
            params = jax.tree.map(lambda p, g, far=rate * times: p - far * g, state.params, start)
            _, there = programs.gradients(state.replace(params=params), step)
            difference = jax.tree.map(np.subtract, there, start)
            quotients.append(optax.global_norm(difference) / (rate * times * optax.global_norm(start)))
        found.append((step, max(map(float, quotients))))
        for first in range(step, step + EVERY, 50):  # within an epoch
            state = programs.advance(state, first, 50)
    return np.array(found)


def main() -> None:
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    print("| learning rate | batch norm | median | largest |\n|---|---|---|---|")
    for axes, rate in zip(panels, RATES, strict=True):
        for norm, label, style in (("none", "without", "--"), ("vmap", "with", "-")):
            config = paper.get_config()
            config.model.norm, config.optimizer.learning_rate = norm, rate
            steps, values = smoothness(Programs([config], load_dataset(config.data)), rate).T
            axes.plot(steps, values, style, color="black", label=f"{label} batch norm")
            print(f"| {rate:g} | {label} | {np.median(values):.2f} | {values.max():.2f} |", flush=True)
        axes.set(xlabel="training step", title=f"learning rate {rate:g}", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="change of the gradient\nrelative to the distance")
    panels[0].legend()
    figure.savefig(OUTPUT, dpi=120)


if __name__ == "__main__":
    main()
