"""A trained run: its network and variables, for predictions, and for whatever else people want to do with them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, PyTree
from ml_collections import ConfigDict

from vmapbn_flax.data.binary import least_white
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import read_json
from vmapbn_flax.networks import BUILT_IN, attributes, import_network, in_form
from vmapbn_flax.nn import VmapBatch, fold
from vmapbn_flax.runs.checkpoints import Meta, restore_part, saved_steps
from vmapbn_flax.runs.inputs import require_images
from vmapbn_flax.runs.loading import find_step, load_config
from vmapbn_flax.runs.selection import best_row
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.network import LAYERS, as_inputs, in_compute_dtype

_BATCH = 32  # images that the compiled program takes
_LARGEST_IMAGE = 10**8  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """What a run has trained, at one of its steps.

    Attributes:
      path: of the workdir.
      step: of the checkpoint.
      network: for one example, whichever variant was trained. `network.apply(variables, image, train=False)` gives
        the logits, `(classes,)`, of one image as the network takes it: floats from 0 to 1, `(features,)` for an `MLP`,
        `(height, width, channels)` for any other network.
      variables: `params` and, with batch norm, `batch_stats`, as trained: in float32, also of a run in bfloat16.
      config: of the run.
      image_shape: of one image: `(height, width)` when grey, otherwise `(height, width, channels)`.
      class_names: a name for each class; the digits where the data set has no names.
      border: the mean of the outermost pixels of training images, from 0 to 1: whether they are dark or bright around.
      figures: of the evaluation at `step`, such as `test_accuracy`; empty if there was none.
    """

    path: Path
    step: int
    network: nn.Module
    variables: dict[str, PyTree] = dataclasses.field(repr=False)
    config: ConfigDict = dataclasses.field(repr=False)
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    border: float
    figures: Mapping[str, float | int | None]

    def predict(self, images: Any) -> Float32[np.ndarray, "*images classes"]:
        """The probability of each class, `(classes,)` for one image, `(images, classes)` for many.

        One program serves any number of images. It is compiled at the first call.

        Args:
          images: one image or many, with a leading axis. An image is `image_shape` or, if it is grey, the same with
            one channel; or flat. Its pixels are integers from 0 to 255 in uint8, or floats from 0 to 1.

        Raises:
          ValueError: `images` has another shape, type or range.
        """
        images = require_images(images, self.image_shape)
        batch = images.reshape(-1, *self.image_shape)
        found = np.empty((len(batch), len(self.class_names)), np.float32)
        for start in range(0, len(batch), _BATCH):
            part = batch[start : start + _BATCH]
            padded = np.zeros((_BATCH, *self.image_shape), np.float32)
            padded[: len(part)] = part
            if part.dtype == np.uint8:
                padded /= 255
            found[start : start + _BATCH] = self._predict_batch(padded)[: len(part)]
        return found if images.ndim > len(self.image_shape) else found[0]

    @functools.cached_property
    def _predict_batch(self) -> Callable[[Array | np.ndarray], Array]:
        return functools.partial(jax.jit(self.probabilities), jax.device_put(self.variables))

    def probabilities(
        self, variables: dict[str, PyTree], images: Float[Array, "batch height width *channels"]
    ) -> Float32[Array, "batch classes"]:
        """`predict` as a function of arrays, to be traced: by jax.jit, or by jax.export, with any number of images.

        Args:
          variables: as `self.variables`.
          images: from 0 to 1, each of `image_shape`; `config.data.threshold` makes them black and white.
        """
        model, threshold = self.config.model, self.config.data.threshold
        if threshold:  # between two intensities, where no rounding matters
            images = (images >= (least_white(threshold) - 0.5) / 255).astype(images.dtype)
        inputs = as_inputs(type(self.network), images.astype(model.dtype))
        variables = variables | {"params": in_compute_dtype(model, variables["params"])}
        logits = VmapBatch(self.network).apply(variables, inputs, train=False)
        return jax.nn.softmax(jnp.asarray(logits, jnp.float32))

    def fold(self) -> "TrainedRun":
        """This run without its batch norms, which move into the layers before them: see `vmapbn_flax.fold`.

        Its network has `norm=None`. It predicts the same, in bfloat16 but for rounding.

        Raises:
          UsageError: the network cannot be folded; says why.
        """
        (image,) = as_inputs(type(self.network), jnp.zeros((1, *self.image_shape)))
        try:
            network, variables = fold(self.network, self.variables, image)
        except ValueError as error:
            raise UsageError(str(error)) from error
        config = self.config.copy_and_resolve_references()
        config.model.norm = "none"
        return dataclasses.replace(self, network=network, variables=variables, config=config.lock())


def load_run(
    workdir: str | Path, step: int | str | None = None, *, network: str | type[nn.Module] | None = None
) -> TrainedRun:
    """Loads what the run in `workdir` has trained. Nothing is needed but the workdir, the data set neither.

    Args:
      workdir: of a run or of a sweep's member, such as `runs/vmap_bn`; or of refreshed statistics, such as
        `runs/vmap_bn/refreshed`.
      step: of a checkpoint, "latest", or "best": that with the best accuracy on the validation images or, without
        any, on the test images. By default the best; if none of the checkpoints was evaluated, the latest.
      network: the class of the run's network, or its name `package.module:Class`, if it is a module of your own. A
        workdir may come from anywhere, and nothing imports what it names until you name it, too.

    Raises:
      RunError: the workdir has no such checkpoint, or a damaged one; or it is that of a sweep.
      UsageError: `network` is missing, or does not fit the run.
    """
    found = Workdir(Path(workdir))
    config = load_config(found, network)
    made: dict[str, Any] = {}

    def make_template(meta: Meta) -> dict[str, PyTree]:
        made.update(_read_data(meta, found))
        num_classes = len(made["class_names"])
        made["network"] = _make_network(network, config.model, num_classes)
        try:
            return _template(made["network"], made["image_shape"], num_classes)
        except ValueError as error:
            if config.model.name not in BUILT_IN:
                raise  # with the traceback, which its author needs
            raise UsageError(f"config.model: {error}") from error

    step = _choose_step(found, step, config)
    variables, _ = restore_part(found.checkpoints, step, make_template)
    return TrainedRun(
        path=found.path, step=step, variables=variables, config=config.lock(), figures=_figures(found, step), **made
    )


def _choose_step(workdir: Workdir, step: int | str | None, config: ConfigDict) -> int:
    if step in (None, "best"):
        metric = f"{'validation' if config.data.validation_size else 'test'}_accuracy"
        row = best_row(workdir.read_rows(), metric, saved_steps(workdir.checkpoints))
        step = row["step"] if row else None
    elif step == "latest":
        step = None
    elif isinstance(step, str):
        raise UsageError(f"step: got {step!r}; expected the number of a step, 'best' or 'latest'")
    return find_step(workdir.checkpoints, step)


def _read_data(meta: Meta, workdir: Workdir) -> dict[str, Any]:
    """What is saved beside a state about the data: see `Dataset.described`."""
    try:
        data = meta["data"]
        shape, names, border = tuple(data["image_shape"]), tuple(data["class_names"]), float(data["border"])
        sizes = len(shape) in (2, 3) and all(type(size) is int and size > 0 for size in shape)
        if not (sizes and math.prod(shape) <= _LARGEST_IMAGE and names and all(type(name) is str for name in names)):
            raise ValueError("no shape of an image, or no names of classes")
        "".join(names).encode()  # which fails for half of a surrogate pair
    except (KeyError, TypeError, ValueError):
        raise RunError(
            f"{workdir.checkpoints}: got a checkpoint that does not say the shape of its images and their classes, as "
            f"earlier versions wrote; expected one that does. Train again, or load what `refresh` makes of it."
        ) from None
    return {"image_shape": shape, "class_names": names, "border": border}


def _make_network(network: str | type[nn.Module] | None, model: ConfigDict, num_classes: int) -> nn.Module:
    """The network for one example, with the norm of the one-example variant."""
    norm = None
    if model.norm != "none":
        layer = LAYERS[in_form(model.norm, batched=False)]
        norm = functools.partial(layer, momentum=model.batch_norm_momentum, epsilon=model.batch_norm_epsilon)
    make = network if isinstance(network, type) else import_network(model.name)
    try:
        return make(num_classes=num_classes, norm=norm, **attributes(model))
    except TypeError as error:
        raise UsageError(f"config.model: got attributes that the network does not take ({error})") from None


def _template(network: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> dict[str, PyTree]:
    """The shapes and types of the variables that a checkpoint holds."""

    def init() -> Any:
        (image,) = as_inputs(type(network), jnp.zeros((1, *image_shape)))
        return network.init_with_output(jax.random.key(0), image, train=False)

    logits, variables = jax.eval_shape(init)
    if logits.shape != (num_classes,):
        raise UsageError(
            f"{type(network).__name__}: got logits of shape {logits.shape} for one image; expected ({num_classes},)"
        )
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


def _figures(workdir: Workdir, step: int) -> dict[str, float | int | None]:
    """The figures of the evaluation at `step`."""
    if workdir.is_refreshed:
        after = read_json(workdir.refresh).get("after")
        return after if isinstance(after, dict) else {}
    rows = [row for row in workdir.read_rows() if row["step"] == step]
    return {name: row[name] for row in rows for name in row if name.startswith(("validation_", "test_"))}
