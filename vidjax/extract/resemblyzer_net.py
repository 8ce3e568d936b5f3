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
# Mean vector, in 1 / 10,000, of ten speakers of LibriSpeech test-other: of each, the mean of ten
# utterances, whose vectors are means of windows of 1.6 s every 0.8 s, scaled to unit length.
CENTRE = (
    446, 128, 333, 0, 211, 323, 140, 232, 139, 336, 968, 824, 500, 22, 73, 563, 888, 510, 217, 187,
    164, 615, 0, 0, 0, 924, 172, 273, 0, 0, 702, 487, 566, 91, 486, 549, 688, 6, 144, 292, 0, 326,
    387, 403, 243, 262, 234, 403, 451, 404, 0, 551, 36, 0, 224, 90, 315, 346, 833, 62, 228, 199,
    642, 339, 605, 52, 782, 369, 1, 6, 204, 209, 37, 926, 192, 250, 0, 123, 252, 946, 56, 60, 906,
    602, 379, 221, 48, 461, 0, 811, 526, 8, 28, 32, 340, 0, 222, 0, 1, 0, 13, 17, 386, 916, 393,
    370, 191, 418, 43, 1232, 0, 600, 357, 801, 528, 0, 261, 143, 61, 757, 471, 394, 241, 558, 356,
    828, 376, 1112, 582, 0, 273, 1, 270, 545, 913, 354, 482, 36, 515, 412, 0, 80, 688, 253, 258,
    120, 582, 45, 1274, 276, 606, 1065, 96, 118, 210, 637, 9, 374, 632, 545, 1195, 0, 377, 643,
    269, 478, 514, 636, 546, 725, 0, 7, 285, 396, 0, 228, 560, 488, 188, 147, 620, 41, 52, 417,
    168, 0, 14, 623, 145, 77, 708, 704, 124, 572, 0, 268, 70, 588, 555, 731, 610, 529, 476, 198, 0,
    321, 246, 250, 309, 520, 25, 3, 690, 324, 0, 400, 0, 439, 902, 1, 713, 496, 31, 0, 210, 615,
    707, 586, 0, 0, 284, 0, 490, 0, 0, 502, 602, 664, 733, 821, 824, 398, 251, 2221, 1000, 591,
    679, 5, 458, 676, 14, 607, 245, 4, 333, 0,
)  # fmt: skip


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
