"""Writes cards for nets that users have: InsightFace's, OpenCV's, and nets of the same form.

`net_families.json` describes each family of nets. A net belongs to a family if its inputs and
outputs have the shapes of the family. The net is copied unchanged. It may come from a stranger, so
`work` reads it in a child process with limits, and code of the net's package is never run.

Source:
  InsightFace's arcface_onnx.py, scrfd.py and face_align.py; OpenCV's face_detect.cpp and
  face_recognize.cpp. The sha256 of known nets are from InsightFace's model_packages.py, and from
  the repository OpenCV Zoo.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from vidjax.apps import cards
from vidjax.apps.cards import Card, Role, Written
from vidjax.apps.video import net_packages, nets
from vidjax.apps.video.nets import Net
from vidjax.utils import processes
from vidjax.utils.errors import NetError, UserError, require_packages
from vidjax.utils.names import show

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

MEMORY_BYTES, CPU_SECONDS = 4 << 30, 600  # limits of the child process
TEMPLATE_SIDE = 112  # the side in pixels of the crops to which the templates of families belong
POINTS_MISSING = (6, 10)  # the numbers of outputs of SCRFD without points
PADDED_SIDE = 640  # SCRFD with strides up to 128 needs an input of this side
FREE_SIZES = ((256, 256), (96, 160))  # images, height and width, to test a net of any size
# Two numbers of a net's output for a test may differ by this share of the largest number. Other
# processors round in other ways. The second share is for weights of 16 bits.
TOLERANCE, HALF_TOLERANCE = 0.002, 0.02
SEED, OTHER_SEED = 1, 101  # of test inputs

DATA = msgspec.json.decode(Path(__file__).parents[1].joinpath("net_families.json").read_bytes())
FAMILIES: dict[str, Any] = DATA["families"]  # family -> fields of the card, `supported` in addition
KINDS: dict[str, Any] = DATA["kinds"]  # argument of `vidjax convert` -> families and licence
KNOWN: dict[str, Any] = DATA["known"]  # sha256 of a published net -> its origin and licence


class ForeignNet(NamedTuple):
    """A net from a user, and the shapes of inputs and outputs that it declares."""

    name: str  # of the file
    content: bytes
    model: "ModelProto"
    inputs: dict[str, list[int | None]]  # name -> shape. A free side is None.
    outputs: dict[str, list[int | None]]

    def describe(self) -> str:
        """Returns the inputs and outputs as text."""
        return f"input {_join(self.inputs)}, output {_join(self.outputs)}"

    def refuse(self, family: str, more: str = "", found: str = "") -> UserError:
        """Returns an error for a net that is not like its family.

        `more` continues the name of the family. `found` are the wrong shapes, by default all.
        """
        return UserError(
            f"'{show(self.name)}' is not like {family}{more}: it has {found or self.describe()}\n"
            f"supported is {FAMILIES[family]['supported']}"
        )


def _join(shapes: Mapping[str, list[int | None]]) -> str:
    texts = [f"{show(name)} {shape}" for name, shape in shapes.items()]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return (", ".join(texts[:3]) + more).replace("None", "free")


def convert(
    kind: str, paths: Sequence[Path], folder: Path, like: str = "", side: int | None = None
) -> list[Path]:
    """Copies nets into `folder`, and writes their cards; returns the paths of the cards.

    Args:
      kind: a key of `KINDS`. "insightface" finds the nets for faces in a package of several nets.
      paths: nets (.onnx), or a folder or .zip with nets.
      folder: the folder for the nets and their cards.
      like: the family. If it is "", the net's inputs and outputs determine the family.
      side: the side in pixels of an embedder's input, if the net allows any side.

    Raises:
      UserError: a file is damaged or of no family, or two nets have the same role.
    """
    require_packages("convert", "onnx", extra="convert")
    found: dict[Role, tuple[Path, str, Written]] = {}
    for path, name in _list_nets(paths):
        given = {"path": str(path), "name": name, "kind": kind, "like": like, "side": side}
        written = processes.run_limited(
            __name__, path, given, list[Written], memory_bytes=MEMORY_BYTES, cpu_seconds=CPU_SECONDS
        )
        for card in written:
            with processes.doubt(path):
                _check_card(card, kind, name, net_packages.unpack(path, name, cards.MODEL_BYTES))
            if card.role in found:
                raise UserError(
                    f"{card.source.file} and {found[card.role][2].source.file} are both nets for "
                    f"the role {card.role}\nconvert one of them: vidjax convert own FILE "
                    "--like=FAMILY"
                )
            found[card.role] = path, name, card
    wanted = {FAMILIES[family]["role"] for family in KINDS[kind]["families"]}
    if lost := sorted(wanted - found.keys()) if kind == "insightface" or not found else ():
        raise UserError(
            f"'{paths[0]}' contains no net for the role {lost[0]}\n"
            "check the package, or convert a single net: vidjax convert own FILE --like=FAMILY"
        )
    return [
        net_packages.write_net(folder, card, net_packages.unpack(path, name, cards.MODEL_BYTES))
        for path, name, card in found.values()
    ]


def _list_nets(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yields the name of each net, after its path or the path of the zip that contains it."""
    for path in paths:
        if path.is_dir():
            # macOS adds hidden files with the same endings.
            yield from ((net, net.name) for net in sorted(path.glob("[!.]*.onnx")))
        elif path.name.endswith((".tar.gz", ".tgz")):
            raise UserError(
                f"'{path}' is not a .zip file: unpack it, and name the net or its folder"
            )
        elif path.name.endswith(net_packages.ZIP_ENDINGS):
            yield from ((path, name) for name in net_packages.list_members(path, ".onnx"))
        else:
            yield path, path.name


def _check_card(card: Written, kind: str, name: str, content: bytes) -> None:
    """Raises ValueError if a card that a child made has fields of another net or family."""
    for family in KINDS[kind]["families"]:
        if FAMILIES[family]["role"] == card.role:
            right = msgspec.to_builtins(card) | _describe(kind, family, name, content)
            if card.back_end:
                centre = {"centre": card.back_end.centre}
                right["back_end"] = centre | FAMILIES[family]["back_end"]
            if msgspec.convert(right, Written) == card:
                return
    raise ValueError("the card is of another net")


def work(arguments: dict[str, Any]) -> list[Written]:
    """Returns the card of a net. The arguments are in `convert`.

    If the net is part of a package and belongs to no family, returns no card.
    """
    kind, name, like = (arguments[key] for key in ("kind", "name", "like"))
    content = net_packages.unpack(Path(arguments["path"]), name, cards.MODEL_BYTES)
    net, families = parse_net(content, name), KINDS[kind]["families"]
    known = KNOWN.get(hashlib.sha256(content).hexdigest(), {})
    family = known.get("family") or like or guess_family(net, families)
    if family not in families:
        if kind == "insightface":
            return []
        shapes = "; ".join(f"{x}: {FAMILIES[x]['supported']}" for x in families)
        raise UserError(f"'{show(name)}' has {net.describe()}\nsupported are {shapes}")
    if like not in ("", family):
        raise UserError(
            f"'{show(name)}' is {known['file']} of {known['package']}: use --like={family}"
        )
    refuse_unsafe(net)
    fields = _describe(kind, family, name, content) | _fit(family, net, arguments["side"])
    fields["test"] = {"seed": SEED, "output": [0.0] * 4, "tolerance": 1.0}
    try:
        return [_measure(fields, family, net)]
    except msgspec.ValidationError as error:  # for example, a side is too large for a card
        raise net.refuse(family, f" ({error})") from None


def _describe(kind: str, family: str, name: str, content: bytes) -> dict[str, Any]:
    """Returns the fields of a card that depend only on the file and the family of a net."""
    sha256, form = hashlib.sha256(content).hexdigest(), FAMILIES[family]
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name.removesuffix(".onnx")).lstrip(".-")[:90] or family
    known, unknown = KNOWN.get(sha256, {}), {"package": cards.UNKNOWN, "version": cards.UNKNOWN}
    source = {key: known.get(key, value) for key, value in unknown.items()}
    return {
        "format": 1, "file": f"{stem}.onnx", "sha256": sha256, "norm_is_quality": False,
        "role": form["role"], "decoder": form["decoder"], "notes": form["notes"],
        "licence": known.get("licence") or KINDS[kind]["licence"],
        "source": {**source, "file": name, "sha256": sha256},
        "conversion": f"vidjax.apps.video.net_families {family}: none",
    }  # fmt: skip


def parse_net(content: bytes, name: str) -> ForeignNet:
    """Parses a net. Raises UserError if it is damaged."""
    import onnx

    try:
        model = onnx.load_model_from_string(content)
        if not model.graph.node:
            raise ValueError("it has no operators")
    except Exception as error:  # a damaged net may raise any error
        reason = show((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(
            f"'{show(name)}' is not a complete ONNX file ({reason})\ncopy or download it again"
        ) from error
    weights = {weight.name for weight in model.graph.initializer}  # some nets list them as inputs
    inputs, outputs = (
        {
            x.name: [max(side.dim_value, 0) or None for side in x.type.tensor_type.shape.dim]
            for x in values if x.name not in weights
        }
        for values in (model.graph.input, model.graph.output)
    )  # fmt: skip
    return ForeignNet(name, content, model, inputs, outputs)


def refuse_unsafe(net: ForeignNet) -> None:
    """Raises UserError if a net needs other files, or other operators than standard ones."""
    graph = net.model.graph
    nodes = graph.node
    attributes = [(node.op_type, x) for node in nodes for x in node.attribute]
    constants = [x.t for _, x in attributes]
    operators = {operator for operator, x in attributes if x.HasField("g")}
    domains = {node.domain for node in nodes} - {"", "ai.onnx"}
    problems = {
        "weights in other files": any(map(_is_external, (*graph.initializer, *constants))),
        "sparse weights": bool(graph.sparse_initializer)
        or any(x.HasField("sparse_tensor") for _, x in attributes),
        "functions": bool(net.model.functions),
        f"the control flow {', '.join(sorted(operators))}": bool(operators),
        f"operators of {', '.join(sorted(domains))}": bool(domains),
    }
    if found := [problem for problem, is_found in problems.items() if is_found]:
        raise UserError(
            f"'{show(net.name)}' uses {show(found[0])}, which is not supported\n"
            "export the net to a single file with the standard operators of ONNX"
        )


def _is_external(weights: "TensorProto") -> bool:
    return weights.data_location == 1 or bool(weights.external_data)  # 1 is TensorProto.EXTERNAL


def guess_family(net: ForeignNet, families: Sequence[str]) -> str:
    """Returns the family with inputs and outputs like the net, or "" if there is none."""
    sides = [shape[1:] for shape in net.inputs.values()]
    widths = [shape[1:] for shape in net.outputs.values()]
    if len(sides) != 1 or len(sides[0]) != 3:
        return ""
    if "obj_8" in net.outputs:
        return "yunet"
    if len(widths) >= min(POINTS_MISSING):
        return "scrfd"
    if len(widths) == 1 and sides[0][1:] == [TEMPLATE_SIDE] * 2:
        return "sface" if widths[0] == [128] and "sface" in families else "arcface"
    return ""


def _fit(family: str, net: ForeignNet, side: int | None) -> dict[str, Any]:
    """Returns the fields of a net's card that depend on the inputs and outputs that it declares.

    `side` is the side in pixels of an embedder's input, or None for the default.
    """
    form, inputs, count = FAMILIES[family], [*net.inputs.items()], len(net.outputs)
    if len(inputs) != 1 or len(inputs[0][1]) != 4:
        raise net.refuse(family)
    name, (batch, channels, *sides) = inputs[0]
    is_wrong, template, values = batch not in (None, 1) or channels != 3, None, form["input"]
    if form["role"] == "face_embedder":
        side = side or next(filter(None, sides), TEMPLATE_SIDE)
        if is_wrong or not {*sides} <= {None, side}:
            raise net.refuse(family, f" for crops of {side} x {side} pixels")
        if family == "arcface" and _normalises(net.model):
            values = values | {"mean": 0.0, "scale": 1.0}
        size, template = [side] * 2, (np.array(form["template"]) * side / TEMPLATE_SIDE).tolist()
    else:
        if family == "scrfd" and count in POINTS_MISSING:
            raise UserError(
                f"'{show(net.name)}' finds boxes without points ({count} outputs), but the five "
                "points are needed to align faces\n"
                "use the SCRFD net with points; its name often contains kps"
            )
        if side or is_wrong:
            raise net.refuse(family, "; --size is for nets that compute vectors" * bool(side))
        if any(value and value % cards.STRIDE for value in sides):
            raise net.refuse(family, f" with sides that are multiples of {cards.STRIDE}")
        is_fixed = any(sides) or count == 3 * len(nets.MANY_STRIDES)
        size = [side or PADDED_SIDE for side in sides] if is_fixed else None
    values = {**values, "mean": [values["mean"]] * 3, "scale": [values["scale"]] * 3}
    return {"input": {"name": name, "size": size, **values}, "template": template}


def _normalises(model: "ModelProto") -> bool:
    """Returns whether a net begins with a subtraction and a product, so that it takes 0 to 255."""
    skipped = ("Cast", "Constant", "Identity")
    first = [node.op_type for node in model.graph.node if node.op_type not in skipped][:2]
    return first in (["Sub", "Mul"], ["Sub", "Div"])


def _measure(fields: dict[str, Any], family: str, net: ForeignNet) -> Written:
    """Runs a net, checks the shapes of its outputs, and returns its card with a test.

    If a detector does not run with every size that it declares, its size is set to 640 x 640.
    """
    # Other fields are known after the net has run.
    width = {"width": 1} if fields["role"] == "face_embedder" else {}
    draft = msgspec.convert({**fields, **width}, Written)
    card = Card(**msgspec.structs.asdict(draft), path=Path(fields["file"]), digest="")
    try:
        opened = nets.Net(card, net.content)
        if card.role == "face_detector":
            for size in (card.input.size,) if card.input.size else FREE_SIZES:
                _check_outputs(family, opened, net, size)
        else:
            width = _find_width(family, opened, net)
            back_end = {"centre": [0.0] * width, **FAMILIES[family]["back_end"]}
            fields |= {"width": width, "back_end": back_end}
        output, other = (opened.answer_formula(seed) for seed in (SEED, OTHER_SEED))
    except UserError as error:
        if card.role == "face_detector" and not card.input.size:
            fixed = {**fields["input"], "size": [PADDED_SIDE] * 2}
            return _measure({**fields, "input": fixed}, family, net)
        if not isinstance(error, NetError):
            raise
        reason = str(error).partition("\n")[0].partition("describes (")[2].removesuffix(")")
        text = f"'{show(net.name)}' cannot be used: {reason}\nexport it again, or use another net"
        raise UserError(text) from None
    if not np.isfinite(output).all() or np.array_equal(output, other):
        raise UserError(
            f"'{show(net.name)}' has the same output for different images, or an output "
            "that is no number\nits weights are damaged or missing: copy or download it again"
        )
    has_half = 10 in {x.data_type for x in net.model.graph.initializer}  # TensorProto.FLOAT16
    share = HALF_TOLERANCE if has_half else TOLERANCE
    tolerance = max(1e-6, share * float(np.abs(output).max()))
    fields["test"] = {"seed": SEED, "output": output.tolist(), "tolerance": tolerance}
    return msgspec.convert(fields, Written)


def _check_outputs(family: str, opened: Net, net: ForeignNet, size: tuple[int, int]) -> None:
    """Raises UserError if the outputs of a detector have other shapes than its family."""
    height, width = size
    outputs = [*opened.ask(nets.make_formula_inputs(opened.card, SEED, size)).values()]
    many = family == "scrfd" and len(outputs) == 3 * len(nets.MANY_STRIDES)
    strides = nets.MANY_STRIDES if many else nets.STRIDES
    anchors = 2 if family == "scrfd" and not many else 1
    cells = [anchors * (height // x) * (width // x) for x in strides]
    lengths = [1, 4, 10] if family == "scrfd" else [1, 1, 4, 10]
    wanted = [(count, length) for length in lengths for count in cells]
    # Outputs of SCRFD have a batch axis or not.
    shapes = [x.shape[1:] if x.ndim == 3 and len(x) == 1 else x.shape for x in outputs]
    if family == "yunet":
        names = [f"{kind}_{x}" for kind in ("cls", "obj", "bbox", "kps") for x in strides]
        of_name = dict(zip(net.outputs, outputs, strict=True))
        shapes = [of_name[name].shape[1:] if name in of_name else () for name in names]
    if shapes != wanted:
        texts = ", ".join(str([*x.shape]) for x in outputs)
        raise net.refuse(family, f" for an image of {width} x {height} pixels", show(texts))


def _find_width(family: str, opened: Net, net: ForeignNet) -> int:
    """Returns the width of an embedder's vectors. Checks that it embeds faces one by one."""
    first, second = (nets.make_formula_inputs(opened.card, seed) for seed in (SEED, OTHER_SEED))
    single, *more = opened.ask(first).values()
    if more or single.ndim != 2 or len(single) != 1:
        raise net.refuse(family)
    if opened.takes_many:
        pair = {name: np.concatenate([x, second[name]]) for name, x in first.items()}
        (both,) = opened.ask(pair).values()
        most = HALF_TOLERANCE * np.abs(single).max()
        if both.shape != (2, single.shape[1]) or np.abs(both[0] - single[0]).max() > most:
            raise net.refuse(family, " and computes other vectors for two faces than for one")
    return single.shape[1]


if __name__ == "__main__":
    processes.serve(work)
