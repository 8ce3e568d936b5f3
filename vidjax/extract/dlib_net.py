"""Reads dlib's face recognition net, `dlib_face_recognition_resnet_model_v1.dat`, as an ONNX graph.

The file is a fixed sequence of layers, each a name, its numbers, and tensors. A closed reader
takes what that sequence has, in its order, and refuses everything else.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from vidjax.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto

SIDE = 150  # of a face in pixels
MEAN = (122.782, 117.001, 104.298)  # of r, g and b, to be subtracted
SCALE = (1 / 256, 1 / 256, 1 / 256)
WIDTH = 128  # of a vector
# Channels of each residual block, and True if it halves the image: 29 layers with weights.
BLOCKS = (
    *[(32, False)] * 3, (64, True), *[(64, False)] * 3, (128, True), *[(128, False)] * 2,
    (256, True), *[(256, False)] * 2, (256, True),
)  # fmt: skip
INNERMOST = 3  # the version of the layer that stands next to the input
OPSET, IR_VERSION = 17, 8  # of ONNX; ONNX Runtime 1.20 and later read them


class Reader:
    """Reads dlib's serialisation, one value after another; a value that does not fit is refused."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        """Reads bytes."""
        if not 0 <= size <= len(self.content) - self.at:
            raise UserError(f"a value of {size} bytes at byte {self.at} goes beyond the end")
        self.at += size
        return self.content[self.at - size : self.at]

    def whole(self) -> int:
        """Reads a whole number: a byte with its sign and length, and its bytes, lowest first."""
        (head,) = self.take(1)
        if not 1 <= head & 0x7F <= 8:
            raise UserError(f"no whole number at byte {self.at - 1}")
        value = int.from_bytes(self.take(head & 0x7F), "little")
        return -value if head & 0x80 else value

    def wholes(self, *wanted: int) -> None:
        """Reads whole numbers, which must be those wanted."""
        for value in wanted:
            if (found := self.whole()) != value:
                raise UserError(f"{found} before byte {self.at}, where {value} should be")

    def skip_floats(self, count: int) -> None:
        """Reads numbers that only training needs, each a whole number and its exponent."""
        for _ in range(2 * count):
            self.whole()

    def name(self, wanted: str) -> None:
        """Reads a text, which must be the one wanted."""
        found = self.take(self.whole())
        if found != wanted.encode():
            raise UserError(f"{found[:20]!r} before byte {self.at}, where {wanted} should be")

    def tensor(self, *shape: int) -> np.ndarray:
        """Reads a tensor of four axes, float32, which must have a shape."""
        self.wholes(2, *shape)
        return np.frombuffer(self.take(4 * math.prod(shape)), "<f4").reshape(shape)

    def end(self) -> None:
        """Reads what ends a layer: flags, and gradients and outputs, which are empty."""
        self.take(3)
        for _ in range(3):
            self.tensor(0, 0, 0, 0)


class Graph:
    """A sequence of layers: reads each from a file and adds it as an ONNX node.

    `at` is the name of the last output, and `shape` that output's channels, rows and columns.
    """

    def __init__(self, reader: Reader):
        self.reader, self.nodes, self.weights = reader, [], []
        self.at, self.shape = "face", (3, SIDE, SIDE)

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
        from onnx import numpy_helper

        name = f"weights_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def shrink(self, channels: int, kernel: int, stride: int, padding: int = 0) -> None:
        """Sets `shape` to that behind a window that moves over the rows and columns."""
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in self.shape[1:]]
        self.shape = (channels, *sides)

    def convolve(self, channels: int, kernel: int, stride: int) -> None:
        """Reads a convolution and the affine layer behind it, and adds both as one node."""
        read, shape = self.reader, (channels, self.shape[0], kernel, kernel)
        size, padding = math.prod(shape), 0 if stride > 1 else kernel // 2
        read.name("con_4")
        numbers = read.tensor(size + channels, 1, 1, 1).ravel().astype(np.float64)
        read.wholes(channels, kernel, kernel, stride, stride, padding, padding)
        read.wholes(1, *shape, 1, 1, channels, 1, 1)  # where weights and biases lie in `numbers`
        read.skip_floats(4)
        read.end()
        if not self.nodes:
            read.wholes(1)  # images of a batch for each image of the input
        read.name("affine_")
        gain, shift = read.tensor(2 * channels, 1, 1, 1).reshape(2, -1).astype(np.float64)
        read.wholes(*(1, 1, channels, 1, 1) * 2, 0)
        read.end()
        weights = numbers[:size].reshape(shape) * gain[:, None, None, None]
        biases = numbers[size:] * gain + shift
        arrays = [self.constant(array.astype(np.float32)) for array in (weights, biases)]
        self.add("Conv", self.at, *arrays, strides=[stride] * 2, pads=[padding] * 4)
        self.shrink(channels, kernel, stride, padding)

    def relu(self) -> None:
        """Reads and adds a rectifier."""
        self.reader.name("relu_")
        self.reader.end()
        self.add("Relu", self.at)

    def pool(self, kind: str, kernel: int) -> None:
        """Reads and adds a pooling by steps of 2, `max` or `avg`, that drops incomplete windows."""
        self.reader.name(f"{kind}_pool_2")
        self.reader.wholes(kernel, kernel, 2, 2, 0, 0)
        self.reader.end()
        node = {"max": "MaxPool", "avg": "AveragePool"}[kind]
        self.add(node, self.at, kernel_shape=[kernel] * 2, strides=[2, 2])
        self.shrink(self.shape[0], kernel, 2)

    def block(self, channels: int, *, halves: bool) -> None:
        """Reads and adds a residual block, which ends with the sum of what it adds to its input."""
        start, start_shape = self.at, self.shape
        self.convolve(channels, 3, 2 if halves else 1)
        self.relu()
        self.convolve(channels, 3, 1)
        if halves:
            main, main_shape, self.at, self.shape = self.at, self.shape, start, start_shape
            self.pool("avg", 2)
            start, start_shape, self.at, self.shape = self.at, self.shape, main, main_shape
        self.reader.name("add_prev_")
        self.reader.end()
        shape = tuple(map(max, self.shape, start_shape))
        main = self.grow(self.at, self.shape, shape)
        self.add("Add", main, self.grow(start, start_shape, shape))
        self.shape = shape
        self.relu()

    def grow(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        """Returns the name of an output with zeros at the end of each axis, as dlib's sums have."""
        if shape == wanted:
            return name
        pads = [0] * 5 + [more - own for own, more in zip(shape, wanted, strict=True)]
        return self.add("Pad", name, self.constant(np.array(pads, np.int64)))

    def vector(self) -> None:
        """Reads and adds the last layers: the mean of each channel, times a matrix."""
        read, channels = self.reader, self.shape[0]
        read.name("avg_pool_2")
        read.wholes(0, 0, 1, 1, 0, 0)
        read.end()
        mean = self.add("GlobalAveragePool", self.at)
        read.name("fc_2")
        read.wholes(WIDTH, channels)
        matrix = read.tensor(channels, WIDTH, 1, 1).reshape(channels, WIDTH)
        read.wholes(1, channels, WIDTH, 1, 1, 1, 0, 0, 0, 0, 1)  # where it lies; no biases
        read.skip_floats(4)
        read.end()
        self.add("MatMul", self.add("Flatten", mean), self.constant(matrix))


def convert(content: bytes) -> "ModelProto":
    """Returns the net that faces [B, 3, 150, 150], less MEAN and times SCALE, pass through.

    Its output is [B, 128]. Affine layers are joined with the convolutions before them.

    Source:
      He et al., Deep Residual Learning for Image Recognition, 2016, with half the channels; dlib's
      example dnn_face_recognition_ex names the layers.
    """
    from onnx import TensorProto, checker, helper

    reader = Reader(content)
    graph = Graph(reader)
    _read_head(reader)
    graph.convolve(32, 7, 2)
    graph.relu()
    graph.pool("max", 3)
    for channels, halves in BLOCKS:
        graph.block(channels, halves=halves)
    graph.vector()
    if reader.at != len(content):
        raise UserError(f"{len(content) - reader.at} bytes follow the last layer")
    graph.nodes[-1].output[0] = "vector"
    face = helper.make_tensor_value_info("face", TensorProto.FLOAT, ["B", 3, SIDE, SIDE])
    vector = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["B", WIDTH])
    net = helper.make_graph(graph.nodes, "dlib_face", [face], [vector], graph.weights)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(net, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name = "vidjax"
    checker.check_model(model, full_check=True)
    return model


def _read_head(reader: Reader) -> None:
    """Reads what stands before the first layer: the loss, versions of layers, and the input."""
    reader.wholes(1)
    reader.name("loss_metric_2")
    reader.skip_floats(2)
    while reader.whole() != INNERMOST:
        pass
    reader.name("input_rgb_image_sized")
    reader.skip_floats(3)  # MEAN
    reader.wholes(SIDE, SIDE)
