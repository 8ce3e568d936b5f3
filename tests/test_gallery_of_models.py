"""Galleries of nets with cards, without a run: friends, strangers, groups and times."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy

import vidjax
from tests.benchmarks import decision
from tests.helpers import docs, made_nets
from tests.helpers.clip_files import write_npz
from tests.helpers.embeddings import DIFFERENT, SAME, WIDTH, Population, unit
from tests.helpers.made_appearances import appearance, film
from tests.helpers.seen import refused
from vidjax.apps import cards
from vidjax.apps.gallery import audit, backend, card_notes, grouping
from vidjax.apps.gallery.answers import Answer, join_answers, read_groups, write_groups
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.index import Index
from vidjax.apps.video import naming, subtitles
from vidjax.models import card_backend
from vidjax.utils.errors import VidjaxWarning

PAGE = "vidjax/apps/gallery/README.md"
VOICE, OTHER_VOICE = np.eye(made_nets.WIDTH, dtype=np.float32)[:2, None]
CARD = made_nets.back_end(SAME, DIFFERENT, WIDTH)
BACKEND = backend.make_card_backend({"face": cards.BackEnd(**CARD)})


def draw(seed, *, people, clips):
    """Draws unit vectors [people, clips, 128] whose cosines agree with the card."""
    made = Population(seed)
    return made.photos(made.people(people), clips).astype(np.float32)


def log_probabilities(photos, clips):
    """Returns log probabilities [Q, 1 + N] that clips [Q, D] show a stranger or one of N people.

    `photos` [N, k, D] are the enrolled photos of the people.
    """
    people, count = photos.shape[:2]
    names, owner = [f"{n:05}" for n in range(people)], np.repeat(np.arange(people), count)
    enrolled = BACKEND.enrol(names, photos.reshape(-1, WIDTH).astype(np.float32), owner)
    return np.array(list(Index(BACKEND, [enrolled]).search([clips.astype(np.float32)])))


@pytest.fixture
def models(tmp_path):
    """A folder with a net of faces, whose card has the cosines of dlib."""
    (tmp_path / "models").mkdir()
    return made_nets.write(tmp_path / "models", "embed", width=WIDTH, back_end=CARD).parent


@pytest.fixture
def gallery(tmp_path, models):
    return Gallery.of_models(tmp_path / "g", models)


def adopt(gallery, models, **options):
    with gallery.change() as draft:
        return card_notes.adopt(draft, models, **options)


def faces(name, vectors):
    """Returns clips of one face each: NAME0, NAME1 and so on."""
    return {f"{name}{n}": {"face": x[None]} for n, x in enumerate(vectors)}


ABSENT = (
    "jax", "tensorflow", "tensorflow_datasets", "flax", "optax", "orbax", "pyarrow", "scipy",
    "ml_collections", "absl", "sklearn", "matplotlib",
)  # fmt: skip
USE_GALLERY = """
import multiprocessing, sys
sys.modules |= dict.fromkeys(sys.argv[1:])  # an import of these packages fails

import numpy as np
from vidjax import Gallery
from vidjax.apps.serve import app
from vidjax.cli.program import main

clips = {n: dict(np.load(f"in/{n}.npz")) for n in "012"}
gallery = Gallery("g")
assert [x.identity for x in gallery.identify(clips).values()] == [*gallery]
assert gallery.identify(clips, fpir=0.25) and gallery.threshold(0.25).score < 0
child = multiprocessing.get_context("fork").Process(target=gallery.identify, args=(clips,))
child.start()  # threads that computed the answers above do not exist in this child
child.join(60)
child.kill()
assert child.exitcode == 0
assert gallery.enrol({"new": clips["0"]}, "0").enrolled == 1
assert gallery.relabel("new", "1") == "0" and gallery.remove(clip="new") == 1
for words in (
    "list g", "identify g --input=in --threshold=0.5 --out=a.csv", "identify g --input=in",
    "threshold g --fpir=0.3", "verify g --identity=0 --input=in", "verify g --input=in",
    "enrol g --input=in/0.npz --identity=Ada",
):
    assert main(["gallery", *words.split()]) == 0, words
"""


@pytest.mark.slow
def test_gallery_of_models_works_without_jax_and_scipy(tmp_path, gallery, models, python):
    """USE_GALLERY cannot import packages of ABSENT. The net is not needed after enrolment."""
    friends = draw(1, people=3, clips=3)
    write_npz(tmp_path, {"in": faces("", friends[:, 2])})
    for number, vectors in enumerate(friends):
        gallery.enrol(faces(f"{number}/", vectors[:2]), str(number))
    gallery.enrol(faces("s", draw(2, people=4, clips=1)[:, 0]), strangers=True)  # for fpir
    (models / "embed.onnx").unlink()
    python(USE_GALLERY, *ABSENT, cwd=tmp_path)
    assert Gallery(gallery.folder).identities["Ada"] == 1  # the last command


def test_values_of_frames_in_a_dict_are_read_as_from_a_file(tmp_path, gallery):
    """The better of two faces in a clip decides its name, if the clip has qualities."""
    ada, bob = np.eye(2, WIDTH, dtype=np.float32)
    gallery.enrol({"a": {"face": ada[None]}}, "Ada")
    gallery.enrol({"b": {"face": bob[None]}}, "Bob")
    both, quality = np.stack([ada, bob]), np.array([0.01, 1.0], np.float32)
    clip = {"face": both, "face_quality": quality, "face_number": [0, 1]}
    np.savez(tmp_path / "x.npz", **clip)
    of_file = gallery.identify(gallery.load(tmp_path / "x.npz"))
    given = {"features": both, "quality": quality}
    for form in (clip, {"face_quality": quality, "face": both}, {"face": given},
                 {"face": {"features": both}, "face_quality": quality}):  # fmt: skip
        assert gallery.identify({"x": form}) == of_file
        assert gallery.rank({"x": form}) == gallery.rank(gallery.load(tmp_path / "x.npz"))
    assert of_file["x"].identity == "Bob"
    for weights, wanted in ((quality, (0.01 * ada + bob) / 1.01), (0 * quality, (ada + bob) / 2)):
        found = gallery.embed({"x": {"face": both, "face_quality": weights}}).parts["face"]
        np.testing.assert_allclose(found, [wanted], rtol=1e-6)
    for wrong, words in (
        ({"face": both, "face_qualty": quality}, "'face_qualty' is probably misspelt"),
        ({"face": both, "quality": quality}, "for example to 'face_quality'"),
        ({"face": given, "face_quality": quality}, "clip x: 'face_quality' is also a key of"),
        ({"face": both, "face_quality": quality[:1]}, "clip x, face: quality has shape"),
    ):
        for call in (gallery.identify, gallery.embed, gallery.rank, gallery.group):
            refused(lambda call=call, wrong=wrong: call({"x": wrong}), words)


@pytest.mark.parametrize("factor", [1e-30, 1e-41, 1e30])
def test_scaled_vectors_get_the_answers_of_the_vectors(tmp_path, gallery, factor):
    rng = np.random.default_rng(3)
    people, strangers = unit(rng.normal(size=(2, 6, WIDTH))).astype(np.float32)
    photos = unit(people + 0.02 * rng.normal(size=people.shape)).astype(np.float32)
    gallery.enrol(faces("photo", photos), {f"photo{n}": f"person {n}" for n in range(6)})
    # Denormal numbers have few digits, so that the expected answers are of the rounded vectors.
    small = np.float32(factor) * np.concatenate([people, strangers])
    plain = (small.astype(np.float64) / factor).astype(np.float32)
    wanted, answers = (gallery.identify(faces("x", x)) for x in (plain, small))
    assert {answer.identity for answer in wanted.values()} == {None, *gallery.identities}
    for name, answer in wanted.items():
        best = [(person, pytest.approx(p, abs=1e-5)) for person, p in answer.best]
        assert list(answers[name].best) == best and answers[name].identity == answer.identity
    gallery.enrol({"small": {"face": small[:1]}}, "Small")  # does not resemble other small vectors
    assert gallery.identify(faces("x", small[6:7]))["x0"].identity is None


def test_lines_of_the_page_give_the_vectors_of_a_gallery(tmp_path, gallery, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gallery.folder.rename("people")
    ada, other = draw(5, people=2, clips=2)
    gallery = Gallery("people")
    gallery.enrol(faces("a", ada), "Ada")
    gallery.enrol(faces("s", other), strangers=True)
    exec(docs.snippet(PAGE, "arrays"), own := {"vidjax": vidjax, "np": np})  # noqa: S102
    assert own["people"] == {"a0": "Ada", "a1": "Ada", "s0": None, "s1": None}
    clips = faces("a", ada) | faces("s", other)
    embedded = gallery.embed({name: clips[name] for name in own["people"]})
    assert np.array_equal(own["faces"], embedded.parts["face"]) and not own["others"]
    np.testing.assert_allclose(np.linalg.norm(own["faces"], axis=1), 1, rtol=1e-6)


def test_clips_whose_vectors_are_rounding_errors_are_unknown_and_reported(tmp_path, gallery):
    x = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    gallery.enrol({"a": {"face": np.eye(1, WIDTH, dtype=np.float32)}}, "Ada")
    quality = np.array([0.3, 0.3, 0.6])
    clips = {
        "zeros": {"face": np.zeros((2, WIDTH))},
        "tiny": {"face": np.full((2, WIDTH), 1e-60)},
        "opposite": {"face": np.stack([x[0], x[1], -(x[0] + x[1]) / 2]), "face_quality": quality},
    }
    for name, clip in clips.items():
        with pytest.warns(VidjaxWarning, match=f"face: 1 clip, such as {name}, have a vector"):
            assert gallery.identify({name: clip})[name].identity is None
    centred = backend.Part("face", np.ones(WIDTH), distances=BACKEND.parts[0].distances)
    other = Gallery.of_clips(tmp_path / "x", gallery.origin, BACKEND._replace(parts=(centred,)), {})
    with pytest.warns(VidjaxWarning, match="face: 1 clip, such as x0, have a vector"):
        refused(lambda: other.enrol(faces("x", x[:1] * 1e-9), "Ada"), "has a usable frame")


def test_added_nets_complete_clips_and_replaced_nets_remove_them(tmp_path, gallery, models):
    """A gallery of faces becomes a gallery of faces and voices (audio), and gets other faces."""
    ada, bob = draw(4, people=2, clips=3)
    people = {"ada 1": "Ada", "bob 1": "Bob"}
    gallery.enrol({"ada 1": {"face": ada[:1]}, "bob 1": {"face": bob[:1]}}, people)
    asked = {"query": {"face": ada[1:2]}}
    before = gallery.identify(asked)["query"]
    made_nets.write(models, "voice", "voice_embedder", back_end=made_nets.back_end())
    enrolling, asking = Gallery(gallery.folder), Gallery(gallery.folder)  # other processes
    adopt(gallery, models)
    assert {*gallery.backend.widths} == {"audio", "face"}
    # `enrol` reads the gallery with voices, in which the clip is already enrolled.
    assert enrolling.enrol({"ada 1": {"face": ada[:1]}}, "Ada").unchanged == 1
    assert asking.identify(asking.embed(asked))["query"].identity == "Ada"
    after = Gallery(gallery.folder).identify(asked)["query"]
    assert after.identity == "Ada" and after.score == pytest.approx(before.score, rel=1e-5)
    voiced = {"ada 1": {"face": ada[:1], "audio": VOICE}}
    refused(lambda: gallery.enrol(voiced, "Bob"), "already enrolled as 'Ada', not 'Bob'")
    refused(lambda: gallery.enrol({"bob 1": {"face": ada[:1]}}, "Bob"), "with another vector")
    assert gallery.enrol(voiced, "Ada").enrolled == 1
    refused(lambda: gallery.enrol({"ada 1": {"face": ada[:1]}}, "Ada"), "with another vector")
    assert gallery.clips["ada 1"].vector[WIDTH:].tolist() == VOICE[0].tolist()
    (new := tmp_path / "new").mkdir()
    made_nets.write(new, "embed", width=7, back_end=made_nets.back_end(width=7))
    made_nets.write(new, "voice", "voice_embedder", back_end=made_nets.back_end())
    refused(lambda: adopt(gallery, new), "other nets for face", "--out=DIR")
    refused(lambda: Gallery(gallery.folder, run=tmp_path), "made from nets", "--run")
    version = gallery.version
    adopt(gallery, models)
    assert gallery.version == version, "nothing is new"
    assert gallery.identify({"q": {"audio": VOICE}})["q"].identity == "Ada"


def test_lines_of_the_page_enrol_people_in_a_gallery_of_another_net(tmp_path, monkeypatch):
    """The new features lack a clip of Ada. They have clips of a stranger."""
    monkeypatch.chdir(tmp_path)
    (ada, bob, eve), turned = draw(5, people=3, clips=4), np.roll(np.eye(WIDTH), 1, axis=0)
    for name, note in (("people", "a net"), ("better", "another net")):
        (tmp_path / f"of {name}").mkdir()
        made_nets.write(tmp_path / f"of {name}", "embed", width=WIDTH, back_end=CARD, notes=note)
        Gallery.of_models(name, tmp_path / f"of {name}")
    clips = faces("ada", ada) | faces("bob", bob) | faces("eve", eve)
    old, owners = Gallery("people"), {"ada": "Ada", "bob": "Bob"}
    old.enrol(clips, {x: owners[x[:3]] for x in clips if x[:3] in owners})
    del clips["ada3"]
    write_npz(
        tmp_path, {"new_features": {x: {"face": y["face"] @ turned} for x, y in clips.items()}}
    )
    own = {"vidjax": vidjax, "__name__": "page"}
    with pytest.warns(VidjaxWarning, match="no clip is called 'ada3'"):
        exec(docs.snippet(PAGE, "new net"), own)  # noqa: S102
    better = Gallery("better")
    assert better.people == {"Ada": ("ada0", "ada1", "ada2"), "Bob": old.people["Bob"]}
    assert better.identify({"q": {"face": ada[3:] @ turned}})["q"].identity == "Ada"


def test_unknown_people_are_grouped_and_enrolled_after_naming(tmp_path, gallery, say):
    ada, bob = draw(2, people=2, clips=5)
    gallery.enrol({"photo": {"face": ada[:2]}}, "Ada")
    clips = {**faces("ada", ada), **faces("bob", bob), "empty": {"face": ada[:0]}}
    write_npz(tmp_path, {"features": clips})
    (tmp_path / "features" / "videos").mkdir()  # not from `vidjax extract`
    (tmp_path / "features" / "videos" / "party.json").write_text('{"title": "party"}')
    words, groups = (gallery.folder, f"--input={tmp_path / 'features'}"), tmp_path / "groups.tsv"
    output = say("gallery", "group", *words, f"--out={groups}")
    assert "\n  unknown     1 person in 5 clips" in output
    counts = say("gallery", "group", *words, f"--out={tmp_path / 'again.tsv'}", "--json")
    assert (counts["clips"], counts["people"], counts["unknown"]) == (11, 1, 5)  # one clip is empty
    assert read_groups(groups, unknown=True) == {f"bob{n}": "unknown 1" for n in range(5)}  # no Ada
    groups.write_text(groups.read_text().replace("unknown 1", "Bob"))
    say("gallery", "enrol", *words, f"--labels={groups}")
    assert Gallery(gallery.folder).identities == {"Ada": 1, "Bob": 5}


def answer(identity, probability=0.9):
    return Answer(identity, probability, np.log(probability), ())


def test_tracks_of_one_person_are_joined_over_short_gaps():
    """A gap of 1.5 s is short, and a gap of 2.5 s is not. The lower of two probabilities counts."""
    tracks = film(ada_1=(0, 3), ada_2=(4.5, 6), ada_3=(8.5, 9), nobody=(1, 2))
    answers = {"ada_1": answer("Ada", 0.8), "ada_2": answer("Ada"), "ada_3": answer("Ada")}
    answers["nobody"] = answer(None)
    found = naming.find_appearances(answers, [tracks], {"nobody": "unknown 1"})
    assert [(x.identity, x.start_s, x.end_s, x.probability, x.clips) for x in found] == [
        ("Ada", 0, 6, 0.8, ("ada_1", "ada_2")),
        ("unknown 1", 1, 2, None, ("nobody",)),
        ("Ada", 8.5, 9, 0.9, ("ada_3",)),
    ]


def test_tables_and_rttm_files_have_exact_times_and_safe_names(tmp_path):
    # In a .tsv file, the ' prevents a formula.
    texts = {
        "a.tsv": "\t0.333\t0.667\t'=cmd()\t0.3333\t",
        "a.jsonl": '"start": 0.333, "end": 0.667',
    }
    for name, text in texts.items():
        subtitles.write(tmp_path / name, [appearance(1 / 3, 2 / 3, "=cmd()", 1 / 3)], [film()])
        assert text in (tmp_path / name).read_text()
    # Blanks separate columns. They become `_`, or %20 if the name with `_` is another name.
    names = {"unknown 1": "unknown_1", "Ada O": "Ada%20O", "Ada_O": "Ada_O", "99 %": "99_%"}
    names |= {"Ada%20O": "Ada%2520O", "Ada%2520O": "Ada%252520O"}
    rows = subtitles.to_rttm([appearance(1, 2, name) for name in names]).splitlines()
    assert rows[0] == "SPEAKER a.mp4 1 1.000 1.000 <NA> <NA> unknown_1 <NA> <NA>"
    assert [row.split()[7] for row in rows] == [*names.values()]


def test_simultaneous_tracks_get_the_same_name_only_from_a_user():
    """Of two simultaneous tracks of Ada, only the track with the higher probability is named."""
    films = [film(a=(0, 10), b=(4, 6), c=(10, 12), d=(5, 20))]  # track=(begin, end) in seconds
    pairs = {"".join(sorted(pair)) for pair in naming.pair_seen_together(films)}
    assert pairs == {"ab", "ad", "bd", "cd"}
    answers = {"a": answer("Ada", 0.6), "b": answer("Ada", 0.9), "c": answer("Ada", 0.95)}
    answers["d"] = answer("Bob", 0.7)
    settled = naming.settle_answers(answers, films)
    assert [settled[clip].identity for clip in "abcd"] == [None, "Ada", "Ada", "Bob"]
    by_user = {clip: answer("Ada", 1.0)._replace(evidence=("told",)) for clip in "ab"}
    settled = naming.settle_answers(answers | by_user, films)
    assert [settled[clip].identity for clip in "ab"] == ["Ada", "Ada"]


@pytest.fixture
def with_voices(tmp_path, models):
    """A gallery of faces and voices."""
    made_nets.write(models, "voice", "voice_embedder", back_end=made_nets.back_end())
    return Gallery.of_models(tmp_path / "g", models)


def test_voice_changes_the_odds_of_a_face_at_most_ninefold(with_voices):
    ada, bob = draw(6, people=2, clips=2)
    with_voices.enrol({"film": {"face": ada[:1], "audio": VOICE}}, "Ada")
    face = {"face": ada[1:]}
    answers = with_voices.identify({
        "both": face | {"audio": VOICE}, "mute": face, "hoarse": face | {"audio": OTHER_VOICE},
        "dubbed": {"face": bob[1:], "audio": VOICE}, "radio": {"audio": VOICE},
    })  # fmt: skip
    evidence = {clip: (answer.identity, answer.evidence) for clip, answer in answers.items()}
    assert (evidence["both"], evidence["mute"]) == (("Ada", ("face", "audio")), ("Ada", ("face",)))
    assert evidence["dubbed"] == (None, ()), "a voice does not outweigh another face"
    # A score is the logarithm of a probability p, and the odds are p / (1 - p).
    odds = {clip: 1 / np.expm1(-answer.score) for clip, answer in answers.items()}
    assert odds["both"] == pytest.approx(9 * odds["mute"], rel=1e-4)
    assert odds["hoarse"] == pytest.approx(odds["mute"] / 9, rel=1e-4)
    assert odds["radio"] > 9, "without a face, the voice counts in full"


def test_rank_omits_clips_that_share_no_modality_with_the_person(with_voices):
    """Ada has only a photo, so a clip with only a voice cannot be compared with Ada."""
    (ada,) = draw(6, people=1, clips=2)
    with_voices.enrol({"photo": {"face": ada[:1]}}, "Ada")
    clips = {"voice": {"audio": VOICE}, "face": {"face": ada[1:]}}
    # Nothing is known about the voice, so its probability of Ada is 0.5. This is above the
    # threshold of 0.4, but the voice must not get her name.
    assert with_voices.identify(clips, threshold=0.4)["voice"].identity is None
    assert [clip for clip, _ in with_voices.rank(clips, threshold=0.4)["Ada"]] == ["face"]


def test_clips_of_a_group_get_one_name_and_the_lower_of_two_probabilities(gallery):
    ada, eve = draw(5, people=2, clips=8)
    gallery.enrol({"photo": {"face": ada[:1]}}, "Ada")
    clips = faces("a", ada[1:]) | faces("e", eve[1:])  # a0 to a6, e0 to e6
    vectors = gallery.embed(clips, advance=(counts := list[int]()).append)
    refused(lambda: gallery.embed(clips, "val"), "leave it out")  # `val` is a split of a dataset
    groups = gallery.group(clips)
    assert groups == gallery.group(vectors)
    assert len(groups) == 14 == sum(counts) and len({*groups.values()}) == 2
    answers = gallery.identify(vectors, groups=groups)
    assert [answers[clip].identity for clip in groups] == ["Ada"] * 7 + [None] * 7
    # The probability is the lower of two: for the group, and for only this clip.
    single, known = gallery.identify(vectors), vectors.only({f"a{n}" for n in range(7)})
    (vote,) = gallery.index.nearest([*known.parts.values()], 1, np.zeros(7, int))
    for clip in known.names:
        lower = min(np.exp(vote.best[0][1]), single[clip].probability)
        assert answers[clip].probability == pytest.approx(lower)
    # With a threshold, each clip needs this probability itself.
    limit = np.median([single[clip].probability for clip in known.names])
    answers = gallery.identify(vectors, groups=groups, threshold=limit)
    for clip in known.names:
        assert (answers[clip].identity == "Ada") == (single[clip].probability >= limit)
    # A group is called e0, like a clip. The clip e0 is in no group and does not vote.
    answers = gallery.identify(vectors, groups={f"a{n}": "e0" for n in range(7)})
    assert answers["a0"].identity == "Ada" and answers["e0"].identity is None


def test_a_group_gets_a_name_only_if_one_of_its_clips_would_get_it():
    """The clip at 0.3 keeps the name with its own probability, and says what the name rests on."""

    def answer(probability, name=None):
        return Answer(name, probability, np.log(probability), (("Ada", probability),), ("face",))

    vote, weak, strong = answer(0.97, "Ada"), answer(0.3), answer(0.6, "Ada")
    against = answer(0.05)
    assert join_answers(vote, [weak, against]) == [weak, against]
    assert join_answers(vote, [strong, weak, against]) == [
        strong, answer(0.3, "Ada")._replace(evidence=("face", "clips")), against,
    ]  # fmt: skip
    # If nobody has measured the card of the net, a clip needs 50 % itself.
    assert join_answers(vote, [strong, weak, against], 0.5) == [strong, weak, against]
    found = appearance(0, 1, "Ada")._replace(probability=0.3, evidence=("face", "clips"))
    assert naming.format_certainty(found) == "30 %, by other shots"
    assert naming.format_certainty(found._replace(evidence=("face",))) == "30 %"
    assert "\nAda?\n" in subtitles.to_subtitles([found], ".srt")
    assert "\nAda\n" in subtitles.to_subtitles([found._replace(probability=0.5)], ".srt")


def test_subtitles_list_all_visible_known_people_and_do_not_overlap():
    """Many players show only one subtitle at a time. Markup in names is escaped."""
    found = [
        appearance(0, 9.5, "Eve"), appearance(3.25, 4, "Bob {x}"),
        appearance(4, 9.5, "<i>A --> a & b"),
        appearance(5, 5, "left out, because it has no duration"),
    ]  # fmt: skip
    assert subtitles.to_subtitles(found, ".srt") == (
        "1\n00:00:00,000 --> 00:00:03,250\nEve\n\n"
        "2\n00:00:03,250 --> 00:00:04,000\nBob (x)\nEve\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\n\u2039i\u203aA --\u203a a & b\nEve\n\n"
        "4\n00:00:05,000 --> 00:00:09,500\n\u2039i\u203aA --\u203a a & b\nEve\n"
    )
    vtt = subtitles.to_subtitles([*found, appearance(0, 9, "unknown 1", probability=None)], ".vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:03.250\nEve\n\n00:00:03.250 -->")
    assert vtt.count("-->") == 4 and "&lt;i>A --&gt; a &amp; b\nEve" in vtt and "unknown" not in vtt
    assert [subtitles.to_subtitles([], end) for end in (".vtt", ".srt")] == ["WEBVTT\n", ""]
    two_films = [appearance(0, 1), appearance(0, 1, video="b.mp4")]
    refused(lambda: subtitles.to_subtitles(two_films, ".srt"), "--input=FOLDER/VIDEO.npz")


def test_tables_survive_a_spreadsheet_and_impossible_tables_are_refused(tmp_path):
    path, text = tmp_path / "unknown.tsv", "clip\tidentity\r\nx\tZo\u00eb\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert read_groups(path) == {"x": "Zo\u00eb"}
    path.write_bytes(text.encode("cp1252"))
    with pytest.warns(UserWarning, match="is read as Windows-1252: check its names"):
        assert read_groups(path) == {"x": "Zo\u00eb"}
    for content in ("one cell\n", "a\t" + "b" * 200_000, "a\tb\na\tc\n"):
        path.write_text(content)
        assert len(refused(lambda: read_groups(path), "unknown.tsv")) < 1000
    # Names are guarded against formulas, and may be quoted.
    clips = ("+1", "-x", "=cmd|' /C calc'!A0", "'quoted", "\uff1d1")
    path.unlink()
    write_groups(path, dict.fromkeys(clips, "unknown 1"))
    _, *lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"'{clip}\tunknown 1" for clip in clips)  # `'` marks a text
    path.write_text(path.read_text().replace("unknown 1", '"Zo\u00eb ""Z"" K"'))
    assert read_groups(path) == dict.fromkeys(clips, 'Zo\u00eb "Z" K')
    path.write_text("clip\tidentity\nx\t't Hooft\n")  # as a user types the name
    assert read_groups(path) == {"x": "'t Hooft"}


@pytest.mark.parametrize("has_mean", [False, True])
@pytest.mark.parametrize("people", [1, 7])
def test_log_odds_of_gaussian_vectors_equal_ratios_of_joint_densities(people, has_mean):
    """With gamma shapes D / 2, the vectors are Gaussian.

    All vectors share the mean of the population. The vectors of a person also share a mean. The
    mean in a card is the mean of CARD_PEOPLE people.
    """
    rng, width = np.random.default_rng(people), 6
    mean = rng.normal(size=width) if has_mean else np.zeros(width)
    # The variance of each dimension of the population's mean. Without a card, the mean is unknown.
    wide = (0.3 + 0.9) / card_backend.CARD_PEOPLE / width if has_mean else 1e6
    card = card_backend.Distances(within=0.3, between=0.9, same=width / 2, different=width / 2)
    counts = rng.integers(1, 5, people)
    owner = np.repeat(np.arange(people), counts)
    photos, clip = rng.normal(size=(len(owner), width)), rng.normal(size=width)
    means = np.stack([photos[owner == n].mean(axis=0) for n in range(people)])
    effective = counts.astype(float)  # independent photos: all count
    weights, blocks = card_backend.weigh(card, effective, counts), (slice(0, 2), slice(2, None))
    weighed = [(weights[x] @ means[x], float(weights[x].sum())) for x in blocks]
    known = card_backend.population(card, mean if has_mean else None, weighed)
    share, variance = card_backend.posterior(card, known, effective)
    centres = known.mean + share[:, None] * (means - known.mean)
    square, square_to_mean = (np.sum((clip - x) ** 2, axis=-1) for x in (centres, known.mean))
    of_stranger = card_backend.stranger_log_density(
        card, np.array(square_to_mean), np.array(card.within + card.between + known.variance)
    )
    ratios = card_backend.person_log_density(card, square, variance + card.within) - of_stranger

    def density(of):
        """Returns the log density of all photos and the clip if the clip shows the person `of`."""
        who, both = np.append(owner, of), np.vstack([photos, clip])
        summed = card.between * (who[:, None] == who) + card.within * np.eye(len(who))
        cov = wide + summed / width
        return sum(scipy.stats.multivariate_normal.logpdf(x, cov=cov) for x in (both - mean).T)

    wanted = [density(n) - density(people) for n in range(people)]  # `people` is a new person
    np.testing.assert_allclose(ratios, wanted, atol=1e-3)


@pytest.mark.parametrize(("people", "count"), [(5, 1), (5, 3), (50, 3), (500, 10)])
def test_people_are_named_and_probabilities_of_strangers_are_calibrated(people, count):
    """Half of the clips show strangers, so the mean probability should be 0.5."""
    # Photos of a person share no noise, or half of it, like photos of one day.
    for shared, most_error in ((0.0, 0.05), (0.5, 0.1)):
        figures = []
        for seed in range(2):
            made = Population(seed)
            known, strangers = made.people(people), made.people(150)
            person = made.rng.integers(0, people, 150)  # whom each of the first 150 clips shows
            shown = np.concatenate([known[person], strangers])
            photos, clips = made.photos(known, count, shared), unit(shown + made.noise(300))
            stranger, *of_people = np.exp(log_probabilities(photos, clips)).T
            best = np.argmax(of_people, axis=0)
            has_name, is_right = np.max(of_people, axis=0) > 0.5, best[:150] == person
            right, wrong = np.mean(has_name[:150] & is_right), np.mean(has_name[:150] & ~is_right)
            figures.append((stranger.mean(), right, wrong, has_name[150:].mean()))
        probability, right, wrong, strangers_named = np.mean(figures, axis=0)
        assert right >= 0.97 and wrong <= 0.01 and strangers_named <= 0.02
        assert abs(probability - 0.5) < most_error


@pytest.fixture
def photos(gallery):
    """Photos [60, 4, D] of people. The first 50 people are enrolled with their first photo."""
    made = Population(5)
    photos = made.photos(made.people(60), 4).astype(np.float32)
    known = {f"known {n}": {"face": x[:1]} for n, x in enumerate(photos[:50])}
    done = gallery.enrol(known, {f"known {n}": f"person {n}" for n in range(50)})
    assert len(done.rivals) <= 1  # a rare lookalike
    return photos


def test_face_under_two_people_is_reported_by_each_way_to_enrol(gallery, photos, tmp_path, command):
    write_npz(tmp_path / "x", {"Eve": {f"c{n}": {"face": photos[n, :1]} for n in (1, 2)}})
    done = command(
        "gallery", "enrol", gallery.folder, f"--input={tmp_path / 'x'}", "--json", "--quiet"
    )
    assert json.loads(done.out)["rivals"] == {"Eve/c1": "person 1", "Eve/c2": "person 2"}
    assert done.err.count("seems to show 'person") == 2 and "gallery relabel" in done.err
    others = {f"more {n}": {"face": photos[n, 1:2]} for n in range(50)}
    found = gallery.enrol(others, {name: f"Bob {n}" for n, name in enumerate(others)}).rivals
    right = sum(found.get(f"more {n}") == f"person {n}" for n in range(50))
    assert right >= 45 and len(found) - right <= 1
    copy = {"copy.mp4": {"face": photos[3, :1]}}
    assert gallery.enrol(copy, "Eve").rivals["copy.mp4"] in ("person 3", "Bob 3")
    # Both people are new, and one of them has several clips.
    pair = {f"pair {n}": {"face": photos[55, n : n + 1]} for n in range(4)}
    named = dict.fromkeys(pair, "Ann") | {"pair 0": "Zoe"}
    found = gallery.enrol(pair, named).rivals
    assert found == {name: "Zoe" if who == "Ann" else "Ann" for name, who in named.items()}


def test_right_clips_strangers_and_twins_are_not_reported(gallery, photos, monkeypatch, capsys):
    more = {f"{n} {k}": {"face": photos[n, k : k + 1]} for n in range(50) for k in (1, 2, 3)}
    found = gallery.enrol(more, {name: f"person {name.split()[0]}" for name in more}).rivals
    assert len(found) <= 1
    strangers = {f"s{n}": {"face": photos[n, :1]} for n in range(50, 60)}
    assert gallery.enrol(strangers, strangers=True).rivals == {}
    # A twin resembles the person more than others do, but less than the twin's own photos.
    centre = photos[:4].mean(axis=1)
    twin = photos[0] + 0.45 * (centre[1] - centre[0])
    clips = {f"twin {k}": {"face": twin[k : k + 1]} for k in range(4)}
    gallery.enrol({"twin 3": clips.pop("twin 3")}, "twin")
    assert {*gallery.enrol(clips, "twin").rivals.values()} <= {"person 1"}
    # Too many clips are compared in part: of copies under another name, 3 are reported.
    monkeypatch.setattr(audit, "MOST_PAIRS", 3 * (len(gallery) + 10))
    copies = {f"copy {n}": {"face": photos[n, :1]} for n in range(10)}
    found = gallery.enrol(copies, {name: f"x {name}" for name in copies}).rivals
    assert [*found] == ["copy 0", "copy 1", "copy 2"]
    assert "only 3 of 10 clips were checked" in capsys.readouterr().err


@pytest.mark.parametrize(("dimensions", "variance"), [(16, 0.9), (32, 0.16), (100, 0.04)])
def test_shape_of_distances_is_half_the_number_of_dimensions(dimensions, variance):
    """Before they are scaled to unit length, vectors are Gaussian about a common vector."""
    rng = np.random.default_rng(dimensions)
    noise = rng.normal(size=(2, 20_000, dimensions)) * np.sqrt(variance / dimensions)
    product = np.sum(noise[0] * noise[1], axis=1) + 1 - variance
    lengths = np.sqrt(np.sum(noise**2, axis=2) + 1 - variance)
    cosines = product / lengths[0] / lengths[1]
    shape = card_backend.count_shape(1 - cosines.mean(), cosines.std())
    assert shape == pytest.approx(dimensions / 2, rel=0.05)


def measure_groups(num_people, clips_of_each):
    """Groups random clips. Returns the number of groups, and the share of clips of main people."""
    clips = draw(0, people=num_people, clips=clips_of_each).reshape(-1, WIDTH)
    truth = np.repeat(np.arange(num_people), clips_of_each)
    names = [f"film{n % 7}.s{n:03}.t00" for n in range(len(clips))]
    labels = grouping.group(BACKEND, names, [clips])
    main_people = [np.bincount(truth[labels == n]).max() for n in {*labels.tolist()}]
    return len(main_people), sum(main_people) / len(truth)


def test_a_pair_is_joined_if_its_odds_exceed_the_number_of_groups(gallery):
    """The odds that two clips show one person are 1 / G x the likelihood ratio of the clips."""
    first, other = np.eye(2, WIDTH, dtype=np.float32)

    def pair(angle):
        turned = (np.cos(angle) * first + np.sin(angle) * other).astype(np.float32)
        return {"a": {"face": first[None]}, "b": {"face": turned[None]}}

    def log_ratio(angle):
        return gallery.compare(pair(angle))["a", "b"].log_ratio

    angle = scipy.optimize.brentq(lambda x: log_ratio(x) - np.log(5), 0.35, 0.8)
    for count in (0, 2, 4, 20):  # clips of other people, who resemble nobody
        others = faces("x", np.eye(WIDTH, dtype=np.float32)[2 : 2 + count])
        for votes, odds in ((False, 1), (True, grouping.VOTE_ODDS)):
            groups = gallery.group(pair(angle) | others, for_votes=votes)
            assert (groups["a"] == groups["b"]) == (count + 2 < 5 * odds)
            assert len({*groups.values()}) == count + (1 if count + 2 < 5 * odds else 2)
    for settled in ((), (1,), (1, 2)):  # two settled numbers are never one person
        groups = gallery.group(pair(angle), together={"a": 1, "b": 2}, settled=settled)
        assert (groups["a"] == groups["b"]) == (settled != (1, 2))


def test_grouping_makes_one_group_per_person(monkeypatch):
    count, purity = measure_groups(num_people=10, clips_of_each=10)
    assert count <= 11 and purity > 0.99
    count, _ = measure_groups(num_people=60, clips_of_each=1)  # nobody appears twice
    assert count >= 56
    _, purity = measure_groups(num_people=60, clips_of_each=3)  # small groups join only larger ones
    assert purity >= 0.97
    # If there are more clips than are compared at once, each film is grouped first.
    monkeypatch.setattr(grouping, "MAX_GROUPED_CLIPS", 50)
    count, purity = measure_groups(num_people=8, clips_of_each=15)
    assert count <= 9 and purity > 0.99


def test_unclear_faces_of_different_people_are_not_grouped():
    """Vectors of unclear faces have a part in common, so that even two people look alike.

    There are 4 unclear clips of each of 12 people, and 4 clear clips of the first 6 people.
    """
    clips = draw(4, people=12, clips=8)
    unclear = unit(clips[:, :4] + 0.5 * unit(clips.mean((0, 1)))).reshape(-1, WIDTH)
    vectors = np.concatenate([unclear, clips[:6, 4:].reshape(-1, WIDTH)]).astype(np.float32)
    people = np.append(np.repeat(np.arange(12), 4), np.repeat(np.arange(6), 4))
    names = [f"film{n % 7}.s{n:03}.t00" for n in range(72)]
    for clarity in (1.0, 0.4, 0.2):  # of the unclear clips; the last one is below the limit
        clear = dict(zip(names, [clarity] * 48 + [1.0] * 24, strict=True))
        labels = grouping.group(BACKEND, names, [vectors], clarity=clear)
        groups = [people[labels == label] for label in np.unique(labels)]
        mixed = sum(len(group) - np.bincount(group).max() for group in groups)
        assert mixed > 6 if clarity == 1 else mixed == 0, "as clear clips, people are mixed"
        assert len(groups) <= 14 or clarity == 0.2
    assert len({*labels[48:]}) == 6
    for label in np.unique(labels):  # unclear clips without a clear clip are alone
        assert (labels == label).sum() == 1 or (labels[48:] == label).any()


def test_groups_of_photos_are_compared_as_by_an_oracle():
    """The squared distance of two means has a gamma distribution, for one person or for two."""
    drawn, owner = draw(5, people=4, clips=6).astype(float), np.repeat(np.arange(4), (1, 2, 3, 6))
    photos = [x[:k] for x, k in zip(drawn, (1, 2, 3, 6), strict=True)]
    clarity, d = np.array([1, 0.4, 0.5, 0.3]), BACKEND.parts[0].distances
    assert d
    sums = backend.sum_by_owner(np.concatenate(photos), owner, 4)
    groups = BACKEND.summarise([sums], clarity)
    found = np.array([BACKEND.compare(groups.take([x]), groups)[0] for x in range(4)])
    means, counts = [x.mean(0) for x in photos], np.array([1, 2, 3, 6])
    noise = 1 / card_backend.effective_count(d, counts, np.array([x @ x for x in means]))
    for i, j in ((0, 1), (1, 2), (2, 3), (3, 0)):
        square, one = np.sum((means[i] - means[j]) ** 2), d.within * (noise[i] + noise[j])
        limits = (d.same, one), (d.different, one + 2 * d.between * max(clarity[i], clarity[j]))
        logs = [scipy.stats.gamma.logpdf(square, n, scale=mean / n) for n, mean in limits]
        assert found[i, j] == pytest.approx(logs[0] - logs[1], abs=1e-9)
        assert found[j, i] == pytest.approx(found[i, j], abs=1e-12)


@pytest.mark.slow
def test_real_people_are_identified_and_strangers_are_grouped():
    folder = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks"
    if not folder.exists():
        pytest.skip("no folder tracks next to VIDJAX_REAL_DATA")
    films, photos = decision.load(folder)
    for photos_per_person, least_right in ((1, 0.88), (3, 0.9)):
        measured = decision.measure(films, photos, known=8, count=photos_per_person, draws=8)
        assert measured["right"] >= least_right and measured["wrong"] <= 0.01
        assert measured["strangers named"] <= 0.05 and measured["ECE"] <= 0.06
        assert measured["groups per person"] <= 1.3 and measured["purity"] >= 0.95
