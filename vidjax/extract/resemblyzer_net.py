"""Reads Resemblyzer's voice net, `pretrained.pt`, as an ONNX graph.

The file holds Python objects, which are never read: it is known by its sha256, so that its numbers
lie where they lay when the places below were looked up.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

UNITS, BANDS, LAYERS = 256, 40, 3
WIDTH = 256  # of a vector
LSTM_AT, WEIGHTS_AT, BIASES_AT = 269_883, 7_731, 6_699  # bytes before the numbers
OPSET, IR_VERSION = 17, 8  # of ONNX; ONNX Runtime 1.20 and later read them


def convert(content: bytes) -> "ModelProto":
    """Returns the net from mel spectrograms [B, T, 40] to vectors [B, 256] of unit length.

    Source:
      Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018; Resemblyzer's
      `VoiceEncoder`. Its gates are input, forget, cell, output; ONNX has the output second.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    def numbers(at: int, *shape: int) -> np.ndarray:
        return np.frombuffer(content, "<f4", math.prod(shape), at).reshape(shape)

    def reordered(gates: np.ndarray) -> np.ndarray:
        first, forget, cell, output = np.split(gates, 4)
        return np.concatenate([first, output, forget, cell])

    weights: dict[str, np.ndarray] = {}
    nodes = [helper.make_node("Transpose", ["mels"], ["x_0"], perm=[1, 0, 2])]
    at, biases_at = LSTM_AT, LSTM_AT + 4 * 4 * UNITS * (BANDS + (2 * LAYERS - 1) * UNITS)
    for layer in range(LAYERS):
        names = [f"{name}_{layer}" for name in ("x", "w", "r", "b")]
        for name, width in ((names[1], UNITS if layer else BANDS), (names[2], UNITS)):
            weights[name] = reordered(numbers(at, 4 * UNITS, width))[None]
            at += 4 * 4 * UNITS * width
        both = [reordered(row) for row in numbers(biases_at, 2, 4 * UNITS)]
        weights[names[3]] = np.concatenate(both)[None]
        biases_at += 4 * 8 * UNITS
        outputs = [f"y_{layer}", f"h_{layer}"]
        nodes.append(helper.make_node("LSTM", names, outputs, hidden_size=UNITS))
        if layer < LAYERS - 1:
            nodes.append(helper.make_node("Squeeze", [outputs[0], "one"], [f"x_{layer + 1}"]))
    weights |= {
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "matrix": numbers(WEIGHTS_AT, WIDTH, UNITS),
        "bias": numbers(BIASES_AT, WIDTH),
    }
    nodes += [
        helper.make_node("Squeeze", [f"h_{LAYERS - 1}", "zero"], ["last"]),
        helper.make_node("Gemm", ["last", "matrix", "bias"], ["raw"], transB=1),
        helper.make_node("Relu", ["raw"], ["positive"]),
        helper.make_node("LpNormalization", ["positive"], ["vector"], axis=1, p=2),
    ]
    mels = helper.make_tensor_value_info("mels", TensorProto.FLOAT, ["B", "T", BANDS])
    vector = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["B", WIDTH])
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(array), name)
        for name, array in weights.items()
    ]
    net = helper.make_graph(nodes, "resemblyzer", [mels], [vector], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(net, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name = "vidjax"
    checker.check_model(model, full_check=True)
    return model
