"""What a run has trained, as a file for other programs; the end of its name says in which form."""

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Float32, UInt8

from vmapbn_flax.errors import UsageError
from vmapbn_flax.files import write_whole
from vmapbn_flax.nn.convert import make_torch, to_onnx
from vmapbn_flax.runs.trained import TrainedRun
from vmapbn_flax.training.trees import named_leaves

_PLATFORMS = ("cpu", "cuda", "tpu")


class _Form(NamedTuple):
    """A form of file: what makes its content and a note, the library that this needs, and how to install that."""

    make: Callable[[TrainedRun], tuple[bytes, str]]
    library: str
    install: str


def export(run: TrainedRun, path: Path) -> str:
    """Writes `run` to `path`, whole or not at all, over a file that is there.

    | `path` ends in | content |
    |---|---|
    | `.stablehlo` | a program of JAX: images in uint8 to probabilities, any number of them |
    | `.safetensors` | the variables by name, the config and the names of the classes |
    | `.pt` | the state dict of a `torch.nn.Sequential` |
    | `.onnx` | a model of the folded network: images in uint8 to probabilities, any number of them |

    Returns:
      What the file leaves out: of `.pt` the code of the `Sequential`.

    Raises:
      RunError: the file cannot be written.
      UsageError: see `require_form`; or the network has no such form.
    """
    require_form(path)
    try:
        content, note = _FORMS[path.suffix].make(run)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    write_whole(path, content)
    return note


def require_form(path: Path) -> None:
    """Checks the name of a file for `export`.

    Raises:
      UsageError: it has no known suffix, is in no directory, or needs a library that is not installed.
    """
    if path.suffix not in _FORMS:
        raise UsageError(f"{path}: got a name that ends in {path.suffix!r}, expected one of {', '.join(_FORMS)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: got no directory {path.parent}, expected one to write the file to. Make it first.")
    if path.is_dir():
        raise UsageError(f"{path}: got a directory, expected the name of a file")
    form = _FORMS[path.suffix]
    if importlib.util.find_spec(form.library) is None:
        raise UsageError(
            f"{path}: got no library {form.library}, which such a file needs. Install it: pip install {form.install}"
        )


def _stablehlo(run: TrainedRun) -> tuple[bytes, str]:
    variables = jax.device_put(run.variables)

    def probabilities(images: UInt8[Array, "batch height width *channels"]) -> Float32[Array, "batch classes"]:
        return run.probabilities(variables, images.astype(jnp.float32) / 255)

    shape = jax_export.symbolic_shape(", ".join(["batch", *map(str, run.image_shape)]))
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return bytes(jax_export.export(jax.jit(probabilities), platforms=_PLATFORMS)(images).serialize()), ""


def _safetensors(run: TrainedRun) -> tuple[bytes, str]:
    from safetensors.numpy import save

    metadata = {
        "config": run.config.to_dict(),
        "step": run.step,
        "image_shape": run.image_shape,
        "class_names": run.class_names,
    }
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(run.variables).items()}
    return save(tensors, {name: json.dumps(value) for name, value in metadata.items()}), ""


def _torch(run: TrainedRun) -> tuple[bytes, str]:
    import torch

    (network, code), file = make_torch(run.network, run.variables), io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getvalue(), code


def _onnx(run: TrainedRun) -> tuple[bytes, str]:
    if run.config.data.threshold:
        raise ValueError("got a run with data.threshold, which such a file cannot have. Export it as .stablehlo.")
    folded = run.fold()
    return to_onnx(folded.network, folded.variables, run.image_shape).SerializeToString(), ""


_FORMS = {
    ".stablehlo": _Form(_stablehlo, "flatbuffers", "'vmapbn-flax[export]'"),
    ".safetensors": _Form(_safetensors, "safetensors", "'vmapbn-flax[export]'"),
    ".pt": _Form(_torch, "torch", "torch"),
    ".onnx": _Form(_onnx, "onnx", "'vmapbn-flax[export]'"),
}
