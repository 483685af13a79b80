"""The compiled programs of a run, with the data they work on, on the device."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.config import validate_sizes
from vmapbn_flax.data import Dataset
from vmapbn_flax.training import mesh, steps
from vmapbn_flax.training.compiler import Compiler
from vmapbn_flax.training.hyperparameters import make_hyperparameters, steps_in
from vmapbn_flax.training.layout import Layout
from vmapbn_flax.training.metrics import EvalMetrics, compute
from vmapbn_flax.training.state import TrainState, create_state, learning_rate
from vmapbn_flax.training.stream import Stream

# Of a state, what `Programs.fetch` can be asked for.
PARTS: dict[str, Callable[[TrainState], PyTree]] = {
    "state": lambda state: state,
    "batch_stats": lambda state: state.batch_stats,
    "metrics": lambda state: state.metrics,
    "counters": lambda state: (state.step, state.skipped_steps, state.skipped_in_a_row),
}


class Programs:
    """Creates, advances and evaluates the state of a run of `config` on `dataset`.

    Each program is compiled when it is first called, or ahead of that when asked to; `compiler` has what it took.
    Batches are split over the axis `data` of the mesh `devices`, or lie on the default device without one.

    Raises:
      UsageError: the config does not fit the data.
    """

    _axes = ()  # of the mesh, that the leading axes of a state lie over

    def __init__(self, config: ConfigDict, dataset: Dataset, devices: Mesh | None = None):
        validate_sizes(config, len(dataset.train))
        self.devices = jax.devices()[:1] if devices is None else list(devices.devices.flat)
        if len(self.devices) == 1:
            devices = None
        self._sharding = devices and NamedSharding(devices, PartitionSpec(*self._axes))
        splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
        self._splits = {name: split for name, split in splits.items() if split is not None}
        divided = dataset.nbytes > config.mesh.replicate_limit
        self.layout = Layout(devices, by_columns=divided, in_batches=dataset.streamed)
        self.steps_per_epoch = len(dataset.train) // config.train.batch_size
        self.total_steps = steps_in(config.train.num_epochs, self.steps_per_epoch)
        self.hyper = self._host_hyper = make_hyperparameters(config, self.steps_per_epoch)
        self.compiler = Compiler(self._sharding)
        self._seed, self._num_train = config.seed, len(dataset.train)
        self._stream = None
        if dataset.streamed:
            self._stream = Stream(config, dataset, self.total_steps, self._order, self.layout, self._put_order)
        else:
            self._data = {name: self.layout.put(split) for name, split in self._splits.items()}
        self.selection = f"{'validation' if dataset.validation else 'test'}_accuracy"

        num_classes, num_features = dataset.num_classes, math.prod(dataset.train.image_shape)
        self._create = partial(create_state, config, num_classes, num_features)
        self._train_steps = steps.make_train_steps(config, num_classes, self.layout)
        self._gradients = steps.make_gradients(config, num_classes, self.layout)
        self._evaluate = steps.make_evaluate(config, num_classes, self.layout)
        self._population = steps.make_population_statistics(config, num_classes, self.layout)
        self._learning_rate = partial(learning_rate, config.optimizer)
        self._epoch_order = (-1, None)

    def where(self) -> str:
        """The devices in words, and what lies on them."""
        name = mesh.device_name(self.devices)
        if self.layout.count == 1:
            return name
        divided = self.layout.by_columns or self.layout.in_batches
        share = "a share of the data set" if divided else "the data set"
        return f"{name}, batches split over {self.layout.count} and {share} on each"

    def template(self) -> TrainState:
        """The shapes and types of the state."""
        return jax.eval_shape(self._create, self.hyper)

    def compile_ahead(self, step: int) -> None:
        """Starts to compile what trains from `step` on, beside whatever else comes first."""
        if "train" in self.compiler or step >= self.total_steps:
            return
        arguments = (self._placed_template(), self.hyper, *self._position(step), np.int32(1))
        self.compiler.start("train", self._train_steps, arguments, donate=(0,))

    def compile_measure_ahead(self) -> None:
        """Starts to compile what `measure` calls, beside the device at work; not of streamed data."""
        if self._stream:
            return
        state = self._placed_template()
        for name in self._splits:
            if name != "train" and name not in self.compiler:
                arguments = (state.params, state.batch_stats, self.hyper, *self._data[name])
                self.compiler.start(name, self._evaluate, arguments, trace_too=True)

    def _placed_template(self) -> TrainState:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding),
            jax.eval_shape(self._create, self.hyper),
        )

    def create(self) -> TrainState:
        """The state before the first step."""
        return self.compiler.call("create", self._create, self.hyper, once=True)

    def advance(self, state: TrainState, step: int, count: int) -> TrainState:
        """`count` steps from `step`, the step of `state`, on, within one epoch; `state` is used up."""
        end = step + count
        while step < end:
            if self._stream:
                count = min(end - step, self._stream.steps_left(step))
            arguments = (*self._position(step), np.int32(count))
            state = self.compiler.call("train", self._train_steps, state, self.hyper, *arguments, donate=(0,))
            del arguments
            step += count
        return state

    def gradients(self, state: TrainState, step: int) -> tuple[Array, PyTree]:
        """The logits of the batch that `step` trains on, `(batch, classes)`, and the loss's gradients."""
        return self.compiler.call("gradients", self._gradients, state, self.hyper, *self._position(step))

    def _position(self, step: int) -> tuple[Array, Array, Array, np.int32]:
        """The training set, its order in the epoch that `step` is in, and the number of the batch there.

        Of a streamed one a window.
        """
        if self._stream:
            return self._stream.position(step)
        epoch, first = divmod(step, self.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self._put_order(self._order(epoch)))
        return (*self._data["train"], self._epoch_order[1], np.int32(first))

    def _order(self, epoch: int) -> np.ndarray:
        return steps.epoch_permutation(self._seed, epoch, self._num_train)

    def measure(self, state: TrainState) -> dict[str, EvalMetrics]:
        """The metrics of `state`, on the host, on the validation split, if there is one, and the test split."""
        return self._on_host({name: self._measure(name, state) for name in self._splits if name != "train"})

    def _measure(self, name: str, state: TrainState) -> EvalMetrics:
        variables = (state.params, state.batch_stats, self.hyper)
        if self._stream is None:
            return self.compiler.call(name, self._evaluate, *variables, *self._data[name])

        def measure(batch: tuple) -> EvalMetrics:
            return jax.device_get(self.compiler.call("evaluate", self._evaluate, *variables, *batch))

        with contextlib.closing(self._stream.batches(self._splits[name])) as batches:
            return functools.reduce(EvalMetrics.merge, map(measure, batches))  # in the order of the program's own loop

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """`figures` of what `measure` finds."""
        return figures(self.measure(state))

    def place(self, state: PyTree) -> PyTree:
        """Arrays of the host, such as a checkpoint has, as `advance` takes them."""
        return mesh.put(state, self._sharding)

    @property
    def is_whole(self) -> bool:
        """Whether each process has all of a state, and need not take part when one fetches it."""
        return self._sharding is None or self._sharding.is_fully_addressable or self._sharding.is_fully_replicated

    def fetch(self, state: TrainState, part: str = "state") -> PyTree:
        """One of the `PARTS` of `state`, on the host; of all of it `place` makes `state` again."""
        return self._on_host(PARTS[part](state))

    def _on_host(self, tree: PyTree) -> PyTree:
        return jax.device_get(tree)

    def fresh_metrics(self, state: TrainState) -> TrainState:
        """`state` with nothing in its metrics; `state` is used up."""
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.metrics)
        return state.replace(metrics=mesh.put(empty, self._sharding))

    def split(self, tree: PyTree) -> list[PyTree]:
        """What each run has in a tree on the host: this one run all of it, each member of a group its own."""
        return [tree]

    def population_statistics(self, state: TrainState) -> PyTree:
        """The `batch_stats` of all the training examples taken as one batch."""
        images, _ = self._data["train"]
        return self.compiler.call("population", self._population, state.params, state.batch_stats, self.hyper, images)

    def learning_rate(self, step: int) -> Array:
        """The learning rate of the update that leads from `step` to `step + 1`."""
        arguments = (self._host_hyper, np.int32(step))
        return self.compiler.call("learning_rate", self._learning_rate, *arguments, once=True, here=True)

    def close(self) -> None:
        """Ends what reads streamed data; if it is asked to train again it starts again."""
        if self._stream:
            self._stream.close()

    def _put_order(self, order: np.ndarray) -> Array:
        return mesh.put(order, self._sharding)


def figures(measured: Mapping[str, EvalMetrics]) -> dict[str, float]:
    """Loss, accuracy and number of examples of each split."""
    results = {}
    for name, metrics in measured.items():
        results |= {f"{name}_{key}": value for key, value in compute(metrics).items()}
        results[f"{name}_count"] = int(metrics.loss.count)
    return results
