"""Reads dlib's face recognition net, `dlib_face_recognition_resnet_model_v1.dat`, as an ONNX graph.

The file is a fixed sequence of layers, each a name, whole numbers, and tensors. Its sha256 is
known, so only the tensors are read: they follow the names of their layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

SIDE = 150  # of a face in pixels
WIDTH = 128  # of a vector
# Channels of each residual block, and True if it halves the image: 29 layers with weights.
BLOCKS = (
    *[(32, False)] * 3, (64, True), *[(64, False)] * 3, (128, True), *[(128, False)] * 2,
    (256, True), *[(256, False)] * 2, (256, True),
)  # fmt: skip
OPSET, IR_VERSION = 17, 8  # of ONNX; ONNX Runtime 1.20 and later read them


class Graph:
    """A sequence of ONNX nodes, with the weights of layers of dlib's file.

    `at` is the name of the last output, and `shape` its channels, rows and columns.
    """

    def __init__(self, content: bytes):
        self.content, self.place = content, 0
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.at, self.shape = "face", (3, SIDE, SIDE)

    def tensor(self, layer: str, *shape: int, after: Sequence[int] = ()) -> np.ndarray:
        """Reads the tensor of four axes, float32, of the next layer of this name.

        Between name and tensor stand whole numbers: those in `after`, a 2, and the shape. Each has
        a byte with its length, and its bytes.
        """
        whole = (*after, 2, *shape)
        start = self.content.index(layer.encode(), self.place) + len(layer)
        start += sum(1 + (number.bit_length() + 7) // 8 for number in whole)
        self.place = start + 4 * math.prod(shape)
        return np.frombuffer(self.content[start : self.place], "<f4").reshape(shape)

    def add(self, kind: str, *inputs: str, **attributes: list[int]) -> str:
        """Adds a node that continues from `inputs`; returns the name of its output."""
        from onnx import helper

        self.at = f"{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [self.at])
        node.attribute.extend(helper.make_attribute(*each) for each in attributes.items())
        self.nodes.append(node)
        return self.at

    def constant(self, values: np.ndarray) -> str:
        """Adds a constant; returns its name."""
        name = f"weights_{len(self.weights)}"
        self.weights[name] = values
        return name

    def shrink(self, channels: int, kernel: int, stride: int, padding: int = 0) -> None:
        """Sets `shape` to that behind a window that moves over the rows and columns."""
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in self.shape[1:]]
        self.shape = (channels, *sides)

    def convolve(self, channels: int, kernel: int, stride: int) -> None:
        """Reads a convolution and the affine layer behind it, and adds both as one node."""
        shape, padding = (channels, self.shape[0], kernel, kernel), 0 if stride > 1 else kernel // 2
        size = math.prod(shape)
        numbers = self.tensor("con_4", size + channels, 1, 1, 1).ravel().astype(np.float64)
        affine = self.tensor("affine_", 2 * channels, 1, 1, 1)
        gain, shift = affine.reshape(2, -1).astype(np.float64)
        weights = numbers[:size].reshape(shape) * gain[:, None, None, None]
        biases = numbers[size:] * gain + shift
        arrays = [self.constant(array.astype(np.float32)) for array in (weights, biases)]
        self.add("Conv", self.at, *arrays, strides=[stride] * 2, pads=[padding] * 4)
        self.shrink(channels, kernel, stride, padding)

    def pool(self, kind: str, kernel: int) -> None:
        """Adds a pooling by steps of 2 that drops incomplete windows."""
        self.add(kind, self.at, kernel_shape=[kernel] * 2, strides=[2, 2])
        self.shrink(self.shape[0], kernel, 2)

    def block(self, channels: int, *, halves: bool) -> None:
        """Adds a residual block, which ends with the sum of what it adds to its input."""
        start, start_shape = self.at, self.shape
        self.convolve(channels, 3, 2 if halves else 1)
        self.add("Relu", self.at)
        self.convolve(channels, 3, 1)
        if halves:
            main, main_shape, self.at, self.shape = self.at, self.shape, start, start_shape
            self.pool("AveragePool", 2)
            start, start_shape, self.at, self.shape = self.at, self.shape, main, main_shape
        shape = tuple(map(max, self.shape, start_shape))
        main = self.grow(self.at, self.shape, shape)
        self.add("Add", main, self.grow(start, start_shape, shape))
        self.shape = shape
        self.add("Relu", self.at)

    def grow(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        """Returns the name of an output with zeros at the end of each axis, as dlib's sums have."""
        if shape == wanted:
            return name
        pads = [0] * 5 + [more - own for own, more in zip(shape, wanted, strict=True)]
        return self.add("Pad", name, self.constant(np.array(pads, np.int64)))

    def vector(self) -> None:
        """Adds the last layers: the mean of each channel, times a matrix."""
        mean = self.add("GlobalAveragePool", self.at)
        channels = self.shape[0]
        matrix = self.tensor("fc_2", channels, WIDTH, 1, 1, after=(WIDTH, channels))[..., 0, 0]
        self.add("MatMul", self.add("Flatten", mean), self.constant(matrix))
        self.nodes[-1].output[0] = "vector"


def convert(content: bytes) -> "ModelProto":
    """Returns the net that faces [B, 3, 150, 150], prepared as its card says, pass through.

    Its output is [B, 128]. Affine layers are joined with the convolutions before them.

    Source:
      He et al., Deep Residual Learning for Image Recognition, 2016, with half the channels; dlib's
      example dnn_face_recognition_ex names the layers.
    """
    graph = Graph(content)
    graph.convolve(32, 7, 2)
    graph.add("Relu", graph.at)
    graph.pool("MaxPool", 3)
    for channels, halves in BLOCKS:
        graph.block(channels, halves=halves)
    graph.vector()
    face, vector = ("face", ["B", 3, SIDE, SIDE]), ("vector", ["B", WIDTH])
    return to_model("dlib_face", graph.nodes, face, vector, graph.weights)


def to_model(
    name: str,
    nodes: "Sequence[NodeProto]",
    start: tuple[str, Sequence[str | int]],
    end: tuple[str, Sequence[str | int]],
    weights: Mapping[str, np.ndarray],
) -> "ModelProto":
    """Returns a checked ONNX model; `start` and `end` are name and shape of input and output."""
    from onnx import TensorProto, checker, helper, numpy_helper

    first, last = (helper.make_tensor_value_info(x, TensorProto.FLOAT, y) for x, y in (start, end))
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(array), one) for one, array in weights.items()
    ]
    net = helper.make_graph(nodes, name, [first], [last], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(net, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name = "vidjax"
    checker.check_model(model, full_check=True)
    return model
