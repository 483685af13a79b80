"""The compiled programs that evaluate: a network on the splits of the data, its layers, its population statistics."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import PyTree
from ml_collections import ConfigDict

from vmapbn_flax.data import Dataset
from vmapbn_flax.training import mesh
from vmapbn_flax.training.compiler import Compiler, Program
from vmapbn_flax.training.evaluation import Predictions, join, make_evaluate
from vmapbn_flax.training.feed import Feed
from vmapbn_flax.training.layout import Layout
from vmapbn_flax.training.members import OneRun, Stacked
from vmapbn_flax.training.metrics import EvalMetrics
from vmapbn_flax.training.population import make_population_statistics
from vmapbn_flax.training.watch import Percentiles, make_watch, require_watched

Variables = tuple[PyTree, PyTree, PyTree]  # parameters, statistics and hyperparameters of all members, on the devices


class Evaluator:
    """Evaluates the variables of one run, or of `members`, on the data of `feed`.

    Raises:
      UsageError: the network does not have what `config.train.watch` names.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset,
        layout: Layout,
        feed: Feed,
        members: OneRun | Stacked,
        compiler: Compiler,
    ):
        require_watched(config, dataset.num_classes, dataset.train.image_shape)
        self._feed, self._members, self._compiler = feed, members, compiler
        model, size, num_classes = config.model, config.train.eval_batch_size, dataset.num_classes
        evaluate = make_evaluate(model, size, num_classes, layout)
        population = make_population_statistics(model, size, num_classes, layout)
        watch = make_watch(model, config.train.watch, min(size, len(dataset.test)), size, num_classes, layout)

        def make(name: str, function: Callable, **options: Any) -> Program:
            return Program(name, members.map(function, own=(0, 1, 2)), sharding=members.sharding, **options)

        # The batches of a stream are all of one shape: one program serves the splits.
        names = {split: split if feed.whole else "evaluate" for split in sorted(dataset.splits.keys() - {"train"})}
        # Only `predictions` asks for the second result; for `measure` the compiler leaves it out.
        measure = lambda *arguments: evaluate(*arguments)[0]  # noqa: E731
        self._measure = {split: make(name, measure, trace_in_thread=True) for split, name in names.items()}
        self._predict = {split: make(f"{name} predictions", evaluate) for split, name in names.items()}
        self._watch = make("watch", watch, trace_in_thread=True) if config.train.watch else None
        self._population = make("population", population)

    def compile_ahead(self, variables: Variables) -> None:
        """Starts to compile the programs of `measure` and `watch` in the background; does nothing for a stream."""
        watched = [("test", self._watch)] if self._watch else []
        for split, program in [*self._measure.items(), *watched]:
            if self._feed.whole and program.name not in self._compiler:
                self._compiler.start(program, (*variables, *self._feed.whole[split]))

    def measure(self, variables: Variables) -> list[dict[str, EvalMetrics]]:
        """Each member's metrics on the validation split, if there is one, and on the test split, on every host."""
        merge = functools.partial(functools.reduce, EvalMetrics.merge)  # in the order of the program's own loop
        measured = {name: merge(self._parts(program, name, variables)) for name, program in self._measure.items()}
        return self._members.split(measured)

    def predictions(self, variables: Variables) -> list[dict[str, tuple[EvalMetrics, Predictions]]]:
        """The same, each with what the member's network says of the split's examples, `(examples,)`."""
        parts = {name: list(self._parts(program, name, variables)) for name, program in self._predict.items()}
        return [{name: join(found) for name, found in member.items()} for member in self._members.split(parts)]

    def _parts(self, program: Program, split: str, variables: Variables) -> Iterator[PyTree]:
        """The result of `program` on each part of a split, on every host."""

        def on_host(part: tuple) -> PyTree:  # not a loop, which would keep a part while the next one is read
            return mesh.fetch(self._compiler.call(program, *variables, *part))

        with contextlib.closing(self._feed.parts(split)) as parts:
            yield from map(on_host, parts)

    def watch(self, variables: Variables) -> list[Percentiles]:
        """Each member's percentiles of what `config.train.watch` names, on every host."""
        if self._watch is None:
            return [{} for _ in range(self._members.count)]
        found = self._compiler.call(self._watch, *variables, *self._feed.first("test"))
        return self._members.split(mesh.fetch(found))

    def population_statistics(self, variables: Variables) -> PyTree:
        """The `batch_stats` of all training examples as one batch, on the devices; only of data in memory."""
        return self._compiler.call(self._population, *variables, *self._feed.whole["train"])
