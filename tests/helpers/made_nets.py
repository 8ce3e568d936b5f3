"""Small ONNX nets and their cards, for tests of the code that runs nets."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.embeddings import DLIB_CARD

SIDE, WIDTH = 8, 5  # the side of the embedder's crops, and the width of its vectors
FACE = 16  # side in pixels of the squares that the detector finds
POINTS = np.array([(0.3, 0.3), (0.7, 0.3), (0.5, 0.5), (0.35, 0.8), (0.65, 0.8)])  # x, y of a box
# The matrix of the embedder, for pixels row by row in rgb.
WEIGHTS = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, WIDTH)).astype(np.float32)
# Inputs of Silero's net in addition to the samples.
SILERO = {"state": (TensorProto.FLOAT, [2, "B", 128]), "sr": (TensorProto.INT64, [])}
IMAGE = {
    "layout": "NCHW", "colour": "rgb", "size": None, "mean": [0.0, 0.0, 0.0],
    "scale": [1.0, 1.0, 1.0],
}  # fmt: skip
CARD = {
    "format": 1, "norm_is_quality": False,
    "licence": {"code": "none", "weights": "none", "training_data": "none"},
    "source": {"package": "none", "version": "0", "file": "none", "sha256": "0" * 64},
    "conversion": "made by a test", "notes": "",
}  # fmt: skip


def colours():
    """Returns weights [8 * 8 * 3, 5] of an embedder whose vector is the mean colour of a crop."""
    return np.tile(np.eye(3, WIDTH, dtype=np.float32), (SIDE * SIDE, 1)) / SIDE**2


def embedder(layout="NCHW", weights: Any = WEIGHTS):
    """Returns a net that multiplies the pixels of a crop by `weights` [8 * 8 * 3, width]."""
    shape = [SIDE, SIDE, 3]
    if layout == "NCHW":
        weights = weights.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(SIDE * SIDE * 3, -1)
        shape = [3, SIDE, SIDE]
    flat = helper.make_node("Flatten", ["x"], ["flat"])
    nodes = [flat, helper.make_node("MatMul", ["flat", "w"], ["vector"])]
    return model(nodes, {"w": np.ascontiguousarray(weights)}, shape, ["vector"])


def detector(side=FACE, weights=(1.0, 1.0, 1.0), points=POINTS):
    """Returns a net that finds bright squares of FACE x FACE pixels, with CenterFace's outputs.

    `side` is the side of its boxes in pixels. `weights` are of the colours red, green and blue.
    `points` [5, 2] are x and y of the points of a face, as fractions of the box.
    """
    kernel = np.full((1, 3, FACE, FACE), 1 / (3 * FACE**2), np.float32)
    kernel *= np.array(weights, np.float32)[:, None, None]
    zero = np.zeros((1, 3, 1, 1), np.float32)
    # The offset is -0.5, because a window's centre is the corner of a cell.
    constants = {"scale": np.log([side / 4, side / 4]), "offset": np.full(2, -0.5)}
    constants["points"] = points[:, ::-1].ravel()
    # With 1 / 255 in a separate node, faces of equal brightness have equal scores.
    arrays: dict[str, Any] = {"kernel": kernel, "gain": np.array([1 / 255], np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["mean"], strides=[4, 4], pads=[8, 8, 4, 4]),
        helper.make_node("Mul", ["mean", "gain"], ["heat"]),
    ]
    for name, values in constants.items():
        arrays[f"{name}_w"] = np.repeat(zero, len(values), 0)
        arrays[f"{name}_b"] = values.astype(np.float32)
        inputs = ["x", f"{name}_w", f"{name}_b"]
        nodes.append(helper.make_node("Conv", inputs, [name], strides=[4, 4]))
    return model(nodes, arrays, [3, "H", "W"], ["heat", *constants])


def voice_weights():
    """Returns the weights [40, 5] of `voice_embedder`."""
    return np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)


def voice_embedder():
    """Returns a net that averages mel bands [T, 40] over time, and multiplies them by weights."""
    mean = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=0)
    nodes = [mean, helper.make_node("MatMul", ["mean", "w"], ["vector"])]
    return model(nodes, {"w": voice_weights()}, ["T", 40], ["vector"])


def voice_activity():
    """Returns a net like Silero's whose output is its state plus the mean of the samples."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Add", ["state", "mean"], ["stateN"]),
        helper.make_node("ReduceMean", ["stateN"], ["all"], axes=[0], keepdims=0),
        helper.make_node("ReduceMean", ["all"], ["output"], axes=[1], keepdims=1),
    ]
    return model(nodes, {}, ["T"], ["output", "stateN"], SILERO)


def loudness():
    """Returns a net like Silero's whose output is five times the mean absolute sample."""
    nodes = [
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "gain"], ["output"]),
        helper.make_node("Identity", ["state"], ["stateN"]),
    ]
    return model(nodes, {"gain": np.array([5], np.float32)}, ["T"], ["output", "stateN"], SILERO)


def model(nodes, weights, shape, outputs, more=None):
    """Returns the bytes of an ONNX net with the input x [B, *shape].

    `weights` are name -> array. `more` inputs are name -> (type, shape).
    """
    inputs = {"x": (TensorProto.FLOAT, ["B", *shape]), **(more or {})}
    return write_graph(nodes, weights, inputs, dict.fromkeys(outputs, (TensorProto.FLOAT, None)))


def write_graph(nodes, weights, inputs, outputs):
    """Returns the bytes of an ONNX net. `inputs` and `outputs` are name -> (type, shape)."""
    named = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    ins, outs = (
        [helper.make_tensor_value_info(name, *facts) for name, facts in x.items()]
        for x in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "made", ins, outs, named)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def write_dlib(folder):
    """Writes a small net with the card of dlib's net, as earlier versions wrote it.

    The net multiplies the mean colour of a crop by random weights. Returns the path of the card.
    """
    card: dict[str, Any] = DLIB_CARD
    weights = np.random.default_rng(0).normal(size=(3, card["width"])).astype(np.float32)
    name, image = card["input"]["name"], ["B", 3, *card["input"]["size"]]
    nodes = [
        helper.make_node("ReduceMean", [name], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["vector"]),
    ]
    kind = TensorProto.FLOAT
    net = write_graph(nodes, {"w": weights}, {name: (kind, image)}, {"vector": (kind, None)})
    own = ("sha256", "test")  # of the real net
    fields: Any = {key: value for key, value in card.items() if key not in own}
    return write(folder, Path(card["file"]).stem, content=net, **fields)


def back_end(same=(0.95, 0.05), different=(0.1, 0.2), width=WIDTH):
    """Returns the field `back_end` of a card: mean and deviation of the cosines of pairs."""
    pairs = {"same": [*same], "different": [*different], "pairs": [10, 10]}
    return {"centre": [0.0] * width, "data": "made", **pairs}


def write(folder, name="face", role="face_embedder", content=None, **fields):
    """Writes a net and its card with other values of `fields`; returns the path of the card."""
    make, decoder, input_ = embedder, "vectors", {**IMAGE, "size": [SIDE, SIDE]}
    if role == "voice_embedder":
        make, input_ = voice_embedder, {"layout": "mels"}
    elif role == "voice_activity":
        make, decoder, input_ = voice_activity, "silero", {"layout": "samples"}
    elif role.endswith("_detector"):
        make, decoder, input_ = detector, "centerface", IMAGE
    content = content or make()
    (folder / f"{name}.onnx").write_bytes(content)
    card = {
        **CARD, "role": role, "file": f"{name}.onnx", "sha256": hashlib.sha256(content).hexdigest(),
        "decoder": decoder, "input": {"name": "x", **input_, **fields.pop("input", {})},
        "test": {"seed": 0, "output": [0, 0, 0, 0], "tolerance": 1e9},
        **({"width": WIDTH} if decoder == "vectors" else {}),
        **({"template": (POINTS * SIDE).tolist()} if role == "face_embedder" else {}),
        **fields,
    }  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(card))
    return path
