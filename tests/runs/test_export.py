"""A trained run as a file: what reads it computes the same probabilities."""

import dataclasses
import functools
import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from configs.own_network import Net
from tests.helpers import small
from tests.nn.test_folding import init
from vmapbn_flax import MLP, BatchNorm, ConvNet, ResNet, default_config
from vmapbn_flax.errors import UsageError
from vmapbn_flax.runs.export import export
from vmapbn_flax.runs.trained import TrainedRun
from vmapbn_flax.training.network import as_inputs

NORM = partial(BatchNorm, epsilon=0.01)
SMALL = {"num_classes": 10, "norm": NORM, "blocks": (1, 1), "width": 4}
NETWORKS = {
    "mlp": MLP(hidden=(8, 8), num_classes=10, norm=NORM),
    "conv": ConvNet(num_classes=10, features=(4, 6), norm=NORM),
    "resnet": ResNet(**SMALL),
    "resnet18": ResNet(**SMALL, imagenet=True),
    "bottleneck": ResNet(**SMALL, bottleneck=True),
    "no norm": MLP(hidden=(8,), num_classes=10, norm=None),
}
GREY, COLOUR = (28, 28), (9, 12, 3)  # shapes of an image


@functools.cache
def trained(network, image_shape=GREY, dtype="float32"):
    """A run that has trained `network`: its variables are random. One for all tests, which compiles once."""
    config = default_config()
    config.model.dtype = dtype
    config.model.norm = "vmap" if network.norm else "none"
    (image,) = as_inputs(type(network), jnp.zeros((1, *image_shape)))
    return TrainedRun(
        path=Path("run"),
        step=7,
        network=network,
        variables=init(network, image),
        config=config.lock(),
        image_shape=image_shape,
        class_names=tuple("abcdefghij"),
        border=0.0,
        figures={},
    )


@functools.cache
def folded(network, image_shape=GREY):
    return trained(network, image_shape).fold()


def photographs(size, shape):
    return np.random.default_rng(3).integers(0, 256, (size, *shape)).astype(np.uint8)


def mnist(size=1000):
    return np.array(small.mnist().test.images[:size])  # a copy, which PyTorch may write to


def read_stablehlo(path, images):
    from jax import export

    return np.asarray(export.deserialize(path.read_bytes()).call(images))


def read_onnx(path, images):
    """With onnxruntime; without it, with ONNX's own interpreter, on which a hundred images are enough."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(str(path)).run(None, {"images": images})[0]
    return onnxruntime.InferenceSession(str(path)).run(None, {"images": images})[0]


def read_torch(path, images, code):
    """`code` is that of the Sequential."""
    import torch

    network = eval(code, {"nn": torch.nn}).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    x = torch.from_numpy(images) / 255
    if "Conv2d" in code:
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    with torch.no_grad():
        return network(x).softmax(1).numpy()


close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def some_images(shape):
    return mnist() if shape == GREY else photographs(5, shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", GREY),
        ("mlp", COLOUR),
        ("conv", GREY),
        ("conv", COLOUR),
        ("resnet", COLOUR),
        ("bottleneck", COLOUR),
        pytest.param("resnet18", COLOUR, marks=pytest.mark.slow),
    ],
)
def test_onnx_predicts_the_same(name, shape, tmp_path):
    """And so does the folded run, which the file is of."""
    pytest.importorskip("onnx")
    run, images = trained(NETWORKS[name], shape), some_images(shape)
    export(run, tmp_path / "file.onnx")
    for some in (images, images[:1]):
        close(read_onnx(tmp_path / "file.onnx", some), run.predict(some))


@pytest.mark.parametrize(
    ("network", "shape", "dtype"),
    [
        ("mlp", GREY, "bfloat16"),
        ("conv", COLOUR, "float32"),
    ],
)
def test_stablehlo_predicts_the_same(network, shape, dtype, tmp_path):
    run, images = trained(NETWORKS[network], shape, dtype), photographs(5, shape)
    export(run, tmp_path / "file.stablehlo")
    for some in (images, images[:1]):
        close(read_stablehlo(tmp_path / "file.stablehlo", some), run.predict(some))


def test_stablehlo_takes_a_network_of_ones_own(tmp_path):
    from jax import export as jax_export

    run, images = trained(Net(num_classes=10, norm=NORM, width=4)), mnist(10)
    export(run, tmp_path / "file.stablehlo")
    close(read_stablehlo(tmp_path / "file.stablehlo", images), run.predict(images))
    exported = jax_export.deserialize((tmp_path / "file.stablehlo").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [(str(array.shape), array.dtype) for array in (*exported.in_avals, *exported.out_avals)] == [
        ("(batch, 28, 28)", np.uint8),
        ("(batch, 10)", np.float32),
    ]


@pytest.mark.parametrize(("name", "shape"), [("mlp", GREY), ("conv", GREY), ("conv", COLOUR), ("no norm", GREY)])
def test_torch_predicts_the_same(name, shape, tmp_path):
    pytest.importorskip("torch")
    run, images, path = trained(NETWORKS[name], shape), some_images(shape), tmp_path / "file.pt"
    for form in (run, folded(NETWORKS[name], shape)):
        code = export(form, path)
        close(read_torch(path, images, code), run.predict(images))


def test_safetensors_have_the_variables_and_what_they_are_of(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    unfolded, path, images = trained(NETWORKS["conv"]), tmp_path / "file.safetensors", mnist()
    for run, collections in ((unfolded, {"params", "batch_stats"}), (folded(NETWORKS["conv"]), {"params"})):
        assert export(run, path) == ""
        variables = unflatten_dict(load_file(path), sep="/")
        assert variables.keys() == collections
        small.assert_same_bits(variables, run.variables)
        with safe_open(path, "np") as file:
            metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        assert metadata == {
            "config": json.loads(json.dumps(run.config.to_dict())),
            "step": 7,
            "image_shape": [28, 28],
            "class_names": list("abcdefghij"),
        }
    (image,) = as_inputs(ConvNet, jnp.float32(images[:1]) / 255)
    logits = ConvNet(num_classes=10, features=(4, 6), norm=None).apply(variables, image, train=False)
    close(np.exp(logits) / np.exp(logits).sum(), unfolded.predict(images[0]))


def test_a_folded_run_predicts_the_same():
    run, images = trained(NETWORKS["conv"]), mnist()
    without_norm = folded(NETWORKS["conv"])
    assert without_norm.network.norm is None
    assert without_norm.config.model.norm == "none"
    assert run.config.model.norm == "vmap"
    close(without_norm.predict(images), run.predict(images))


def test_what_has_no_such_form_is_refused_and_leaves_the_file_alone(tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "file.onnx"
    path.write_text("old")
    with pytest.raises(UsageError, match=r"file\.onnx: Net: got a network that has no form for ONNX; expected one of"):
        export(trained(Net(num_classes=10, norm=NORM, width=4)), path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_onnx_refuses_images_in_black_and_white(tmp_path):
    run = trained(NETWORKS["conv"])
    config = run.config.copy_and_resolve_references()
    config.data.threshold = 0.5
    pytest.importorskip("onnx")
    with pytest.raises(UsageError, match=r"file\.onnx: got a run with data\.threshold"):
        export(dataclasses.replace(run, config=config), tmp_path / "file.onnx")


def test_torch_refuses_a_network_of_the_same_names_that_computes_something_else(tmp_path):
    pytest.importorskip("torch")

    class Other(MLP):
        pass

    with pytest.raises(UsageError, match=r"file\.pt: Other: got a network that has no form for PyTorch"):
        export(trained(Other(hidden=(8,), num_classes=10)), tmp_path / "file.pt")
