"""The compiled programs of a run or of a group of runs: they create its state, advance it, and evaluate it."""

from collections.abc import Sequence
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.config import validate_sizes
from vmapbn_flax.data import Dataset
from vmapbn_flax.training import mesh, steps
from vmapbn_flax.training.augment import make_augment
from vmapbn_flax.training.compiler import Compiler, Program
from vmapbn_flax.training.evaluation import Predictions
from vmapbn_flax.training.evaluator import Evaluator, Variables
from vmapbn_flax.training.feed import Feed, InMemory
from vmapbn_flax.training.hyperparameters import make_hyperparameters, steps_in
from vmapbn_flax.training.layout import make_layout
from vmapbn_flax.training.members import make_members
from vmapbn_flax.training.metrics import EvalMetrics, figures
from vmapbn_flax.training.network import has_convolutions
from vmapbn_flax.training.optimizer import learning_rate
from vmapbn_flax.training.state import TrainState, create_state
from vmapbn_flax.training.stream import Stream
from vmapbn_flax.training.watch import Percentiles

_STATE, _HYPER, _ORDER = 0, 1, 4  # which arguments of training are each member's own


class Programs:
    """Creates, advances and evaluates the state of one run on `dataset`, or of several, one for each of `configs`.

    The configs differ only in traced fields. Several runs are members of a group: they train on the same data, in
    memory, and their arrays have a leading axis of members (see the module `members`). All members take the same steps;
    the count in a member's own state stops when the member is frozen.

    A program is compiled when it is first called, or earlier on request. Members and batches lie on the mesh `devices`,
    or without a mesh on the default device. If the mesh spans many processes, all of them must make the same calls;
    methods that compute in this process alone say so.

    Attributes:
      count: the number of members; 1 for one run.
      selection: the name of the figure that ranks checkpoints.
      steps_per_epoch, total_steps: of each run.
      described: what a checkpoint says of the data, so that a network can be used without it, JSON.
      hyper: the hyperparameters, on the devices.
      layout: of the data set and the batches on the devices.
      devices: of all processes.
      compiler: of the programs; it has their times.

    Raises:
      UsageError: the configs do not fit the data.
    """

    def __init__(self, configs: Sequence[ConfigDict], dataset: Dataset, devices: Mesh | None = None):
        config = configs[0]  # what is read from it is the same for all
        validate_sizes(config, len(dataset.train))
        self.devices = jax.devices()[:1] if devices is None else list(devices.devices.flat)
        if len(self.devices) == 1:
            devices = None
        self.count = len(configs)
        self._members = make_members(self.count, devices)
        self.layout = make_layout(devices, dataset, config.mesh.replicate_limit)
        self.compiler = Compiler()

        self.selection = f"{'validation' if dataset.validation else 'test'}_accuracy"
        self.described = dataset.described()
        self.steps_per_epoch = len(dataset.train) // config.train.batch_size
        self.total_steps = steps_in(config.train.num_epochs, self.steps_per_epoch)
        self._freeze_step = steps_in(config.model.freeze_norm_after, self.steps_per_epoch) or self.total_steps
        self._num_train = len(dataset.train)
        make_feed = Stream if dataset.streamed else InMemory
        self._feed: Feed = make_feed(config, dataset, self.layout, self._order, self.place)
        self._evaluator = Evaluator(config, dataset, self.layout, self._feed, self._members, self.compiler)
        self.set_members(configs)
        self._make_programs(config, dataset)

    def set_members(self, configs: Sequence[ConfigDict]) -> None:
        """Makes the runs with `configs` the members, of which there are as many as before.

        The programs stay compiled. The clocks of the compiler start at zero.
        """
        self._seeds = [config.seed for config in configs]
        self._hypers = [make_hyperparameters(config, self.steps_per_epoch) for config in configs]
        self.hyper = self.place(self._members.stack(self._hypers))
        self._feed.close()
        self.compiler.reset_clocks()

    def _make_programs(self, config: ConfigDict, dataset: Dataset) -> None:
        model, train, num_classes = config.model, config.train, dataset.num_classes
        take_batch = steps.make_take_batch(train.batch_size, model.ghost_batch_size or 1, self.layout)
        augment = make_augment(config.data.augment, dataset.train.image_shape)
        gradients = steps.make_gradients(steps.make_loss(model, num_classes, augment), take_batch, train.batch_size)
        self._create_one = partial(create_state, model, config.optimizer, num_classes, dataset.train.image_shape)

        make = partial(Program, sharding=self._members.sharding)
        training = (_STATE, _HYPER, _ORDER)
        self._by_step = (
            jax.default_backend() == "cpu"
            and (self.count == 1 or self.layout.count == 1)
            and has_convolutions(self.member_template.params)
        )

        def make_train(name: str, *, freeze_norm: bool = False) -> Program:
            train_step = steps.make_train_step(
                model, config.optimizer, train.max_skipped_steps, num_classes, augment, freeze_norm=freeze_norm
            )
            if self._by_step:
                function = self._members.one_at_a_time(steps.make_one_step(train_step, take_batch), training)
            else:
                function = self._members.map_states(steps.make_train_steps(train_step, take_batch), training)
            return make(name, function, donate=(_STATE,))

        self._create = make("create", self._members.map_at_once(self._create_one), optimise=False)
        self._train = make_train("train")
        self._train_frozen = make_train("train_frozen", freeze_norm=True)
        self._gradients = make("gradients", self._members.map(gradients, training))
        self._copy = make("copy", lambda state: jax.tree.map(jnp.copy, state), optimise=False)
        self._learning_rate = Program("learning_rate", partial(learning_rate, config.optimizer), optimise=False)

    @cached_property
    def member_template(self) -> TrainState:
        """The shapes and types of the state of one member."""
        return jax.eval_shape(self._create_one, self._hypers[0])

    def where(self) -> str:
        """The devices in words, and the layout on them."""
        name = mesh.device_name(self.devices)
        if self.layout.count == 1:
            return name
        return f"{name}, batches split over {self.layout.count} and {self.layout.held} on each"

    # States.

    def template(self) -> TrainState:
        """The shapes and types of a saved state: for several members with a leading axis, without padding."""
        return self._members.template(self.member_template)

    def stack(self, states: Sequence[TrainState]) -> TrainState:
        """A state in the form of `template`, from one of each member, on the host."""
        return self._members.stack(states)

    def create(self) -> TrainState:
        """The state before the first step."""
        return self.compiler.call(self._create, self.hyper)

    def place(self, arrays: PyTree) -> PyTree:
        """Puts host arrays in the form of `template` on the devices; rows beyond `count` are ignored."""
        return mesh.put(self._members.pad(arrays), self._members.sharding)

    def snapshot(self, state: TrainState) -> TrainState:
        """A copy of `state` for a checkpoint, which further training does not change.

        It consists of numpy arrays in the form of `template`. If other processes hold a part of the state, it stays on
        the devices, padding included.
        """
        sharding = self._members.sharding
        if sharding is None or sharding.is_fully_addressable:
            return self._members.unpad(mesh.fetch(state))
        return self.compiler.call(self._copy, state)

    def split(self, tree: PyTree) -> list[PyTree]:
        """The tree of each member, on the host of every process, from a small part of a state on the devices."""
        return self._members.split(mesh.fetch(tree))

    def owners(self) -> list[int]:
        """The index of the process that has each member on its devices; of several such processes, the first."""
        return self._members.owners()

    # Training.

    def compile_ahead(self, step: int) -> None:
        """Starts to compile the training program in the background, for training from `step` on."""
        program = self._program(step)
        if program.name in self.compiler or step >= self.total_steps:
            return
        self.compiler.start(program, (self._placed_template(), self.hyper, *self._feed.position(step), np.int32(1)))

    def _program(self, step: int) -> Program:
        """The program that trains from `step` on: a second one, once the norms are frozen."""
        return self._train if step < self._freeze_step else self._train_frozen

    def _placed_template(self) -> TrainState:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._members.sharding),
            jax.eval_shape(self._create.function, self.hyper),
        )

    def advance(self, state: TrainState, step: int, count: int) -> TrainState:
        """Takes `count` steps from `step`, the step of `state`; `state` is used up."""
        end = step + count
        while step < end:
            stop = self._freeze_step if step < self._freeze_step < end else end
            count = min(stop - step, self._feed.steps_left(step))
            if self._by_step:
                count, numbers = 1, range(self._members.rows_each)
            else:
                numbers = [count]
            arguments = self._feed.position(step)
            for number in numbers:
                state = self.compiler.call(self._program(step), state, self.hyper, *arguments, np.int32(number))
            del arguments
            step += count
        return state

    def gradients(self, state: TrainState, step: int) -> tuple[Array, PyTree]:
        """The logits, `(batch, classes)`, and the gradients of the loss, for the batch that `step` trains on."""
        return self.compiler.call(self._gradients, state, self.hyper, *self._feed.position(step))

    def _order(self, epoch: int) -> np.ndarray:
        return self._members.stack([steps.epoch_permutation(seed, epoch, self._num_train) for seed in self._seeds])

    def learning_rates(self, step: int) -> list[float]:
        """The learning rate of each member's update from `step` to `step + 1`, computed in this process alone."""
        return [float(self.compiler.call(self._learning_rate, hyper, np.int32(step))) for hyper in self._hypers]

    def fresh_metrics(self, state: TrainState) -> TrainState:
        """`state` with empty metrics; `state` is used up."""
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.metrics)
        return state.replace(metrics=mesh.put(empty, self._members.sharding))

    # Evaluation.

    def _variables(self, state: TrainState) -> Variables:
        return state.params, state.batch_stats, self.hyper

    def compile_measure_ahead(self) -> None:
        """See `Evaluator.compile_ahead`."""
        self._evaluator.compile_ahead(self._variables(self._placed_template()))

    def measure(self, state: TrainState) -> list[dict[str, EvalMetrics]]:
        """See `Evaluator.measure`."""
        return self._evaluator.measure(self._variables(state))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The `figures` of a single run."""
        (measured,) = self.measure(state)
        return figures(measured)

    def predictions(self, state: TrainState) -> list[dict[str, tuple[EvalMetrics, Predictions]]]:
        """See `Evaluator.predictions`."""
        return self._evaluator.predictions(self._variables(state))

    def watch(self, state: TrainState) -> list[Percentiles]:
        """See `Evaluator.watch`."""
        return self._evaluator.watch(self._variables(state))

    def population_statistics(self, state: TrainState) -> PyTree:
        """See `Evaluator.population_statistics`."""
        return self._evaluator.population_statistics(self._variables(state))

    def close(self) -> None:
        """Ends the thread that reads streamed data; further training starts it again."""
        self._feed.close()
