"""Conversion to ONNX, for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vmapbn_flax.nn.conv_net import ConvNet
from vmapbn_flax.nn.mlp import MLP
from vmapbn_flax.nn.resnet import ResNet

# Old enough for runtimes of 2022.
_OPSET, _IR_VERSION = 17, 8

Params = Mapping[str, Any]


def to_onnx(network: Any, variables: Mapping[str, Any], image_shape: tuple[int, ...]) -> Any:
    """An ONNX model that computes the probabilities of `network`, which has no batch norms.

    Its input `images` is a batch in uint8, `(batch, *image_shape)`, its output `probabilities` is `(batch, classes)`.

    Args:
      network: `MLP`, `ConvNet` or `ResNet` with `norm=None`, as `fold` returns it.
      variables: of the network.
      image_shape: `(height, width)`, or `(height, width, channels)`.

    Returns:
      The `onnx.ModelProto`.

    Raises:
      ValueError: another network, or one with batch norms.
    """
    writers: dict[type, Callable[..., str]] = {MLP: _mlp, ConvNet: _conv_net, ResNet: _resnet}
    if type(network) not in writers or variables.get("batch_stats"):
        raise ValueError(
            f"{type(network).__name__}: got a network that has no form for ONNX; expected one of "
            f"{', '.join(kind.__name__ for kind in writers)}, folded."
        )
    from onnx import TensorProto, checker, helper

    graph = _Graph()
    pixels = graph.add("Cast", "images", to=TensorProto.FLOAT)
    x = graph.add("Div", pixels, graph.constant(np.float32(255)))
    logits = writers[type(network)](graph, network, variables["params"], x, image_shape)
    graph.add("Softmax", logits, axis=1, output="probabilities")
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *image_shape])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", network.num_classes])]
    made = helper.make_graph(graph.nodes, type(network).__name__, inputs, outputs, graph.constants)
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(made, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="vmapbn-flax")
    checker.check_model(model, full_check=True)
    return model


class _Graph:
    """The nodes of a model and its constants. A tensor is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds an operator, and returns its output."""
        from onnx import helper

        output = output or f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, array: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def dense(self, x: str, layer: Params) -> str:
        return self.add("Gemm", x, self.constant(layer["kernel"]), self.constant(layer["bias"]))

    def conv(self, x: str, layer: Params, stride: int = 1) -> str:
        kernel = np.transpose(layer["kernel"], (3, 2, 0, 1))  # (out, in, height, width)
        pads = [kernel.shape[-1] // 2] * 4
        inputs = (x, self.constant(kernel), self.constant(layer["bias"]))
        return self.add("Conv", *inputs, strides=[stride, stride], pads=pads)

    def channels_first(self, images: str, image_shape: tuple[int, ...]) -> str:
        if len(image_shape) == 3:
            return self.add("Transpose", images, perm=[0, 3, 1, 2])
        return self.add("Unsqueeze", images, self.constant(np.array([1])))


def _mlp(graph: _Graph, network: MLP, params: Params, x: str, image_shape: tuple[int, ...]) -> str:
    x = graph.add("Flatten", x)
    for i in range(len(network.hidden)):
        x = graph.add("Sigmoid", graph.dense(x, params[f"dense_{i}"]))
    return graph.dense(x, params["logits"])


def _conv_net(graph: _Graph, network: ConvNet, params: Params, x: str, image_shape: tuple[int, ...]) -> str:
    x = graph.channels_first(x, image_shape)
    for i in range(len(network.features)):
        x = graph.conv(x, params[f"conv_{i}"])
        x = graph.add("Relu", graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = graph.add("Flatten", graph.add("Transpose", x, perm=[0, 2, 3, 1]))
    return graph.dense(x, params["logits"])


def _resnet(graph: _Graph, network: ResNet, params: Params, x: str, image_shape: tuple[int, ...]) -> str:
    x = graph.channels_first(x, image_shape)
    x = graph.add("Relu", graph.conv(x, params["conv_stem"], stride=2 if network.imagenet else 1))
    channels = network.width
    if network.imagenet:
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, count in enumerate(network.blocks):
        for i in range(count):
            block = params[f"stage_{stage}_block_{i}"]
            stride = 2 if stage > 0 and i == 0 else 1
            y, last = x, 2 if network.bottleneck else 1
            for layer in range(last + 1):
                y = graph.add("Relu", y) if layer > 0 else y
                strided = layer == (1 if network.bottleneck else 0)
                y = graph.conv(y, block[f"conv_{layer}"], stride if strided else 1)
            wider = block[f"conv_{last}"]["kernel"].shape[-1] - channels
            x = graph.add("Relu", graph.add("Add", y, _shortcut(graph, block, x, stride, wider)))
            channels += wider
    return graph.dense(graph.add("ReduceMean", x, axes=[2, 3], keepdims=0), params["logits"])


def _shortcut(graph: _Graph, block: Params, x: str, stride: int, wider: int) -> str:
    """`x` in the shape of the block's result, which has `wider` more channels."""
    if "conv_shortcut" in block:
        return graph.conv(x, block["conv_shortcut"], stride)
    if stride > 1:
        starts, ends, axes, steps = [0, 0], [2**31 - 1] * 2, [2, 3], [stride] * 2
        x = graph.add("Slice", x, *(graph.constant(np.array(numbers)) for numbers in (starts, ends, axes, steps)))
    if wider > 0:
        x = graph.add("Pad", x, graph.constant(np.array([0, 0, 0, 0, 0, wider, 0, 0])))
    return x
