"""`vidjax convert` for nets in the form of published families, against slow decoders."""

import itertools
import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from functools import partial

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import external_data_helper, numpy_helper
from onnx.helper import make_node

from tests.helpers import drawn_people, family_nets as made, made_nets
from tests.helpers.seen import refused
from vidjax.apps import cards
from vidjax.apps.video import net_checks, net_families, nets
from vidjax.utils.errors import VidjaxWarning

# Published: the five points of faces in crops of 112 x 112, rounded (face_align.py).
POINTS = [[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37], [70.73, 92.20]]
RGB_127, RAW = [127.5, 1 / 127.5], [0.0, 1.0]
EMBEDDERS = {
    "arcface": ("arcface", made.embedder(), RGB_127),
    "arcface, static batch": ("arcface", made.embedder(batch=1), RGB_127),
    "arcface, 0 to 255": ("arcface", made.embedder(normalises=True), RAW),
    "arcface, 16 bits": ("arcface", made.embedder(256, half=True), RGB_127),
    "arcface, weights of 16 bits": ("arcface", made.embedder(half="weights"), RGB_127),
    "sface": ("sface", made.embedder(128, batch=1, normalises=True, listed=True), RAW),
}
# Weights are no longer inputs. All other nets are copied unchanged.
UNLISTED = made.embedder(128, batch=1, normalises=True)
DETECTORS = {
    "scrfd": ("scrfd", made.scrfd(), None),
    "scrfd, static": ("scrfd", made.scrfd(sides=(640, 640)), [640, 640]),
    "scrfd, five strides": ("scrfd", made.scrfd((8, 16, 32, 64, 128), 1), [640, 640]),
    "scrfd, not really free": ("scrfd", made.scrfd(only=640), [640, 640]),
    "yunet": ("yunet", made.yunet(), [640, 640]),
    "yunet, free": ("yunet", made.yunet(("H", "W")), None),
}


@pytest.fixture
def convert(command, tmp_path, read_here):
    """Returns a function: content of a net, flags -> answer of `vidjax convert`, and its card."""

    def run(content, *flags, kind="own", name="net.onnx"):
        path, out = tmp_path / name, tmp_path / "models"
        path.write_bytes(content)
        done = command("convert", kind, path, f"--out={out}", *flags)
        return done, out / name.replace(".onnx", ".json")

    return run


@pytest.mark.parametrize("case", EMBEDDERS)
def test_embedders_of_each_family_get_a_card_that_computes_their_vectors(convert, case):
    family, content, (mean, scale) = EMBEDDERS[case]
    done, path = convert(content, f"--like={family}")
    assert "not a known file" in done.out and "weights not stated" in done.out
    card = cards.load(path.parent)["face_embedder"]
    assert path.with_suffix(".onnx").read_bytes() == (UNLISTED if case == "sface" else content)
    assert card.input.colour == "rgb" and card.input.size == (112, 112)
    np.testing.assert_allclose(np.array(card.template), POINTS, atol=0.006)
    assert card.back_end and card.back_end.data.startswith(cards.NOT_MEASURED)
    embedder = nets.Embedder(card)  # passes its test
    crops = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    vectors = embedder(crops)
    x = (crops.transpose(0, 3, 1, 2).astype(np.float64) - mean) * scale
    (kind,) = {x.type for x in embedder.session.get_inputs()}
    x = x.astype(np.float16 if kind == "tensor(float16)" else np.float32)
    wanted = [np.array(embedder.session.run(None, {"data": face[None]})[0]) for face in x]
    assert vectors.shape == (3, card.width)
    near = 0.05 if "16" in case else 1e-4
    np.testing.assert_allclose(vectors, np.concatenate(wanted), atol=near * np.abs(vectors).max())


def decode_slowly(card, outputs, width):
    """Returns rows [score, box, points] for each score above 0.2.

    As in scrfd.py: (x, y) are the column and row of the cell times the stride. A box is (x - left,
    y - top, x + right, y + bottom), and a point is (x, y) plus its distance. As in face_detect.cpp
    for YuNet: the score is sqrt(cls obj), both clipped to 0 to 1. The centre is the cell plus its
    distance, and sides are exp(distance). All distances are in strides.
    """
    strides = (8, 16, 32, 64, 128) if len(outputs) == 15 else (8, 16, 32)
    anchors = 2 if len(outputs) == 9 else 1
    arrays, rows = [x.reshape(-1, x.shape[-1]) for x in outputs.values()], []
    for number, stride in enumerate(strides):
        *scores, box, points = arrays[number :: len(strides)]
        row, column = np.divmod(np.arange(len(box)) // anchors, width // stride)
        cell = np.stack([column, row], 1)
        score = np.sqrt(np.prod(np.clip(scores, 0, 1), 0)) if len(scores) == 2 else scores[0]
        if card.decoder == "yunet":
            centre, half = cell + box[:, :2], np.exp(box[:, 2:]) / 2
            corners = [centre - half, centre + half]
        else:
            corners = [cell - box[:, :2], cell + box[:, 2:]]
        places = stride * np.hstack([*corners, np.tile(cell, 5) + points])
        rows.append(np.hstack([score, places])[score[:, 0] > nets.WEAK_SCORE])
    return np.concatenate(rows)


@pytest.mark.parametrize("case", DETECTORS)
def test_detectors_of_each_family_get_a_card_and_are_decoded_as_published(
    convert, case, monkeypatch
):
    # Thousands of random faces overlap.
    monkeypatch.setattr(nets, "suppress_overlaps", lambda faces: faces)
    family, content, size = DETECTORS[case]
    _, path = convert(content, f"--like={family}")
    card = cards.load(path.parent)["face_detector"]
    assert card.input.size == (size and tuple(size))
    assert card.input.colour == ("rgb" if family == "scrfd" else "bgr")
    detector = nets.Detector(card)  # passes its test
    height, width = size or (96, 160)
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    x = image.astype(np.float64)
    x = (x - 127.5) / 128 if family == "scrfd" else x[..., ::-1]  # from the published programs
    x = x.transpose(2, 0, 1)[None].astype(np.float32)
    answers = map(np.array, detector.session.run(None, {"data": x}))
    # The decoder of SCRFD uses the order of the outputs, not their names.
    names = [output.name for output in detector.session.get_outputs()]
    names = "abcdefghijklmno"[: len(names)] if family == "scrfd" else names
    outputs = dict(zip(names, answers, strict=True))
    faces = nets.DECODERS[card.decoder](outputs, width)
    wanted = decode_slowly(card, outputs, width)
    assert len(wanted) > 100
    found = np.hstack([faces.scores[:, None], faces.boxes, faces.points.reshape(-1, 10)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)
    # The best face of the image is found with the colours and the scale of the card.
    searched = detector.search(image)
    np.testing.assert_allclose(searched.scores.max(), wanted[:, 0].max(), rtol=1e-4)


def test_package_of_insightface_is_searched_for_its_two_nets(command, tmp_path, read_here):
    package, folder, out = (tmp_path / name for name in ("buffalo_x.zip", "unpacked", "models"))
    members = {
        "det.onnx": made.scrfd(), "vec.onnx": made.embedder(),
        "genderage.onnx": made.embedder(3, side=96), "._det.onnx": b"of macOS",
    }  # fmt: skip
    with zipfile.ZipFile(package, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"buffalo_x/{name}", content)
    done = command("convert", "insightface", package, f"--out={out}")
    assert done.code == 0, done.err
    assert done.out.count("non-commercial research only") == 2
    decoders = {role: card.decoder for role, card in cards.load(out).items()}
    assert decoders == {"face_detector": "scrfd", "face_embedder": "vectors"}
    written = {path.name for path in out.iterdir()}
    assert written == {"det.json", "det.onnx", "vec.json", "vec.onnx"}
    (other := tmp_path / "other").mkdir()
    (other / "vec.onnx").write_bytes(b"of the user")
    convert = partial(command, "convert", "insightface", f"--out={other}")
    with zipfile.ZipFile(package, "a") as archive:
        archive.writestr("older/vec.onnx", made.embedder(3))
    assert convert(package).refused("two files have the name vec.onnx", "unpack")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/net.txt", b"")
    (tmp_path / "a.tar.gz").touch()
    for name, hint in (("other.whl", "contains no net for the role"), ("a.tar.gz", "unpack it")):
        assert convert(tmp_path / name).refused(name, hint)
    folder.mkdir()
    net = members["vec.onnx"]
    # Further files of the folder, and words of the error.
    for files, *words in (
        ({name: members[name] for name in ("det.onnx", "._det.onnx")}, "face_embedder", "own"),
        ({"vec.onnx": net[:-9]}, "vec.onnx", "complete"),
        ({"vec.onnx": net}, "vec.onnx", "was not written by vidjax"),
        ({"vec2.onnx": net}, "vec.onnx", "vec2.onnx", "convert own"),
    ):
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert convert(folder).refused(*words)
    assert [path.name for path in other.iterdir()] == ["vec.onnx"]


def test_nets_of_opencv_are_recognised_by_their_outputs(command, tmp_path, read_here):
    embedder = made.embedder(128, batch=1, normalises=True)
    for name, content in {"a": made.yunet(), "b": embedder, "c": made.scrfd()}.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    convert, models = partial(command, "convert", "opencv"), tmp_path / "models"
    done = convert(tmp_path / "a.onnx", tmp_path / "b.onnx", f"--out={models}")
    assert done.code == 0, done.err
    assert [card.decoder for card in cards.load(models).values()] == ["yunet", "vectors"]
    done = convert(tmp_path / "c.onnx", f"--out={tmp_path / 'other'}")
    assert done.refused("c.onnx", "score_8", "yunet:", "sface:")


def test_known_files_have_a_family_and_a_licence():
    for entry in net_families.KNOWN.values():
        assert entry["family"] in net_families.FAMILIES
        is_research = "research only" in entry["licence"]["weights"]
        assert is_research == entry["package"].startswith("InsightFace")


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_weights_in_blocks_of_8_bits_become_numbers_and_inputs_without_use_go(convert, block):
    """As OpenCV stores its nets: `block` numbers have one scale."""
    draw = np.random.default_rng(0)
    plain = onnx.load_model_from_string(made.embedder(128, batch=1, normalises=True))
    stored = onnx.ModelProto()
    stored.CopyFrom(plain)
    stored.opset_import[0].version = 21
    graph, nodes = stored.graph, list[onnx.NodeProto]()
    for weights, old in zip([*plain.graph.initializer], [*graph.initializer], strict=True):
        array = numpy_helper.to_array(weights)
        if array.ndim < 2:
            continue
        flat = draw.integers(-128, 128, (len(array), array[0].size), np.int8)
        shape = (len(flat), -(-flat.shape[1] // block))
        scales = draw.uniform(1e-4, 1e-3, shape).astype(np.float32)
        zeros = draw.integers(-9, 9, shape, np.int8)
        of = np.arange(flat.shape[1]) // block
        values = (flat.astype(np.float32) - zeros[:, of]) * scales[:, of]
        weights.CopyFrom(numpy_helper.from_array(values.reshape(array.shape), weights.name))
        name = old.name
        graph.initializer.remove(old)
        options = {"axis": 1, "block_size": block}
        parts = {"q": flat, "s": scales, "z": zeros, "shape": np.array(array.shape, np.int64)}
        for part, x in parts.items():
            graph.initializer.append(numpy_helper.from_array(x, f"{name}_{part}"))
        parts = [f"{name}_{part}" for part in "qsz"]
        nodes.append(make_node("DequantizeLinear", parts, [f"{name}_flat"], **options))
        nodes.append(make_node("Reshape", [f"{name}_flat", f"{name}_shape"], [f"{name}_new"]))
        for node in graph.node:
            node.input[:] = [f"{name}_new" if x == name else x for x in node.input]
        graph.input.append(onnx.helper.make_tensor_value_info(name, 1, array.shape))  # not read
    nodes += [*graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    found = list[nets.Embedder]()
    for net in (stored, plain):
        _, path = convert(net.SerializeToString(), "--like=sface")
        found.append(nets.Embedder(cards.read(path)))
        shutil.rmtree(path.parent)
    crops = draw.integers(0, 256, (3, 112, 112, 3), np.uint8)
    np.testing.assert_array_equal(found[0](crops), found[1](crops))
    assert [x.name for x in found[0].session.get_inputs()] == ["data"]


@pytest.mark.parametrize("shape", [(3, 1, 1), (1,)])
def test_prelu_of_an_image_is_replaced_and_the_vectors_stay_equal(convert, shape):
    slopes = np.random.default_rng(0).normal(0, 0.5, shape).astype(np.float32)

    def add(model):
        model.graph.initializer.append(numpy_helper.from_array(slopes, "slopes"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(127.5, "f"), "middle"))
        model.graph.node.insert(0, make_node("Sub", ["data", "middle"], ["centred"]))
        model.graph.node.insert(1, make_node("PRelu", ["centred", "slopes"], ["bent"]))
        for node in model.graph.node[2:]:
            node.input[:] = ["bent" if x == "data" else x for x in node.input]

    net = edit(made.embedder(128, batch=1), add)
    _, path = convert(net, "--like=sface")
    card = cards.read(path)
    kinds = {node.op_type for node in onnx.load_model_from_string(card.read_net()).graph.node}
    assert ("PRelu" in kinds) == (shape == (1,))
    crops = np.random.default_rng(1).integers(0, 256, (3, 112, 112, 3), np.uint8)
    vectors = nets.Embedder(card)(crops)
    np.testing.assert_allclose(vectors, nets.Embedder(card, net)(crops), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["Reshape", "ReduceMax"])
def test_net_whose_vectors_depend_on_other_faces_reads_one_face_at_a_time(convert, kind):
    def add(model):
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 112, 112]), "shape"))
        node = make_node("Reshape", ["data", "shape"], ["one"])
        if kind == "ReduceMax":
            node = make_node(kind, ["data"], ["one"], axes=[0])
        model.graph.node.insert(0, node)
        for node in model.graph.node[1:]:
            node.input[:] = ["one" if x == "data" else x for x in node.input]

    net = made.embedder(128)
    _, path = convert(edit(net, add), "--like=sface")
    crops = np.random.default_rng(1).integers(0, 256, (3, 112, 112, 3), np.uint8)
    embedder = nets.Embedder(cards.read(path))
    assert not embedder.takes_many
    np.testing.assert_allclose(embedder(crops), nets.Embedder(cards.read(path), net)(crops), 1e-5)


def edit(content, change):
    """Returns a net after `change`, a function that changes its onnx.ModelProto."""
    model = onnx.load_model_from_string(content)
    change(model)
    return model.SerializeToString()


def move_weights(model):
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="/etc/passwd")


def enlarge(model):
    for dim in model.graph.input[0].type.tensor_type.shape.dim[-2:]:
        dim.dim_value = 8224


def make_nan(model):
    weights = model.graph.initializer[0]
    array = np.full_like(numpy_helper.to_array(weights), np.nan)
    weights.CopyFrom(numpy_helper.from_array(array, weights.name))


def shrink(model):
    for weights, factor in zip(model.graph.initializer, (1e-38, 1e38), strict=True):
        array = numpy_helper.to_array(weights) * np.float32(factor)
        weights.CopyFrom(numpy_helper.from_array(array, weights.name))


def grow(model):
    """Makes a net that needs 64 GB from a short file."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 34], np.int64), "huge"))
    model.graph.node.insert(0, make_node("ConstantOfShape", ["huge"], ["zeros"]))
    model.graph.node.insert(1, make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0))
    model.graph.node.insert(2, make_node("Add", ["data", "sum"], ["data2"]))
    for node in model.graph.node[3:]:
        node.input[:] = ["data2" if x == "data" else x for x in node.input]


VECTORS, BODY = made.embedder(), onnx.helper.make_graph([], "body", [], [])
SPARSE = make_node("Constant", [], ["y"], sparse_value=onnx.SparseTensorProto())
BRANCH = make_node("If", ["data"], ["y"], then_branch=BODY, else_branch=BODY)
OTHER = onnx.NodeProto(domain="com.example")
FUNCTION = onnx.FunctionProto(name="f", domain="com.example")
OLD, NEWER = onnx.NodeProto(op_type="Old"), onnx.ModelProto(ir_version=99)
# How nets are often exported. The vectors are those of the plain net.
FORMS = {
    "weights in a second file": ("arcface", "", {}),
    "a vector and its norm": ("sface", "norm", {}),
    "[N, 112, 112, 3]": ("arcface", "nhwc", {}),
    "[N, 112, 112, 3], 0 to 255": ("arcface", "nhwc", {"normalises": True}),
    "[N, 112, 112, 3] of 8 bits": ("arcface", "nhwc uint8", {"normalises": True}),
    "[1, 3, 112, 112] of 8 bits": ("sface", "uint8", {"batch": 1}),
    "[N, D, 1, 1]": ("arcface", "axes", {}),
    "[1, D, 1, 1] of 16 bits": ("arcface", "axes", {"batch": 1, "half": True}),
    "bgr": ("arcface", "bgr", {}),
}


def split_weights(content, *paths):
    """Returns a net whose weights of 32 bits are moved in turn into the files `paths`."""
    model = onnx.load_model_from_string(content)
    big = [x for x in model.graph.initializer if x.data_type == onnx.TensorProto.FLOAT]
    for weights, path in zip(big, itertools.cycle(paths), strict=False):
        with path.open("ab") as file:
            place = path.name, file.tell(), len(weights.raw_data)
            external_data_helper.set_external_data(weights, *place)
            file.write(weights.raw_data)
        weights.ClearField("raw_data")
    return model.SerializeToString()


@pytest.mark.parametrize("case", FORMS)
def test_usual_exports_of_a_net_compute_the_vectors_of_the_plain_net(convert, case, tmp_path):
    family, form, options = FORMS[case]
    flags = [f"--like={family}", *["--colour=bgr"] * (form == "bgr")]
    crops = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    plain = convert(made.embedder(**options), f"--like={family}", name="plain.onnx")[1]
    wanted = nets.Embedder(cards.read(plain))(crops)
    shutil.rmtree(plain.parent)
    content = made.embedder(form=form, **options)
    content = content if form else split_weights(content, tmp_path / "weights.bin")
    for is_measured in (False, True):
        _, path = convert(content, *flags)
        card = cards.load(path.parent)["face_embedder"]
        assert card.back_end and card.back_end.is_measured == is_measured
        vectors = nets.Embedder(card)(crops)
        np.testing.assert_allclose(vectors, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        # The numbers of a measured card stay.
        cards.replace_back_end(card, msgspec.structs.replace(card.back_end, data="measured"))
    assert [x.name for x in sorted(path.parent.iterdir())] == ["net.json", "net.onnx"]
    assert b"weights.bin" not in path.with_suffix(".onnx").read_bytes()


def test_weights_in_other_files_are_refused_with_the_command_that_joins_them(convert, tmp_path):
    """The command works if the files are there."""
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    done = convert(split_weights(VECTORS, first, second), "--like=arcface")[0]
    assert done.refused("a.bin, b.bin", "joined.onnx")
    _, *words = shlex.split(done.err[done.err.index("python -c ") :])
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    joined = (tmp_path / "joined.onnx").read_bytes()
    assert convert(joined, "--like=arcface")[0].code == 0
    first.unlink()
    net = split_weights(VECTORS, first)
    first.write_bytes(first.read_bytes()[:-4])
    assert convert(net, "--like=arcface")[0].refused("net.onnx", "cannot be used")
    first.unlink()
    assert convert(net, "--like=arcface")[0].refused("a.bin", "copy it next to the net")


# Words of the error, the family, and the net.
@pytest.mark.parametrize(("words", "family", "content"), [
    ("complete download", "arcface", VECTORS[:-9]),
    ("/etc/passwd next join", "arcface", edit(VECTORS, move_weights)),
    ("com.example standard", "arcface", edit(VECTORS, lambda x: x.graph.node[0].MergeFrom(OTHER))),
    ("control flow If", "arcface", edit(VECTORS, lambda x: x.graph.node.insert(0, BRANCH))),
    ("sparse weights standard", "arcface", edit(VECTORS, lambda x: x.graph.node.insert(0, SPARSE))),
    ("functions standard", "arcface", edit(VECTORS, lambda x: x.functions.append(FUNCTION))),
    ("8192 8224 supported", "arcface", edit(VECTORS, enlarge)),
    ("arcface other [free, 512] supported", "arcface", made.embedder(form="twice")),
    ("used: the last output of the net has fewer than 4 numbers", "arcface", made.embedder(3)),
    ("used: No Op registered", "arcface", edit(VECTORS, lambda x: x.graph.node[0].MergeFrom(OLD))),
    ("used: Unsupported model IR", "arcface", edit(VECTORS, lambda x: x.MergeFrom(NEWER))),
    ("same output", "arcface", edit(VECTORS, make_nan)),
    ("[2, 3, 112, 112] supported", "arcface", made.embedder(batch=2)),
    ("points kps", "scrfd", made.scrfd(points=False)),
    ("points kps", "scrfd", made.scrfd((8, 16, 32, 64, 128), 1, points=False)),
    ("scrfd [6400, 1] supported", "scrfd", made.scrfd(anchors=1)),
    ("32", "scrfd", made.scrfd(sides=(600, 600))),
    ("yunet [1, 6400, 1] supported", "yunet", made.yunet(("H", "W"), ("cls", "bbox", "kps"))),
])  # fmt: skip
def test_damaged_unsafe_and_other_nets_are_refused(tmp_path, words, family, content):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    given = {
        "path": str(path), "name": path.name, "kind": "own", "like": family, "side": None,
        "colour": None, "mean": [], "std": [], "weights": "", "out": str(tmp_path / "out.onnx"),
    }  # fmt: skip
    refused(partial(net_families.work, given), *words.split())


# Weights below the smallest normal number count as zero, because they make some processors slow.
@pytest.mark.parametrize(("change", "words"), [
    (shrink, ["same output"]), (grow, ["used: Failed to allocate memory", "use another net"]),
])  # fmt: skip
def test_net_that_is_slow_or_needs_much_memory_is_refused_in_a_child_process(
    command, tmp_path, change, words
):
    (tmp_path / "net.onnx").write_bytes(edit(VECTORS, change))
    given = ("convert", "own", tmp_path / "net.onnx", "--like=arcface", f"--out={tmp_path}/models")
    done = command(*given)
    assert done.refused(*words) and not (tmp_path / "models").exists()
    assert ".cc" not in done.err and "onnxruntime::" not in done.err  # the place in its source


def test_flags_of_convert_that_do_not_fit_are_refused(convert):
    assert convert(VECTORS)[0].refused("--like", "example")
    assert convert(VECTORS, "--like=arcface", "--size=160")[0].refused("160", "112")
    assert convert(made.scrfd(), "--like=scrfd", "--size=640")[0].refused("--size")
    assert convert(VECTORS, "--like=arcface", kind="insightface")[0].refused("--like")
    done, path = convert(made.embedder(64, side="S", at_side=160), "--like=arcface", "--size=160")
    assert done.code == 0, done.err
    card = cards.read(path)
    assert card.input.size == (160, 160)
    np.testing.assert_allclose(np.array(card.template), np.array(POINTS) * 160 / 112, atol=0.01)
    # A folder has one net for each role.
    assert convert(VECTORS, "--like=sface", name="b.onnx")[0].refused("net.json", "--out")


@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_usual_mean_and_deviation_of_colours_are_those_of_the_card(convert, colour):
    """For example ImageNet's numbers, for which PyTorch's nets are trained."""
    imagenet = ("--mean=.485,.456,.406", "--std=.229,.224,.225")
    _, path = convert(VECTORS, "--like=arcface", f"--colour={colour}", *imagenet)
    given = cards.read(path).input
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    wanted = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = nets.prepare_images(images, given).transpose(0, 2, 3, 1)
    found = found[..., ::-1] if colour == "bgr" else found
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert convert(VECTORS, "--like=arcface", "--mean=.5")[0].refused("--mean and --std", "both")
    for wrong in ("--mean=123.7,116.3,103.5", "--mean=a", "--mean=.5,.5", "--mean=.5,a"):
        assert convert(VECTORS, "--like=arcface", wrong, "--std=.5")[0].refused("--mean", "0 to 1")
    assert convert(VECTORS, "--like=arcface", "--mean=.5", "--std=0")[0].refused("above 0")
    assert convert(VECTORS, *imagenet, kind="insightface")[0].refused("--mean")


def test_zips_that_cannot_be_read_are_to_be_unpacked(command, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        archive.writestr("net.onnx", b"")
        archive.filelist *= 20_000
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("net.onnx", VECTORS)
    content = bytearray((tmp_path / "locked.zip").read_bytes())
    content[6] = content[content.rindex(b"PK\1\2") + 8] = 1  # the flags of an encrypted entry
    (tmp_path / "locked.zip").write_bytes(content)
    for name, words in (("many.zip", "pack fewer files"), ("locked.zip", "has a password")):
        done = command("convert", "insightface", tmp_path / name, f"--out={tmp_path / 'models'}")
        assert done.refused(name, words, "unpack"), done.err


def test_only_nets_and_unmeasured_cards_of_vidjax_are_replaced(convert):
    path = convert(VECTORS, "--like=arcface")[1]
    net, card, other = path.with_suffix(".onnx"), path.read_bytes(), made.embedder(64)
    net.unlink()
    assert convert(VECTORS, "--like=arcface")[0].code == 0  # it was missing
    for content in (other, VECTORS):  # the card in the folder is the card of the replaced net
        with pytest.warns(VidjaxWarning, match="differed, and was replaced"):
            assert convert(content, "--like=arcface")[0].code == 0
    assert convert(VECTORS, "--like=sface")[0].refused("another kind", "delete net.json")
    assert path.read_bytes() == card
    for place, content in ((net, b"mine"), (path, b"{}"), (path, b"\xff"), (path, b"")):
        before = place.read_bytes()
        place.write_bytes(content)
        assert convert(other, "--like=arcface")[0].refused(str(place), "move it away", "--out")
        assert place.read_bytes() == content
        place.write_bytes(before)
    path.unlink()  # without its card, nobody knows who wrote the net
    assert convert(other, "--like=arcface")[0].refused(str(net))
    assert convert(VECTORS, "--like=arcface")[0].code == 0  # the same net
    written = cards.read(path)
    assert written.back_end
    cards.replace_back_end(written, written.back_end)  # as measure-card does
    assert convert(VECTORS, "--like=arcface")[0].code == 0
    assert convert(other, "--like=arcface")[0].refused("measured card", "name another --out")


def test_net_without_a_card_is_answered_with_the_command_that_writes_it(
    command, tmp_path, read_here
):
    net, film, models = tmp_path / "my net.onnx", tmp_path / "film.mp4", f"--models={tmp_path}"
    net.write_bytes(VECTORS)
    film.write_bytes(b"x")
    for words in (("gallery", "create", tmp_path / "g"), ("extract", film, f"--out={tmp_path}/o")):
        assert command(*words, models).refused(f"vidjax convert own '{net}' --like=")
    shutil.copy(net, tmp_path / "more.onnx")
    refused(lambda: cards.require({}, "face_detector", tmp_path), "convert insightface", "scrfd")
    refused(lambda: cards.require({}, "voice_embedder", tmp_path), "convert resemblyzer")
    (tmp_path / "more.onnx").unlink()
    done = command("convert", "own", net, "--like=arcface", f"--out={tmp_path}")
    assert done.code == 0, done.err
    assert net.exists() and cards.load(tmp_path)["face_embedder"].file == "my_net.onnx"


def test_check_describes_each_net_of_a_folder(convert, command, tmp_path):
    path = convert(VECTORS, "--like=arcface")[1]
    made_nets.write(path.parent, "speech", "voice_activity")
    made_nets.write(path.parent, "voice", "voice_embedder", back_end=made_nets.back_end())
    made_nets.write(path.parent, "find", "face_detector")
    code, out, _ = command("check", f"--models={path.parent}")
    assert code == 0
    for words in (
        "net.json: face_embedder", "test passed", "ms of CPU time per face", "not measured",
        "per frame of 640 x 640", "per 32 ms of sound", "measured on 10 and 10 pairs: made",
    ):  # fmt: skip
        assert words in out
    net, start = nets.Net(cards.read(path)), time.thread_time()
    assert 0 < net_checks.measure_milliseconds(net) < 1000 * (time.thread_time() - start) / 5
    (path.parent / "extra.onnx").write_bytes(VECTORS)
    with pytest.warns(UserWarning, match="vidjax convert own"):
        assert command("check", f"--models={path.parent}").code == 0
    (path.parent / "extra.onnx").unlink()
    path.write_text(path.read_text().replace('"rgb"', '"bgr"'))
    code, out, _ = command("check", f"--models={path.parent}")
    assert code == 2 and "FAULT  net.json" in out and "ok     voice.json" in out


def test_net_with_a_wrong_test_stops_who_with_its_own_message(convert, command, tmp_path):
    path = convert(made.embedder(), "--like=arcface")[1]
    made_nets.write(path.parent, "find", "face_detector")
    card = json.loads(path.read_text())
    card["input"]["mean"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(card))
    for name in ("people/Ada.png", "film.png"):
        drawn_people.write_photo(tmp_path / name)
    words = f"--people={tmp_path}/people", f"--models={path.parent}", f"--out={tmp_path}/out"
    done = command("who", tmp_path / "film.png", *words)
    assert done.refused("net.json", "differs from the test output", "convert")
    assert "photo" not in done.err.replace("photo ...", "")
