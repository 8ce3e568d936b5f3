"""Small nets with random weights, with the inputs and outputs of published families of nets."""

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.helpers import made_nets

rng = np.random.default_rng
YUNET = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}  # outputs and their widths
SCRFD = {"score": 1, "bbox": 4, "kps": 10}


class Builder:
    """Collects the nodes and weights of a net with the input `data`."""

    def __init__(self, half=False):
        self.half, self.nodes, self.weights = half, [], {}

    def add(self, kind, *inputs, **attributes):
        """Adds a node; returns the name of its output. Arrays among `inputs` become weights."""
        names = []
        for x in inputs:
            if isinstance(x, np.ndarray):
                whole = x.dtype == np.int64
                array = x if whole else x.astype(np.float16 if self.half else np.float32)
                self.weights[f"w{len(self.weights)}"] = array
                x = f"w{len(self.weights) - 1}"
            names.append(x)
        output = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], output, **attributes))
        return output

    def build(self, shape, outputs, kind=TensorProto.FLOAT, *, listed=False):
        """Returns the bytes of the net. `outputs` are name -> (node, declared shape or None).

        If `listed` is True, the weights are also inputs, as in nets that MXNet exported.
        """
        for name, (node, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [node], [name]))
        ins = {name: (kind, x.shape) for name, x in self.weights.items()} if listed else {}
        out = TensorProto.FLOAT if kind == TensorProto.UINT8 else kind
        outs = {name: (out, dims) for name, (_, dims) in outputs.items()}
        return made_nets.write_graph(self.nodes, self.weights, ins | {"data": (kind, shape)}, outs)


def embedder(
    width=512, batch: Any = "N", side: Any = 112, *, half: Any = False, normalises=False,
    at_side=112, form="", **options,
):  # fmt: skip
    """Returns a net that multiplies 7 x 7 squares of a crop by random weights.

    If `half` is True, input and weights have 16 bits. If it is "weights", the input has 32 bits.
    `form` contains names of other forms, which compute the same vectors: `bgr`, `nhwc`, `uint8`,
    `axes` (vectors [N, width, 1, 1]), `norm` and `twice` (another output, [N, 1] or [N, width]).
    """
    net, at = Builder(half), "data"
    if "uint8" in form:
        at = net.add("Cast", at, to=TensorProto.FLOAT)
    if "nhwc" in form:
        at = net.add("Transpose", at, perm=[0, 3, 1, 2])
    if half == "weights":
        at = net.add("Cast", at, to=TensorProto.FLOAT16)
    if normalises:
        at = net.add("Mul", net.add("Sub", at, np.array([127.5])), np.array([0.0078125]))
    kernel = rng(1).normal(size=(4, 3, 8, 8)) / (14 if normalises else 1000)
    kernel = kernel[:, ::-1] if "bgr" in form else kernel
    at = net.add("Relu", net.add("Conv", at, kernel, strides=[at_side // 7] * 2))
    at = net.add("MatMul", net.add("Flatten", at), rng(2).normal(size=(196, width)) / 10)
    if half == "weights":
        at = net.add("Cast", at, to=TensorProto.FLOAT)
    kind = TensorProto.FLOAT16 if half is True else TensorProto.FLOAT
    kind = TensorProto.UINT8 if "uint8" in form else kind
    outputs = {"vector": (at, [batch, width])}
    if "norm" in form:  # the vector is the second output
        norm = net.add("ReduceL2", at, axes=[1], keepdims=1)
        outputs = {"norm": (norm, [batch, 1]), **outputs}
    if "twice" in form:
        outputs["other"] = outputs["vector"]
    if "axes" in form:
        at = net.add("Unsqueeze", at, np.array([2, 3], np.int64))
        outputs = {"vector": (at, [batch, width, 1, 1])}
    shape = [batch, side, side, 3] if "nhwc" in form else [batch, 3, side, side]
    return net.build(shape, outputs, kind, **options)


def _add_head(net, stride, channels, shape, score):
    """Adds an output, reshaped to `shape`: random weights times 8 x 8 pixels of each cell."""
    weights = rng(stride + channels).normal(size=(channels, 3, 8, 8)) / 1000
    at = net.add("Conv", "data", weights, strides=[stride] * 2)
    at = net.add("Reshape", net.add("Transpose", at, perm=[0, 2, 3, 1]), np.array(shape, np.int64))
    return net.add("Sigmoid", at) if score else at


def scrfd(strides=(8, 16, 32), anchors=2, *, points=True, sides=("H", "W"), only=0):
    """Returns a net with the outputs of SCRFD: scores, boxes and points for each stride.

    If `only` is a number, the net fails for images with another side, even if `sides` are free.
    """
    net, outputs = Builder(), {}
    for name, width in [*SCRFD.items()][: 3 if points else 2]:
        for stride in strides:
            count = anchors * (only // stride) ** 2 if only else -1
            head = _add_head(net, stride, anchors * width, [count, width], name == "score")
            outputs[f"{name}_{stride}"] = head, None
    return net.build([1, 3, *sides], outputs)


def yunet(sides=(640, 640), outputs=tuple(YUNET)):
    """Returns a net with the outputs of YuNet. As published, a score can be below 0 or above 1."""
    net = Builder()
    heads = {
        f"{name}_{stride}": (
            _add_head(net, stride, YUNET[name], [1, -1, YUNET[name]], name == "cls"), None
        )
        for name in outputs for stride in (8, 16, 32)
    }  # fmt: skip
    return net.build([1, 3, *sides], heads)
