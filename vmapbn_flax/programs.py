"""The compiled programs of a run, with the data they work on, on the device."""

import contextlib
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from vmapbn_flax import console, mesh, steps
from vmapbn_flax.config import validate_sizes
from vmapbn_flax.data import Dataset
from vmapbn_flax.metrics import EvalMetrics, compute
from vmapbn_flax.state import TrainState, create_state, learning_rate, make_hyperparameters, steps_in
from vmapbn_flax.stream import Stream

# Compiles the initialisation in a fifth of the time.
_UNOPTIMISED = {"xla_backend_optimization_level": 0}

# Fewer copies of the optimizer's moments in the loop, whole vectors where there is AVX-512, and the compiler's own code
# for reductions and products instead of a library's; docs/performance.md has what that is worth.
_CPU_OPTIONS = {
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_experimental_ynn_fusion_type": "",
}

# Of a state, what `Programs.fetch` can be asked for.
PARTS: dict[str, Callable[[TrainState], PyTree]] = {
    "state": lambda state: state,
    "batch_stats": lambda state: state.batch_stats,
    "metrics": lambda state: state.metrics,
    "counters": lambda state: (state.step, state.skipped_steps, state.skipped_in_a_row),
}


class Programs:
    """Creates, advances and evaluates the state of a run of `config` on `dataset`.

    Each program is compiled when it is first called, or ahead of that when asked to; `compile_seconds` says how long
    was waited for that in all, and `device_seconds` by name how long each program ran.
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
        self.layout = mesh.Layout(devices, by_columns=divided, in_batches=dataset.streamed)
        self.steps_per_epoch = len(dataset.train) // config.train.batch_size
        self.total_steps = steps_in(config.train.num_epochs, self.steps_per_epoch)
        self.hyper = self._host_hyper = make_hyperparameters(config, self.steps_per_epoch)
        self.compile_seconds = 0.0
        self.device_seconds: dict[str, float] = defaultdict(float)
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
        self._compiled: dict[str, Future] = {}
        self._compiler = ThreadPoolExecutor(2)
        self._epoch_order = (-1, None)

    def where(self) -> str:
        """The devices in words, and what lies on them."""
        name = console.device_name(self.devices)
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
        if "train" in self._compiled or step >= self.total_steps:
            return
        arguments = (self._placed_template(), self.hyper, *self._position(step), np.int32(1))
        self._start_compiling("train", self._train_steps, arguments, donate=(0,))

    def compile_measure_ahead(self) -> None:
        """Starts to compile what `measure` calls, beside the device at work.

        Not of streamed data; nor in one of many processes, which compile together as they call together.
        """
        if self._stream or jax.process_count() > 1:
            return
        state = self._placed_template()
        for name in self._splits.keys() - {"train"} - self._compiled.keys():
            arguments = (state.params, state.batch_stats, self.hyper, *self._data[name])
            self._start_compiling(name, self._evaluate, arguments, trace_too=True)

    def _placed_template(self) -> TrainState:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding),
            jax.eval_shape(self._create, self.hyper),
        )

    def create(self) -> TrainState:
        """The state before the first step."""
        return self._call("create", self._create, self.hyper, once=True)

    def advance(self, state: TrainState, step: int, count: int) -> TrainState:
        """`count` steps from `step`, the step of `state`, on, within one epoch; `state` is used up."""
        end = step + count
        while step < end:
            if self._stream:
                count = min(end - step, self._stream.steps_left(step))
            arguments = (*self._position(step), np.int32(count))
            state = self._call("train", self._train_steps, state, self.hyper, *arguments, donate=(0,))
            del arguments
            step += count
        return state

    def gradients(self, state: TrainState, step: int) -> tuple[Array, PyTree]:
        """The logits of the batch that `step` trains on, `(batch, classes)`, and the loss's gradients."""
        return self._call("gradients", self._gradients, state, self.hyper, *self._position(step))

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
            return self._call(name, self._evaluate, *variables, *self._data[name])

        def measure(batch: tuple) -> EvalMetrics:
            return jax.device_get(self._call("evaluate", self._evaluate, *variables, *batch))

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
        return self._call("population", self._population, state.params, state.batch_stats, self.hyper, images)

    def learning_rate(self, step: int) -> Array:
        """The learning rate of the update that leads from `step` to `step + 1`."""
        arguments = (self._host_hyper, np.int32(step))
        return self._call("learning_rate", self._learning_rate, *arguments, once=True, here=True)

    def close(self) -> None:
        """Ends what reads streamed data; if it is asked to train again it starts again."""
        if self._stream:
            self._stream.close()

    def _call(
        self,
        name: str,
        function: Callable,
        *arguments: Any,
        donate: Sequence[int] = (),
        once: bool = False,
        here: bool = False,
    ) -> Any:
        """Calls `function`, compiled under `name`.

        Args:
          donate: which of the arguments it uses up.
          once: spares the optimising of what hardly runs.
          here: the result need not lie as a state does, and no other process makes the same call.
        """
        program = self._compiled.get(name)
        if program is None or not program.done():
            started = time.monotonic()
            program = program or self._start_compiling(name, function, arguments, donate, once, here)
            program.exception()  # waits
            self.compile_seconds += time.monotonic() - started
        started = time.monotonic()
        # Several programs under way at once can wait for one another's collectives for ever; a lack of memory that a
        # second program is the first to meet hangs; and a window of streamed data is let go once it was trained on.
        result = jax.block_until_ready(program.result()(*arguments))
        self.device_seconds[name] += time.monotonic() - started
        return result

    def _start_compiling(
        self,
        name: str,
        function: Callable,
        arguments: Sequence[Any],
        donate: Sequence[int] = (),
        once: bool = False,
        here: bool = False,
        trace_too: bool = False,
    ) -> Future:
        """Traces `function` and hands it to a thread, or with `trace_too` has that trace it; see `_call`."""
        out = None if here else self._sharding
        options = _UNOPTIMISED if once else _CPU_OPTIONS
        lower = partial(jax.jit(function, donate_argnums=donate, out_shardings=out).lower, *arguments)
        # Tracing holds the interpreter: while something waits for a program, two at a time only hold it up.
        lowered = None if trace_too else lower()
        self._compiled[name] = self._compiler.submit(lambda: _compile(lowered or lower(), options))
        return self._compiled[name]

    def _put_order(self, order: np.ndarray) -> Array:
        return mesh.put(order, self._sharding)


def _compile(lowered: Lowered, cpu_options: Mapping[str, Any]) -> Compiled:
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(cpu_options)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        return lowered.compile()  # a compiler that no longer has one of them


def figures(measured: Mapping[str, EvalMetrics]) -> dict[str, float]:
    """Loss, accuracy and number of examples of each split."""
    results = {}
    for name, metrics in measured.items():
        results |= {f"{name}_{key}": value for key, value in compute(metrics).items()}
        results[f"{name}_count"] = int(metrics.loss.count)
    return results
