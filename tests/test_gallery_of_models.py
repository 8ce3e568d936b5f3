"""Galleries that cards of models make, without a run: friends, strangers, groups, times."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import decision
from tests.helpers import made_nets
from tests.helpers.cases import first_by_day
from tests.helpers.embeddings import unit
from tests.helpers.seen import refused
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import backend, grouping
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import appearances, cards
from vidjax.apps.video.features_folder import FileStamp, Film, FilmTrack
from vidjax.data.memory import MemoryClips
from vidjax.models import distance

# Cosines of dlib's vectors of faces: mean and deviation of pairs of one person, and of two.
SAME, DIFFERENT = (0.958, 0.0146), (0.8305, 0.0352)
WIDTH = 128
VOICE = np.eye(made_nets.WIDTH, dtype=np.float32)[:1]
DLIB = distance.from_cosines(SAME, DIFFERENT)
FITTED = {"same": SAME, "different": DIFFERENT, "pairs": (1, 1), "data": "made"}
CARD = cards.BackEnd(centre=[0.0] * WIDTH, **FITTED)
BACKEND = backend.make_card_backend({"face": CARD})


class Population:
    """Vectors with equal variances of people, and of clips, in some directions, a third shared."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        within, between, same, different = DLIB
        # The spread of two people is the spread of B in n directions plus the spread of W.
        square = (within + between) ** 2 / different - within**2 / same
        n_within, n_between = round(2 * same), round(2 * between**2 / square)
        self.within, self.between = np.zeros((2, WIDTH))
        self.within[:n_within] = within / n_within
        first = n_within * 2 // 3
        self.between[first : first + n_between] = between / n_between
        self.mean = np.sqrt(max(1 - within - between, 0)) * np.eye(WIDTH)[-1]

    def people(self, count):
        return self.mean + self.rng.normal(size=(count, WIDTH)) * np.sqrt(self.between)

    def noise(self, *shape, share=1.0):
        return self.rng.normal(size=(*shape, WIDTH)) * np.sqrt(share * self.within)

    def photos(self, people, count, shared=0.0):
        """[N, count, D]: photos of people, of one day that they share a part of the noise of."""
        day = self.noise(len(people), 1, share=shared)
        return unit(people[:, None] + day + self.noise(len(people), count, share=1 - shared))


def draw(rng, people, clips):
    """Draws unit vectors [people, clips, 128] whose cosines agree with the card."""
    made = Population(rng)
    return made.photos(made.people(people), clips).astype(np.float32)


def log_probabilities(photos, clips):
    """Returns log probabilities [Q, 1 + N] of a stranger and N people; photos are [N, k, D]."""
    people, count = photos.shape[:2]
    names, owner = [f"{n:05}" for n in range(people)], np.repeat(np.arange(people), count)
    enrolled = BACKEND.enrol(names, photos.reshape(-1, WIDTH).astype(np.float32), owner)
    index = backend.Index(BACKEND, [enrolled])
    return np.array(list(index.search([clips.astype(np.float32)])))


def test_mean_vectors_weight_frames_by_quality(monkeypatch):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    quality = np.array([1, 0, 3, -2], np.float32)
    clips = {
        "b": {"face": {"features": x, "quality": quality}},
        "none": {"face": None},
        "a": {"face": {"features": x[:2], "quality": 0 * quality[:2]}},
    }
    loaded = MemoryClips.from_dict(clips, {"face": 3, "audio": 2}, ())
    for frames in (1, 2, 5):  # in memory at one time
        monkeypatch.setattr("vidjax.data.memory.MAX_BLOCK_FRAMES", frames)
        vectors = dict(zip(loaded.names, loaded.mean_vectors("face"), strict=True))
        np.testing.assert_allclose(vectors["b"], (x[0] + 3 * x[2]) / 4, rtol=1e-6)
        np.testing.assert_allclose(vectors["a"], x[:2].mean(0), rtol=1e-6)
        assert not vectors["none"].any() and loaded.mean_vectors("audio").shape == (3, 2)


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models").mkdir()
    back_end = made_nets.back_end(SAME, DIFFERENT, WIDTH)
    made_nets.write(tmp_path / "models", "embed", width=WIDTH, back_end=back_end)
    return tmp_path / "models"


@pytest.mark.parametrize(("photos", "least_right"), [(1, 0.85), (3, 0.93)])
def test_five_friends_are_named_and_strangers_are_not(photos, least_right):
    """A clip gets the name of the most probable friend, if the probability is above 0.5."""
    right, wrong, named_strangers = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        friends, strangers = draw(rng, 5, photos + 6), draw(rng, 60, 1)[:, 0]
        enrolled, clips = friends[:, :photos], friends[:, photos:].reshape(30, WIDTH)
        logs = log_probabilities(enrolled, np.concatenate([clips, strangers]))[:, 1:]
        is_named, friend = np.exp(logs.max(1)) > 0.5, logs.argmax(1)
        is_right = friend[:30] == np.repeat(np.arange(5), 6)  # six clips of each friend
        right.append(is_named[:30] & is_right)
        wrong.append(is_named[:30] & ~is_right)
        named_strangers.append(is_named[30:])
    assert np.mean(right) >= least_right and np.mean(wrong) <= 0.01
    assert np.mean(named_strangers) <= 0.02


@pytest.fixture
def gallery(tmp_path, models):
    return Gallery.of_models(tmp_path / "g", models)


def faces(name, vectors):
    """Returns clips of one face each: NAME0, NAME1 and so on."""
    return {f"{name}{n}": {"face": x[None]} for n, x in enumerate(vectors)}


def test_gallery_of_models_works_without_jax_scipy_and_other_libraries(
    tmp_path, gallery, models, python
):
    """The model files may be deleted after enrolment."""
    assert not gallery.identities and gallery.origin.cards.keys() == {"face"}
    friends = draw(np.random.default_rng(1), 3, 3)
    (tmp_path / "in").mkdir()
    for number, vectors in enumerate(friends):
        gallery.enrol(faces(f"{number}/", vectors[:2]), str(number))
        np.savez(tmp_path / "in" / f"{number}.npz", face=vectors[2:])
    gallery.enrol(faces("s", draw(np.random.default_rng(2), 4, 1)[:, 0]), strangers=True)
    (models / "embed.onnx").unlink()
    with pytest.raises(ValueError, match="not from a trained run"):
        _ = gallery.run
    absent = ("jax", "tensorflow", "tensorflow_datasets", "flax", "optax", "orbax", "pyarrow",
              "scipy", "ml_collections", "absl", "sklearn", "matplotlib")  # fmt: skip
    code = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        "import numpy as np\nfrom vidjax import Gallery\nfrom vidjax.apps.serve import app\n"
        "from vidjax.cli.program import main\n"
        "clips = {n: dict(np.load(f'in/{n}.npz')) for n in '012'}\n"
        "gallery = Gallery('g')\n"
        "assert [x.identity for x in gallery.identify(clips).values()] == [*gallery]\n"
        "assert gallery.identify(clips, fpir=0.25) and gallery.threshold(0.25).score < 0\n"
        "assert gallery.enrol({'new': clips['0']}, '0').enrolled == 1\n"
        "assert gallery.relabel('new', '1') == '0' and gallery.remove(clip='new') == 1\n"
        "for words in ('list g', 'identify g --input=in --threshold=0.5',\n"
        "              'enrol g --input=in/0.npz --identity=Ada'):\n"
        "    assert main(['gallery', *words.split()]) == 0, words\n"
    )
    python(code, cwd=tmp_path)
    assert Gallery(gallery.folder).identities["Ada"] == 1


def test_adding_a_modality_keeps_clips_and_answers(gallery, models):
    """A new modality changes no answer until enrolled clips get a vector of it."""
    ada, bob = draw(np.random.default_rng(4), 2, 3)
    gallery.enrol({"a": {"face": ada[:1]}}, "Ada")
    gallery.enrol({"b": {"face": bob[:1]}}, "Bob")
    asked = {"q": {"face": ada[1:2]}}
    before = gallery.identify(asked)["q"]
    assert gallery.widen(models) == ()
    back_end = made_nets.back_end()
    made_nets.write(models, "voice", "voice_embedder", back_end=back_end)
    assert gallery.widen(models) == ("audio",)
    after = Gallery(gallery.folder).identify(asked)["q"]
    assert after.identity == "Ada" and after.score == pytest.approx(before.score, rel=1e-5)
    full = gallery.embed({
        "a": {"face": ada[:1], "audio": VOICE}, "b": {"face": ada[:1]}, "c": {"face": ada[2:]},
    })  # fmt: skip
    version = gallery.version
    assert gallery.complete(full) == {"a"}  # b is another vector, and c not enrolled
    assert gallery.complete(full) == {"a"} and gallery.version == version + 1
    assert gallery.clips["a"].vector[WIDTH:].tolist() == VOICE[0].tolist()
    made_nets.write(models, "embed", width=WIDTH, notes="another", back_end=back_end | {
        "centre": [0.0] * WIDTH})  # fmt: skip
    with pytest.raises(ValueError, match="other models of face"):
        gallery.widen(models)


def test_unknown_people_are_grouped_and_enrolled_after_naming(tmp_path, gallery, say):
    people = draw(np.random.default_rng(2), 6, 5)
    folder, groups = tmp_path / "features", tmp_path / "groups.tsv"
    folder.mkdir()
    for number, n in np.ndindex(6, 5):
        np.savez(folder / f"p{number}_{n}.npz", face=people[number, n][None])
    gallery.enrol({"photo": {"face": people[0, :2]}}, "Ada")
    words = (gallery.folder, f"--input={folder}")
    say("gallery", "group", *words, f"--out={groups}")
    rows = {tuple(line.split("\t")) for line in groups.read_text().splitlines()[1:]}
    pairs = {(clip[:2], name) for clip, name in rows}
    assert len(pairs) == len({name for _, name in pairs}) <= 6  # no group of two people
    assert {clip for clip, _ in pairs} >= {f"p{n}" for n in range(1, 6)}
    assert ("p0", "unknown 1") not in pairs
    groups.write_text(groups.read_text().replace("unknown 1", "Bob"))
    say("gallery", "enrol", *words, f"--labels={groups}")
    assert Gallery(gallery.folder).identities.keys() == {"Ada", "Bob"}


def film(**tracks):
    made = [
        FilmTrack(clip=clip, shot=0, start_s=start, end_s=end, seen=2)
        for clip, (start, end) in tracks.items()
    ]
    stamp = FileStamp(address="/a.mp4", size=1, mtime_ns=0, inode=1)
    return Film(video="a.mp4", source=stamp, sha256="0" * 64, photo=False, seconds=99, shots=[],
                tracks=made, frames=1)  # fmt: skip


def answer(identity, probability=0.9):
    return Answer(identity, probability, np.log(probability), ())


def test_tracks_of_one_person_are_joined_over_short_gaps():
    video = film(a=(0, 3), b=(4.5, 6), c=(8.5, 9), d=(1, 2), e=(30, 31))
    answers = {"a": answer("Ada", 0.8), "d": answer(None), "e": answer("B<o>b")}
    answers |= dict.fromkeys("bc", answer("Ada"))
    seen = appearances.find_appearances(answers, [video], {"d": "unknown 1"})
    assert [(x.identity, x.start_s, x.end_s, x.probability, x.clips) for x in seen] == [
        ("Ada", 0, 6, 0.8, ("a", "b")),
        ("unknown 1", 1, 2, None, ("d",)),
        ("Ada", 8.5, 9, 0.9, ("c",)),
        ("B<o>b", 30, 31, 0.9, ("e",)),
    ]
    vtt = appearances.to_subtitles(seen, ".vtt")
    assert "00:00:00.000 --> 00:00:06.000\nAda\n" in vtt and "B&lt;o>b" in vtt
    assert "unknown" not in vtt
    rttm = appearances.to_rttm(seen).splitlines()
    assert rttm[1] == "SPEAKER a.mp4 1 1.000 1.000 <NA> <NA> unknown_1 <NA> <NA>"
    # Names that differ in a blank stay apart.
    names = (seen[0]._replace(video="a b.mp4", identity=name) for name in ("Ada O", "Ada_O"))
    rows = [line.split() for line in appearances.to_rttm([*names]).splitlines()]
    assert [(row[1], row[7]) for row in rows] == [("a_b.mp4", "Ada%20O"), ("a_b.mp4", "Ada_O")]
    with pytest.raises(ValueError, match="subtitles need one video"):
        appearances.to_subtitles([*seen, seen[0]._replace(video="b.mp4")], ".srt")


def test_simultaneous_tracks_never_get_the_same_name():
    """If two tracks at the same time get the same name, the less probable track stays unknown."""
    films = [film(a=(0, 10), b=(4, 6), c=(10, 12), d=(5, 20))]
    answers = {"a": answer("Ada", 0.6), "b": answer("Ada", 0.9), "c": answer("Ada", 0.95)}
    answers["d"] = answer("Bob", 0.7)
    pairs = {"".join(sorted(pair)) for pair in appearances.pair_seen_together(films)}
    assert pairs == {"ab", "ad", "bd", "cd"}
    settled = appearances.settle_answers(answers, films)
    assert [settled[clip].identity for clip in "abcd"] == [None, "Ada", "Ada", "Bob"]
    seen = appearances.find_appearances(settled, films, {"a": "unknown 1"})
    assert [(x.identity, x.start_s, x.probability) for x in seen] == [
        ("unknown 1", 0, None), ("Ada", 4, 0.9), ("Bob", 5, 0.7), ("Ada", 10, 0.95),
    ]  # fmt: skip


def test_a_name_needs_a_probability_above_one_half(gallery):
    """If two people are equally probable, neither is named, however few strangers come."""
    (twin,) = draw(np.random.default_rng(3), 1, 2)
    for name in ("Ada", "Eve"):
        gallery.enrol({name: {"face": twin[:1]}}, name)
    asked = {"q": {"face": twin[1:]}}
    best = gallery.identify(asked)["q"]
    assert best.identity is None and 0.4 < best.probability < 0.5
    assert "above 50 %" in gallery.rule().about
    assert gallery.identify(asked, threshold=0.4)["q"].identity in ("Ada", "Eve")


def test_rank_omits_clips_that_share_no_modality_with_the_person(tmp_path, models):
    """A voice says nothing about Ada, who has only a photo: she is as probable as a new person."""
    made_nets.write(models, "voice", "voice_embedder", back_end=made_nets.back_end())
    gallery = Gallery.of_models(tmp_path / "g", models)
    (x,) = draw(np.random.default_rng(6), 1, 2)
    gallery.enrol({"photo": {"face": x[:1]}}, "Ada")
    clips = {"voice": {"audio": VOICE}, "face": {"face": x[1:]}}
    assert gallery.identify(clips, threshold=0.4)["voice"].identity is None
    assert [clip for clip, _ in gallery.rank(clips, threshold=0.4)["Ada"]] == ["face"]


def test_stranger_odds_multiply_the_odds_of_a_new_person(tmp_path, models):
    (ada,) = draw(np.random.default_rng(4), 1, 2)
    odds = []
    for name, expected in (("1", 1.0), ("2", 3.0)):
        Gallery.of_models(tmp_path / name, models, stranger_odds=expected).enrol(
            {"photo": {"face": ada[:1]}}, "Ada"
        )
        (best,) = Gallery(tmp_path / name).identify({"q": {"face": ada[1:]}}).values()
        odds.append(np.log(-np.expm1(best.score)) - best.score)
    assert odds[1] - odds[0] == pytest.approx(np.log(3))


def test_all_clips_of_a_group_get_one_answer_and_given_groups_stay_together(gallery):
    ada, eve = draw(np.random.default_rng(5), 2, 8)
    gallery.enrol({"photo": {"face": ada[:1]}}, "Ada")
    vectors = gallery.embed(faces("a", ada[1:]) | faces("e", eve[1:]))
    groups = gallery.group(vectors)
    assert len(groups) == 14 and len({*groups.values()}) == 2
    answers = gallery.identify(vectors, groups=groups)
    assert [answers[clip].identity for clip in groups] == ["Ada"] * 7 + [None] * 7
    assert len({answers[f"a{n}"].probability for n in range(7)}) == 1
    assert answers["a0"].evidence == ("face",)
    assert gallery.identify(vectors.only([]), groups={}) == {}
    # The group is called e0, like a clip. The clip e0 has no group, so it does not vote in it.
    answers = gallery.identify(vectors, groups={f"a{n}": "e0" for n in range(7)})
    assert answers["a0"].identity == "Ada" and answers["e0"].identity is None
    ada, eve = draw(np.random.default_rng(6), 2, 6)
    vectors = gallery.embed(faces("a", ada) | faces("e", eve))
    begin = {clip: f"{clip[0]}{int(clip[1]) // 2}" for clip in vectors.names}
    names = {"a": "unknown 1", "e": "unknown 2"}
    assert gallery.group(vectors, begin=begin) == {clip: names[clip[0]] for clip in begin}
    begin["e0"] = begin["a0"]
    groups = gallery.group(vectors, begin=begin)
    assert groups["e0"] == groups["a0"] == groups["a1"], "clips that a user grouped stay together"
    groups = gallery.group(vectors, [("a2", "a4")], begin=begin)
    assert groups["a2"] == groups["a3"] != groups["a4"] == groups["a5"]


def test_subtitles_list_all_visible_people_and_do_not_overlap(tmp_path):
    """Many players show one subtitle at a time."""
    times = {"Eve": (0, 9.5), "Bob {x}": (3.25, 4), "<i>Ada": (4, 9.5), "A": (5, 5)}
    seen = [appearances.Appearance("a.mp4", start, end, name, 0.9, ())
             for name, (start, end) in times.items()]  # fmt: skip
    assert appearances.to_subtitles(seen, ".srt") == (
        "1\n00:00:00,000 --> 00:00:03,250\nEve\n\n"
        "2\n00:00:03,250 --> 00:00:04,000\nBob (x)\nEve\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\n\u2039i\u203aAda\nEve\n\n"
        "4\n00:00:05,000 --> 00:00:09,500\n\u2039i\u203aAda\nEve\n"
    )
    appearances.write(tmp_path / "a.vtt", seen, [])
    vtt = (tmp_path / "a.vtt").read_text()
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:03.250\nEve\n\n00:00:03.250 -->")
    assert vtt.count("-->") == 4 and "&lt;i>Ada\nEve" in vtt
    assert [appearances.to_subtitles([], end) for end in (".vtt", ".srt")] == ["WEBVTT\n", ""]
    for seconds, short in ((192.4996, "3:12"), (3725.0, "1:02:05"), (59.9996, "1:00")):
        assert appearances.format_time(seconds, short=True) == short


def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path):
    path, text = tmp_path / "unknown.tsv", "clip\tidentity\r\nx\tZo\u00eb\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert answers_lib.read_groups(path) == {"x": "Zo\u00eb"}
    path.write_bytes(text.encode("cp1252"))
    with pytest.warns(UserWarning, match="is read as Windows-1252: check its names"):
        assert answers_lib.read_groups(path) == {"x": "Zo\u00eb"}
    path.unlink()
    answers_lib.write_groups(path, {"-x": "unknown 1"})
    text = path.read_text()
    assert "'-x\tunknown 1" in text  # guarded against formulas
    path.write_text(text.replace("unknown 1", '"Zo\u00eb ""Z"" K"'))
    assert answers_lib.read_groups(path) == {"-x": 'Zo\u00eb "Z" K'}
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: answers_lib.read_groups(tmp_path / "pipe"), "pipe")
    for wrong in (b"a\n", b"a\t" + b"b" * 200_000, b"a\tb\na\tc\n"):
        path.write_bytes(wrong)
        assert len(refused(lambda: answers_lib.read_groups(path), "unknown.tsv")) < 1000


def test_log_odds_are_a_ratio_of_gamma_densities_and_photos_that_are_alike_count_less():
    rng, (within, between, same, different) = np.random.default_rng(0), DLIB
    photo = unit(rng.normal(size=WIDTH))
    clips = unit(photo + rng.normal(size=(20, WIDTH)) * 0.02)
    logs = log_probabilities(photo[None, None], clips)
    square = np.sum((clips - photo) ** 2, axis=1)
    same_person = stats.gamma.logpdf(square, same, scale=2 * within / same)
    other_person = stats.gamma.logpdf(square, different, scale=2 * (within + between) / different)
    np.testing.assert_allclose(logs[:, 1] - logs[:, 0], same_person - other_person, atol=1e-4)
    # Photos that are alike count as fewer.
    count = np.array([1, 2, 10, 10])
    free = 1 - DLIB.within * 0.9  # as different as the card says
    counted = distance.effective_count(DLIB, count, np.array([1, 1, 1, free]))
    np.testing.assert_allclose(counted, [1, 4 / 3, 1.1, 10], atol=0.02)


@pytest.mark.parametrize("people", [1, 7])
def test_log_odds_of_gaussian_vectors_equal_ratios_of_joint_densities(people):
    """Shapes D / 2 give Gaussian distances. The joint densities integrate the mean out."""
    rng, width, wide = np.random.default_rng(people), 6, 1e6
    card = distance.Distances(0.3, 0.9, width / 2, width / 2)
    counts = rng.integers(1, 5, people)
    owner = np.repeat(np.arange(people), counts)
    photos, clip = rng.normal(size=(len(owner), width)), rng.normal(size=width)
    means = np.stack([photos[owner == n].mean(axis=0) for n in range(people)])
    known = distance.population(card, [means], [counts.astype(float)], [counts])
    share, variance = distance.posterior(card, known, counts.astype(float))
    centres = known.mean + share[:, None] * (means - known.mean)
    square, far = (np.sum((clip - x) ** 2, axis=-1) for x in (centres, known.mean))
    new = distance.stranger_log_density(
        card, np.array(far), np.array(card.within + card.between + known.variance)
    )
    ratios = distance.person_log_density(card, square, variance + card.within) - new

    def density(of):
        """The log density of all photos and the clip, where the clip shows the person `of`."""
        who, both = np.append(owner, of), np.vstack([photos, clip])
        own = card.between * (who[:, None] == who) + card.within * np.eye(len(who))
        return sum(stats.multivariate_normal.logpdf(x, cov=wide + own / width) for x in both.T)

    wanted = [density(n) - density(people) for n in range(people)]
    np.testing.assert_allclose(ratios, wanted, atol=1e-3)


@first_by_day("people, count", [(50, 3), (5, 1), (500, 10)])
def test_mean_probability_of_a_stranger_equals_the_share_of_strangers(people, count):
    """Half of the clips show strangers. Photos of a person may share the noise of one day."""
    for shared, most in ((0.0, 0.05), (0.5, 0.1)):
        probabilities = []
        for seed in range(2):
            made = Population(seed)
            known, strangers = made.people(people), made.people(150)
            person = made.rng.integers(0, people, 150)
            clips = unit(np.concatenate([known[person], strangers]) + made.noise(300))
            logs = log_probabilities(made.photos(known, count, shared), clips)
            probabilities.append(np.exp(logs[:, 0]).mean())
        assert abs(np.mean(probabilities) - 0.5) < most


def groups(people, count):
    """Returns the number of groups of clips of people, and the share of their main people."""
    made = Population(0)
    clips, truth = made.photos(made.people(people), count), np.repeat(np.arange(people), count)
    names = [f"film{n % 7}.s{n:03}.t00" for n in range(people * count)]
    labels = grouping.group(BACKEND, names, [clips.reshape(-1, WIDTH).astype(np.float32)])
    parts = [np.bincount(truth[labels == n]).max() for n in {*labels.tolist()}]
    return len(parts), sum(parts) / len(truth)


def test_grouping_makes_one_group_per_person_but_not_of_clips_of_one_time(monkeypatch):
    count, purity = groups(10, 10)
    assert count <= 11 and purity > 0.99
    # More clips than are compared at once are grouped film by film.
    monkeypatch.setattr(grouping, "MAX_GROUPED_CLIPS", 50)
    count, purity = groups(8, 15)
    assert count <= 9 and purity > 0.99
    assert groups(60, 1)[0] >= 56  # nobody twice
    made = Population(2)
    clips = [made.photos(made.people(1), 4)[0].astype(np.float32)]
    assert grouping.group(BACKEND, [*"abcd"], clips).tolist() == [0, 0, 0, 0]
    labels = grouping.group(BACKEND, [*"abcd"], clips, [("a", "c")])
    assert labels[0] != labels[2]
    assert grouping.group(BACKEND, [], [clips[0][:0]]).shape == (0,)
    assert answers_lib.name_groups(["b", "a", "c"], np.array([4, 2, 4])) == {
        "b": "unknown 1", "a": "unknown 2", "c": "unknown 1",
    }  # fmt: skip


def test_real_people_are_identified_and_strangers_are_grouped():
    folder = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks"
    if not folder.exists():
        pytest.skip("no folder tracks beside VIDJAX_REAL_DATA")
    films, photos = decision.load(folder)
    for count, right in ((1, 0.88), (3, 0.9)):
        measured = decision.measure(films, photos, known=8, count=count, draws=2)
        assert measured["right"] >= right and measured["wrong"] <= 0.01
        assert measured["strangers named"] <= 0.05 and measured["ECE"] <= 0.06
        assert measured["groups per person"] <= 1.3 and measured["purity"] >= 0.95
