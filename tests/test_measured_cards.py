"""Cards of nets are measured on photos or vectors, and compared with the enrolled people."""

import json
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import drawn_people, family_nets, films, made_nets, made_shelf
from tests.helpers.clip_files import write_npz
from tests.helpers.embeddings import CARD, DIFFERENT, SAME, WIDTH, Population
from tests.helpers.seen import refused
from vidjax.apps import cards
from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import log, measured_cards
from vidjax.apps.video.decide import Rule, decide
from vidjax.models import card_backend, card_check, card_measure

SHIPPED = card_backend.from_cosines(CARD.same, CARD.different)  # of dlib's net


@pytest.mark.parametrize(("people", "count"), [(3, 3), (5, 2), (12, 3)])
def test_people_half_as_far_apart_contradict_the_card_and_other_people_do_not(people, count):
    made, counts = Population(0, SHIPPED), np.full(people, count)

    def measure(scale):
        """Returns problem -> share of 300 draws; `scale` multiplies the distances of people."""
        found: Any = Counter()
        for _ in range(300):
            drawn = made.mean + scale * (made.people(people) - made.mean)
            means = made.photos(drawn, count).mean(1)
            square = np.vecdot(means, means)
            found[card_check.compare(SHIPPED, means.sum(0), square, counts).problem] += 1 / 300
        return found

    right, half = measure(1), measure(0.5)
    assert right[""] >= 0.98 and half["closer"] >= 0.93 and half["blind"] <= 0.02


def test_equal_people_have_equal_weights_and_intervals_cover_the_truth():
    made, covered, x = Population(3, SHIPPED), [], np.zeros((0, WIDTH))
    for _ in range(60):
        x = made.photos(made.people(12), 4).reshape(-1, WIDTH).astype(np.float32)
        found = card_measure.measure(x, np.repeat(np.arange(12), 4))
        for spread, truth in ((found.same, CARD.same), (found.different, CARD.different)):
            covered.append(spread.mean_interval[0] < truth[0] < spread.mean_interval[1])
    assert 0.88 <= np.mean(covered) <= 1
    # Copies of the photos of a person change nothing but the number of pairs, and people with one
    # photo are left out.
    rows = card_measure.choose_clips(np.array([7, 3, 7, 1, 3, 3]))
    assert rows.tolist() == [1, 4, 5, 0, 2]
    x, owner = x[:12], np.repeat(np.arange(3), 4)
    again = np.concatenate([np.repeat(x[:4], 20, axis=0), x[4:]])
    many = card_measure.measure(again, np.repeat(np.arange(3), (80, 4, 4)))
    cosine, inside = x @ x.T, owner[:, None] == owner
    assert many.different.mean == pytest.approx(cosine[~inside].mean(), abs=1e-6)
    values = [cosine[i, j] for i in range(12) for j in range(12) if inside[i, j] and i != j]
    once = card_measure.measure(x, owner)
    assert once.same[:2] == pytest.approx((np.mean(values), np.std(values)), abs=1e-6)
    assert once.mean == pytest.approx(x.mean(0), abs=1e-6)


def test_equal_error_rate_is_the_rate_at_which_both_errors_are_equal():
    made = Population(3, SHIPPED)
    x = made.photos(made.people(40), 2).reshape(-1, WIDTH).astype(np.float32)
    owner = np.repeat(np.arange(40), 2)
    cosine, same = x @ x.T, owner[:, None] == owner
    np.fill_diagonal(same, False)
    limits, others = np.unique(cosine), owner[:, None] != owner
    missed = np.searchsorted(np.sort(cosine[same]), limits) / same.sum()
    alarms = 1 - np.searchsorted(np.sort(cosine[others]), limits) / others.sum()
    wanted = np.maximum(missed, alarms).min()
    found = card_measure.measure(x, owner).equal_error_rate
    assert found == pytest.approx(wanted, abs=0.5 / same.sum() + 0.002)


@pytest.fixture
def models(tmp_path):
    """A folder with a net of faces, whose card has the cosines of dlib's net."""
    (tmp_path / "models").mkdir()
    back_end = made_nets.back_end(SAME, DIFFERENT, WIDTH)
    return made_nets.write(tmp_path / "models", "embed", width=WIDTH, back_end=back_end).parent


def write_features(folder, photos):
    """Writes the features of people p00, p01 and so on; `photos` are [count, D] for each."""
    for number, vectors in enumerate(photos):
        clips = {f"c{n}": {"face": x[None]} for n, x in enumerate(vectors)}
        write_npz(folder, {f"p{number:02}": clips})
    return folder


def give_default_numbers(models):
    """Changes the card of the face embedder: its numbers were not measured."""
    path = models / "embed.json"
    card = json.loads(path.read_text())
    card["back_end"]["data"] = f"{cards.NOT_MEASURED}: defaults of a family"
    path.write_text(json.dumps(card))


def test_measured_card_is_used_by_its_galleries_and_knows_no_names(tmp_path, models, command):
    wide = card_backend.from_cosines((0.9, 0.03), (0.6, 0.06))
    made = Population(1, wide)
    photos = made.photos(made.people(24), 4).astype(np.float32)
    gallery, names = Gallery.of_models(tmp_path / "g", models), {"0": "A", "1": "B"}
    gallery.enrol(enrolled := {f"{n}": {"face": photos[n, :1]} for n in (0, 1)}, names)
    given = f"--input={write_features(tmp_path / 'queries', photos[:1, 1:2]) / 'p00'}"
    before = cards.load(models)["face_embedder"]
    twice = [np.concatenate([x, x[:2]]) for x in photos]  # copies of photos are left out
    features = write_features(tmp_path / "features", twice)
    done = command("measure-card", models, f"--input={features}")
    assert done.code == 0, done.err
    assert "of a person" in done.out and "equal error rate" in done.out
    (line,) = (x for x in done.out.splitlines() if "of two people" in x and "+-" in x)
    _, _, _, mean, low, _, high, *_ = line.split()
    assert 0.55 < float(low) <= float(mean) <= float(high) < 0.65
    card, text = cards.load(models)["face_embedder"], (models / "embed.json").read_text()
    assert card.digest == before.digest and "p00" not in text and card.sha256 == before.sha256
    assert (fit := card.back_end)
    assert fit.same == pytest.approx((0.9, 0.03), abs=0.01)
    assert fit.different == pytest.approx((0.6, 0.06), abs=0.02)
    assert fit.pairs == (24 * 6, 276 * 16) and "96 clips of 24 people" in fit.data
    assert fit.mean is not None and np.linalg.norm(fit.mean) ** 2 == pytest.approx(0.6, abs=0.05)
    # Commands that read the gallery change no byte, and mention the new numbers.
    content = {path: path.read_bytes() for path in gallery.folder.iterdir()}
    for words in (("identify", given), ("verify", given, "--identity=A"), ("list",)):
        read = command("gallery", words[0], gallery.folder, *words[1:])
        assert read.code == 0 and ("has newer numbers" in read.out) == (words[0] != "list")
        assert {path: path.read_bytes() for path in gallery.folder.iterdir()} == content, words
    # The gallery says once that it has new numbers, and then answers as a new gallery.
    words = ["measure-card", models, f"--gallery={gallery.folder}"]
    assert command(*words).err.count("uses the new numbers") == 1
    assert "new numbers" not in command(*words).err
    assert "newer" not in command("gallery", "identify", gallery.folder, given).out
    assert command(*words[:2]).code == 2
    other = Gallery.of_models(tmp_path / "other", models)
    other.enrol(enrolled, names)
    query = {"q": {"face": photos[0, 1:2]}}
    assert gallery.identify(query) == other.identify(query)
    # Fewer than 20 people leave the mean as it is.
    few = write_features(tmp_path / "few", photos[:5])
    assert command("measure-card", models, f"--input={few}").code == 0
    again = cards.load(models)["face_embedder"]
    assert again.back_end and again.back_end.mean == fit.mean and again.digest == before.digest


def test_an_interrupted_call_leaves_no_temporary_features(tmp_path, models, command, monkeypatch):
    """The call is interrupted while the folder of the vectors exists."""
    given = write_features(tmp_path / "x", np.ones((1, 1, WIDTH), np.float32))
    (scratch := tmp_path / "scratch").mkdir()

    def interrupt(*_):
        assert len([*scratch.iterdir()]) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(Gallery, "of_models", interrupt)
    assert command("measure-card", models, f"--photos={given}").code == 128 + signal.SIGINT
    assert not [*scratch.iterdir()]


def test_too_few_people_and_nets_that_do_not_separate_them_are_refused(tmp_path, models, command):
    before, made = (models / "embed.json").read_bytes(), Population(1)
    photos = made.photos(made.people(6), 2).astype(np.float32)
    few = write_features(tmp_path / "few", [*photos[:4], photos[4, :1], photos[5, [0, 0]]])
    mixed = write_features(tmp_path / "mixed", photos.transpose(1, 0, 2).reshape(6, 2, -1))
    single = write_features(tmp_path / "single", photos[:, :1])
    nets = json.dumps({"models": {"face_embedder": "0" * 64}, "settings": {}})
    (write_features(other := tmp_path / "other", photos) / "p00/extract.json").write_text(nets)
    for folder, words in (
        (few, "4 people"), (single, "no person has two usable clips"), (mixed, "does not separate"),
        (other, "not from the model"),
    ):  # fmt: skip
        done = command("measure-card", models, f"--input={folder}")
        assert done.code == 2 and words in done.err, done.err
    assert (models / "embed.json").read_bytes() == before


def test_people_who_are_too_alike_and_default_numbers_are_mentioned(tmp_path, models, command):
    """The warning about alike people comes once, and they are still named."""
    made = Population(2)
    people = made.people(6)
    for name, shown, words in (
        ("alike", made.mean + 0.5 * (people - made.mean), "as much as the net expects"),
        ("others", people, "not yet tested on your photos"),
    ):
        Gallery.of_models(gallery := tmp_path / name, models)
        path = write_features(tmp_path / f"of_{name}", made.photos(shown, 3).astype(np.float32))
        done = command("gallery", "enrol", gallery, f"--input={path}")
        assert done.code == 0 and done.err.count("vidjax measure-card") == (name == "alike")
        ask = "gallery", "identify", gallery, f"--input={path / 'p00'}"
        asked = command(*ask).out
        assert words in asked and "p00" in asked and f"vidjax measure-card {models}" in asked
        give_default_numbers(models)  # for the second turn
    assert command("measure-card", models, f"--input={path}", f"--gallery={gallery}").code == 0
    assert "measure-card" not in command(*ask).out


@pytest.mark.parametrize("is_measured", [True, False])
def test_a_net_that_does_not_separate_people_names_nobody(tmp_path, models, command, is_measured):
    """The vectors are of a net with random weights: almost equal, whoever is in the picture."""
    if not is_measured:
        give_default_numbers(models)
    vectors = (1 + 0.05 * np.random.default_rng(0).normal(size=(6, 3, WIDTH))).astype(np.float32)
    for name, people, count in (("two", 2, 1), ("six", 6, 3)):
        gallery = Gallery.of_models(tmp_path / name, models)
        path = write_features(tmp_path / f"of_{name}", vectors[:people, :count])
        done = command("gallery", "enrol", tmp_path / name, f"--input={path}")
        assert done.code == 0 and "nobody gets a name" in done.err and "seems to" not in done.err
        query = {"x": {"face": vectors[0, 2:]}}
        for threshold in (None, 0.1):
            assert gallery.identify(query, threshold=threshold)["x"].identity is None
        assert gallery.rule().about == card_notes.NOBODY
        asked = command("gallery", "identify", tmp_path / name, f"--input={path / 'p00'}")
        assert "named       0" in asked.out and "nobody gets a name" in asked.out
        # Only a card that nobody has measured may have wrong facts.
        text = card_notes.describe(gallery.state)
        assert text.startswith(card_notes.NOBODY) and "if two names are one person" in text
        assert ("--like" in text and "--colour" in text and "scale" in text) == (not is_measured)


@pytest.mark.parametrize("is_measured", [True, False])
def test_a_card_that_nobody_has_measured_accepts_nobody_if_nothing_shows_that_it_fits(
    tmp_path, models, is_measured
):
    """The vectors of the third gallery are of a net that sees little: their cosines vary."""
    if not is_measured:
        give_default_numbers(models)
    made = Population(2)
    people = made.photos(made.people(7), 2).astype(np.float32)
    draws = np.random.default_rng(0).normal(size=(7, 1, 2))
    varied = np.concatenate([np.ones((7, 1, 1)), 0.3 * draws, np.zeros((7, 1, WIDTH - 3))], 2)
    for number, (vectors, why) in enumerate((
        (people[:2], card_notes.FEW), (people, None), (varied, card_notes.NOBODY)
    )):  # fmt: skip
        gallery = Gallery.of_models(tmp_path / str(number), models)
        clips = {f"c{n}": {"face": x[:1]} for n, x in enumerate(vectors)}
        gallery.enrol(clips, {clip: clip for clip in clips})
        names_somebody = is_measured or why is None
        assert (gallery.rule().about == why) == (not names_somebody), number
        pair = {"a": {"face": people[0, :1]}, "b": {"face": people[0, 1:]}}
        (match,) = gallery.compare(pair).values()
        assert match.accepted == names_somebody


def test_cards_without_new_numbers_have_the_digest_of_their_file(tmp_path):
    path = made_nets.write(tmp_path, back_end=made_nets.back_end())
    card = cards.read(path)
    assert card.back_end and card.back_end.is_measured
    cards.replace_back_end(card, card.back_end)
    assert cards.read(path).digest == card.digest
    refused(lambda: cards.read(path.with_name("face.onnx")), "face.onnx")


def test_photos_of_a_folder_measure_the_card_of_a_net(drawn, tmp_path, monkeypatch, read_here):
    """The page and the summary of `vidjax who` mention default numbers until they are measured."""
    give_default_numbers(drawn.models)
    path = drawn.models / "embed.json"
    drawn.befriend("Ada", "Bob")
    drawn.who(group := drawn.group())
    page, command = drawn.out / "names.html", f"vidjax measure-card {drawn.models}"
    assert page.read_text().count(command) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    digest = cards.read(path).digest
    drawn_people.write_portraits(tmp_path / "folder")
    drawn_people.write_photo(tmp_path / "walls/P0/wall.png")
    for photo in ("P0/0.png", "P1/x.png"):
        drawn_people.write_photo(tmp_path / "twins" / photo, ("Ada", 40, 40))
    for folder, words in (
        ("foldr", f"did you mean '{tmp_path / 'folder'}'"),
        ("twins", "x.png' is for P1, but is a copy of a photo of P0"),
        ("walls", "wall.png: the photo shows no face"),
    ):
        given = "measure-card", drawn.models, f"--photos={tmp_path / folder}"
        assert words in drawn.run(*given, code=2).output
    done = drawn.run("measure-card", drawn.models, f"--photos={tmp_path / 'folder'}")
    (measured,) = done.content["measured"]
    assert (measured["people"], measured["clips"], measured["pairs"]) == (6, 18, [18, 135])
    low, high = measured["different"]["mean_interval"]
    assert low < measured["different"]["mean"] < high and low < 0  # cosines may be negative
    assert not [*(tmp_path / "scratch").iterdir()], "features of the photos are deleted"
    assert cards.read(path).digest == digest and "P0" not in path.read_text()
    _, output = drawn.who(group)
    assert "as before" in output  # it is not read again
    assert command not in page.read_text()


def test_convert_measures_the_card_of_a_net_on_photos(drawn, tmp_path, monkeypatch, read_here):
    (tmp_path / "new").mkdir()
    made_nets.write(tmp_path / "new", "find", "face_detector")
    (tmp_path / "net.onnx").write_bytes(family_nets.embedder(width=16))
    drawn_people.write_portraits(tmp_path / "portraits", photos=2)
    words = [f"--out={tmp_path / 'new'}", f"--photos={tmp_path / 'portraits'}", "--like=arcface"]
    refused = drawn.run("convert", "own", tmp_path / "net.onnx", *words, code=2)
    assert "unclear faces" in refused.output  # of 16 pixels
    monkeypatch.setattr(measured_cards, "LEAST_CLARITY", 0)
    done = drawn.run("convert", "own", tmp_path / "net.onnx", *words)
    card = cards.read(Path(done.content["card"]))
    assert card.back_end and card.back_end.is_measured and card.back_end.pairs == (6, 60)
    assert done.content["measured"][0]["people"] == 6
    text = card.path.read_text()
    again = drawn.run("convert", "own", tmp_path / "net.onnx", words[0], words[2])
    assert card.path.read_text() == text and "replaced" not in again.output


def test_a_net_of_random_weights_names_nobody_with_one_photo_each(drawn, read_here):
    """Its vectors of two people differ as the card says, but so do vectors of mirrored photos."""
    rng, side = np.random.default_rng(0), drawn_people.SIDE
    weights = rng.normal(size=(64, 3, made_nets.WIDTH)).astype(np.float32)
    weights = (weights - 0.9 * weights.mean(0)).reshape(192, -1)
    made_nets.write(
        drawn.models, "embed", content=made_nets.embedder(weights=weights),
        back_end=made_nets.back_end(different=(0.1, 0.4)), input={"mean": [150.0] * 3},
    )  # fmt: skip
    photos = []
    for name in ("Ada", "Bob"):
        rgb = drawn_people.picture([(name, 40, 40)])
        shade = np.kron(rng.normal(size=(4, 4)), np.ones((side // 4, side // 4)))[..., None]
        face = rgb[40 : 40 + side, 40 : 40 + side]
        face[:] = np.clip(0.85 * face + 15 * (shade - shade[:, ::-1]), 0, 255)
        (drawn.friends / name).mkdir(parents=True)
        (drawn.friends / name / "1.png").write_bytes(films.photo(rgb, "png"))
        photos.append(drawn.folder / f"{name}.png")
        drawn_people.write_photo(photos[-1], (name, 20, 30))
    done, page = drawn.who(*photos), drawn.out / "names.html"
    assert not {"Ada", "Bob"} & {*drawn.names().values()}
    assert done.output.count("nobody gets a name") == 1, done.output
    assert page.read_text().count("nobody gets a name") == 1
    drawn.friends.rename(drawn.folder / "away")  # as if a drive is not connected
    for people, code in ((False, 0), (True, 1)):
        again = drawn.who(*photos, people=people, code=code, flags=["--quiet"])
        assert again.output.count("nobody gets a name") == 1 and again.content["named"] == 0


ARCFACE = made_nets.back_end((0.68, 0.12), (0.2, 0.12))  # the default numbers of a family
GROUP = drawn_people.GROUP
MIRROR = [GROUP[0], ("Ada", 70, 40)]
# The net, whether its card was measured, the faces in each photo, and whether Ada, who is enrolled
# without or with Bob, is named. By the net "alike", the cosines of two drawn faces are 0.8. By the
# net "far", they are -0.3, which is too low for its card.
ALONE = {
    "fits": ("fits", False, [GROUP], True),
    "does not fit": ("alike", False, [GROUP], False),
    "sees only colours": ("far", False, [GROUP], False),
    "twice in a mirror": ("fits", False, [GROUP, MIRROR], True),
    "only in a mirror": ("fits", False, [MIRROR], False),
    "known net in a mirror": ("fits", True, [MIRROR], True),
}


@pytest.mark.parametrize("case", ALONE)
def test_one_or_two_people_are_named_only_if_something_shows_that_the_net_fits(
    drawn, case, read_here
):
    net, is_measured, shown, is_named = ALONE[case]
    if net != "fits":
        given: Any = drawn_people.EMBED | ({"input": {}} if net == "alike" else {})
        made_nets.write(drawn.models, "embed", back_end=ARCFACE, **given)
    if not is_measured:
        give_default_numbers(drawn.models)
    photos = [drawn.folder / f"{number}.png" for number in range(len(shown))]
    for path, faces in zip(photos, shown, strict=True):
        drawn_people.write_photo(path, *faces)
    drawn.befriend("Ada")
    output = drawn.who(*photos).output
    why = card_notes.NOBODY if net == "far" else card_notes.FEW
    page = (drawn.out / "names.html").read_text()
    assert ("Ada" in drawn.names().values()) == is_named, output
    assert output.count(why) == page.count(why) == (not is_named)
    assert "Bob" not in drawn.names().values()
    first = made_shelf.decide(drawn.out)
    again = decide(first.faces, log.read(drawn.out), Rule(), first)  # with what is known
    assert again.appearances == first.appearances and again.votes == first.votes
    assert [x.identity for x in first.appearances] == [row["identity"] for row in drawn.rows()]
    # A gallery decides in the same way.
    gallery = drawn.folder / "gallery"
    Gallery.of_models(gallery, drawn.models)
    drawn.run("gallery", "enrol", gallery, f"--photos={drawn.friends}")
    done = drawn.run("gallery", "identify", gallery, f"--input={drawn.out / 'features'}")
    assert (done.content["named"] > 0) == is_named
    if case in ("fits", "sees only colours"):
        drawn.befriend("Bob")
        assert drawn.who(*photos).output.count(why) == (not is_named)
        named = {name for faces in shown for name, _, _ in faces if is_named}
        assert {"Ada", "Bob"} & {*drawn.names().values()} == named
