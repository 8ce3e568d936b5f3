"""Galleries that cards of models make, without a run: friends, strangers, groups, times."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from tests.helpers import made_nets
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import appearances, cards
from vidjax.apps.video.features_folder import FileStamp, Film, FilmTrack
from vidjax.cli import program as main_lib

# Cosines of dlib's vectors of faces: mean and deviation of pairs of one person, and of two.
SAME, DIFFERENT = (0.958, 0.0146), (0.8305, 0.0352)
WIDTH = 128
PERSON, CLIP = slice(0, 36), slice(24, 41)  # independent directions of people, and of clips


def draw(rng, people, clips):
    """Draws unit vectors [people, clips, 128] whose cosines are those of the card."""
    axes = np.linalg.qr(np.random.default_rng(7).normal(size=(WIDTH, WIDTH)))[0]
    spread = np.zeros((2, WIDTH))
    spread[0, PERSON], spread[1, CLIP] = (SAME[0] - DIFFERENT[0]) / 36, (1 - SAME[0]) / 17
    person, clip = np.sqrt(spread)
    found = rng.normal(size=(people, 1, WIDTH)) * person
    found = found + rng.normal(size=(people, clips, WIDTH)) * clip
    found[..., -1] = np.sqrt(DIFFERENT[0])  # the mean of all
    found = found @ axes
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("photos", "least"), [(3, 0.93), (1, 0.85)])
def test_five_friends_are_named_and_strangers_are_not(photos, least):
    pairs: Any = {"same": SAME, "different": DIFFERENT, "pairs": (134, 5119), "data": "made"}
    card = cards.BackEnd(centre=[0.0] * WIDTH, **pairs)
    right = named = wrong = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        friends, strangers = draw(rng, 5, photos + 6), draw(rng, 60, 1).reshape(-1, WIDTH)
        found = backend.make_card_backend({"face": card})
        people = found.enrol(
            [f"friend {n}" for n in range(5)],
            friends[:, :photos].reshape(-1, WIDTH),
            np.repeat(np.arange(5), photos),
        )
        index = backend.Index(found, [people])
        logs = np.array(list(index.search([friends[:, photos:].reshape(-1, WIDTH)])))
        best, sure = logs[:, 1:].argmax(1), np.exp(logs[:, 1:].max(1)) > 0.5
        truth = np.repeat(np.arange(5), 6)
        right += np.sum(sure & (best == truth))
        wrong += np.sum(sure & (best != truth))
        logs = np.array(list(index.search([strangers])))
        named += np.sum(np.exp(logs[:, 1:].max(1)) > 0.5)
    assert right / (30 * 30) >= least
    assert named / (30 * 60) <= 0.02
    assert wrong / (30 * 30) <= 0.01


def test_mean_vectors_weigh_frames_by_quality(tmp_path, monkeypatch):
    from vidjax.data.memory import MemoryClips

    rng = np.random.default_rng(0)
    features, quality = (
        rng.normal(size=(4, 3)).astype(np.float32),
        np.array([1, 0, 3, -2], np.float32),
    )
    clips = {
        "b": {"face": {"features": features, "quality": quality}},
        "none": {"face": None},
        "a": {"face": {"features": features[:2], "quality": np.zeros(2, np.float32)}},
    }
    loaded = MemoryClips.from_dict(clips, {"face": 3, "audio": 2}, ())
    found = dict(zip(loaded.names, loaded.mean_vectors("face"), strict=True))
    np.testing.assert_allclose(found["b"], (features[0] + 3 * features[2]) / 4, rtol=1e-6)
    np.testing.assert_allclose(found["a"], features[:2].mean(0), rtol=1e-6)
    assert not found["none"].any() and loaded.mean_vectors("audio").shape == (3, 2)
    whole = loaded.mean_vectors("face")
    for frames in (1, 2, 5):
        monkeypatch.setattr("vidjax.data.memory.MAX_BLOCK_FRAMES", frames)
        np.testing.assert_array_equal(loaded.mean_vectors("face"), whole)


def test_the_mean_of_a_long_clip_takes_less_memory_than_its_features():
    from vidjax.data.memory import MemoryClips

    features = np.random.default_rng(0).normal(size=(100_000, 256)).astype(np.float16)
    loaded = MemoryClips.from_dict({"film": {"face": features}}, {"face": 256}, ())
    tracemalloc.start()
    (found,) = loaded.mean_vectors("face")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes
    weight = np.linalg.norm(features.astype(np.float64), axis=1)
    np.testing.assert_allclose(found, np.average(features, axis=0, weights=weight), atol=1e-6)


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    back_end = made_nets.back_end(SAME, DIFFERENT, WIDTH)
    made_nets.write(folder, "embed", width=WIDTH, back_end=back_end)
    return folder


def test_a_gallery_of_models_lives_without_them(tmp_path, models):
    rng = np.random.default_rng(1)
    friends = draw(rng, 3, 4)
    gallery = Gallery.of_models(tmp_path / "g", models)
    assert not gallery.identities and gallery.origin.cards.keys() == {"face"}
    for number, clips in enumerate(friends):
        photos = {f"{number}/{n}": {"face": x[None]} for n, x in enumerate(clips[:3])}
        gallery.enrol(photos, f"friend {number}")
    (models / "embed.onnx").unlink()
    again = Gallery(tmp_path / "g")
    answers = again.identify({f"q{n}": {"face": x[3:]} for n, x in enumerate(friends)})
    assert [one.identity for one in answers.values()] == [f"friend {n}" for n in range(3)]
    assert again.remove(identity="friend 1") == 3
    with pytest.raises(ValueError, match="made of models, not of a run"):
        _ = again.run


def test_a_gallery_of_models_needs_numpy_alone(tmp_path, models, python):
    friends = draw(np.random.default_rng(1), 3, 3)
    gallery = enrolled(tmp_path / "g", models, friends[:, :2])
    clips = {
        f"stranger {n}": {"face": x} for n, x in enumerate(draw(np.random.default_rng(2), 4, 1))
    }
    gallery.enrol(clips, strangers=True)
    (tmp_path / "in").mkdir()
    for number, vectors in enumerate(friends):
        np.savez(tmp_path / "in" / f"{number}.npz", face=vectors[2:])
    absent = ("jax", "tensorflow", "tensorflow_datasets", "flax", "optax", "orbax", "pyarrow",
              "scipy", "ml_collections", "absl", "sklearn", "matplotlib")  # fmt: skip
    code = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        "import numpy as np\nfrom vidjax import Gallery\nfrom vidjax.cli.program import main\n"
        "clips = {n: dict(np.load(f'in/{n}.npz')) for n in '012'}\n"
        "gallery = Gallery('g')\n"
        "assert [x.identity for x in gallery.identify(clips).values()] == [*gallery]\n"
        "assert gallery.identify(clips, fpir=0.25) and gallery.threshold(0.25).score < 0\n"
        "assert gallery.enrol({'new': clips['0']}, '0').enrolled == 1\n"
        "assert gallery.relabel('new', '1') == '0'\n"
        "assert gallery.remove(clip='new') == 1\n"
        "for words in ('list g', 'identify g --input=in --threshold=0.5',\n"
        "              'enrol g --input=in/0.npz --identity=Ada'):\n"
        "    assert main(['gallery', *words.split()]) == 0, words\n"
    )
    assert (
        "Ada" not in python(code, cwd=tmp_path) and Gallery(tmp_path / "g").identities["Ada"] == 1
    )


def test_a_gallery_that_is_widened_keeps_clips(tmp_path, models):
    """A part that comes later changes no answer until clips have it; then it is a clip's own."""
    rng = np.random.default_rng(4)
    ada, bob = draw(rng, 2, 3)
    gallery = Gallery.of_models(tmp_path / "g", models)
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
    voice = np.eye(made_nets.WIDTH, dtype=np.float32)[:1]
    full = gallery.embed({
        "a": {"face": ada[:1], "audio": voice}, "b": {"face": ada[:1]}, "c": {"face": ada[2:]},
    })  # fmt: skip
    version = gallery.version
    assert gallery.complete(full) == {"a"}  # b is another vector, and c not enrolled
    assert gallery.complete(full) == {"a"} and gallery.version == version + 1
    assert gallery.clips["a"].vector[WIDTH:].tolist() == voice[0].tolist()
    made_nets.write(models, "embed", width=WIDTH, notes="another", back_end=back_end | {
        "centre": [0.0] * WIDTH})  # fmt: skip
    with pytest.raises(ValueError, match="other models of face"):
        gallery.widen(models)


def enrolled(folder, models, vectors):
    gallery = Gallery.of_models(folder, models)
    for number, clips in enumerate(vectors):
        gallery.enrol(
            {f"{number}/{n}": {"face": x[None]} for n, x in enumerate(clips)}, str(number)
        )
    return gallery


def test_unknown_people_are_grouped_and_named(tmp_path, models, capsys):
    rng = np.random.default_rng(2)
    people = draw(rng, 6, 5)
    folder = tmp_path / "features"
    folder.mkdir()
    for number, clips in enumerate(people):
        for n, x in enumerate(clips):
            np.savez(folder / f"p{number}_{n}.npz", face=x[None])
    g, groups = tmp_path / "g", tmp_path / "groups.tsv"
    gallery = Gallery.of_models(g, models)
    gallery.enrol({"photo": {"face": people[0, :2]}}, "Ada")
    assert main_lib.main(["gallery", "group", str(g), f"--input={folder}", f"--out={groups}"]) == 0
    rows = [line.split("\t") for line in groups.read_text().splitlines()[1:]]
    named: dict[str, set[str]] = {}
    for clip, name in rows:
        named.setdefault(name, set()).add(clip[:2])
    assert all(len(some) == 1 for some in named.values())  # no group of two people
    assert 5 <= len(named) <= 6 and "p0" not in named["unknown 1"]
    text = groups.read_text().replace("unknown 1", "Bob")
    groups.write_text(text)
    words = ["gallery", "enrol", str(g), f"--input={folder}", f"--labels={groups}"]
    assert main_lib.main(words) == 0
    assert Gallery(g).identities.keys() == {"Ada", "Bob"}


def film(*tracks, video="a.mp4"):
    made = [
        FilmTrack(clip=clip, shot=0, start_s=start, end_s=end, seen=2)
        for clip, start, end in tracks
    ]
    return Film(
        video=video, source=FileStamp(address=f"/{video}", size=1, mtime_ns=0, inode=1),
        sha256="0" * 64, photo=False, seconds=99, shots=[], tracks=made, frames=1,
    )  # fmt: skip


def answer(identity, probability=0.9):
    return Answer(identity, probability, np.log(probability), ())


def test_tracks_of_one_person_are_joined_over_gaps():
    shown = film(("1", 0, 3), ("2", 4.5, 6), ("3", 8.5, 9), ("4", 1, 2), ("5", 30, 31))
    answers = {
        "1": answer("Ada", 0.8), "2": answer("Ada"), "3": answer("Ada"), "4": answer(None),
        "5": answer("B<o>b"),
    }  # fmt: skip
    found = appearances.find_appearances(answers, [shown], {"4": "unknown 1"})
    assert [(x.identity, x.start_s, x.end_s, x.probability, x.clips) for x in found] == [
        ("Ada", 0, 6, 0.8, ("1", "2")),
        ("unknown 1", 1, 2, None, ("4",)),
        ("Ada", 8.5, 9, 0.9, ("3",)),
        ("B<o>b", 30, 31, 0.9, ("5",)),
    ]
    vtt = appearances.to_subtitles(found, ".vtt")
    assert "00:00:00.000 --> 00:00:06.000\nAda\n" in vtt and "B&lt;o>b" in vtt
    assert "unknown" not in vtt
    rttm = appearances.to_rttm(found).splitlines()
    assert rttm[1] == "SPEAKER a.mp4 1 1.000 1.000 <NA> <NA> unknown_1 <NA> <NA>"
    with pytest.raises(ValueError, match="subtitles need one video"):
        appearances.to_subtitles([*found, found[0]._replace(video="b.mp4")], ".srt")


def test_nobody_is_seen_twice_at_one_time():
    """Of two tracks of one name and time the less probable one is unknown, and keeps its group."""
    shown = film(("1", 0, 10), ("2", 4, 6), ("3", 10, 12), ("4", 5, 20))
    answers = {"1": answer("Ada", 0.6), "2": answer("Ada", 0.9), "3": answer("Ada", 0.95)}
    answers["4"] = answer("Bob", 0.7)
    assert {frozenset(pair) for pair in appearances.pair_seen_together([shown])} == {
        frozenset(pair) for pair in ("12", "14", "24", "34")
    }
    settled = appearances.settle_answers(answers, [shown])
    assert [settled[clip].identity for clip in "1234"] == [None, "Ada", "Ada", "Bob"]
    found = appearances.find_appearances(settled, [shown], {"1": "unknown 1"})
    assert [(x.identity, x.start_s, x.probability) for x in found] == [
        ("unknown 1", 0, None), ("Ada", 4, 0.9), ("Bob", 5, 0.7), ("Ada", 10, 0.95),
    ]  # fmt: skip


def test_a_name_needs_more_than_one_half(tmp_path, models):
    """Of people who are as probable as each other, nobody is named, however few strangers come."""
    rng = np.random.default_rng(3)
    (twin,) = draw(rng, 1, 2)
    gallery = Gallery.of_models(tmp_path / "g", models)
    for name in ("Ada", "Eve"):
        gallery.enrol({name: {"face": twin[:1]}}, name)
    asked = {"q": {"face": twin[1:]}}
    found = gallery.identify(asked)["q"]
    assert found.identity is None and 0.4 < found.probability < 0.5
    assert "above 50 %" in gallery.rule().about
    assert gallery.identify(asked, threshold=0.4)["q"].identity in ("Ada", "Eve")


def test_a_list_leaves_out_whom_no_part_tells(tmp_path, models):
    """A clip with a voice only is as probable of Ada, who has a photo only, as of somebody new."""
    made_nets.write(models, "voice", "voice_embedder", back_end=made_nets.back_end())
    gallery = Gallery.of_models(tmp_path / "g", models)
    x = draw(np.random.default_rng(6), 1, 2)[0]
    gallery.enrol({"photo": {"face": x[:1]}}, "Ada")
    voice = np.eye(made_nets.WIDTH, dtype=np.float32)[:1]
    clips = {"voice": {"audio": voice}, "face": {"face": x[1:]}}
    assert gallery.identify(clips, threshold=0.4)["voice"].identity is None
    assert [clip for clip, _ in gallery.rank(clips, threshold=0.4)["Ada"]] == ["face"]


def test_more_strangers_are_expected_where_the_user_says_so(tmp_path, models):
    (ada,) = draw(np.random.default_rng(4), 1, 2)
    odds = []
    for number, expected in enumerate((1.0, 3.0)):
        gallery = Gallery.of_models(tmp_path / str(number), models, stranger_odds=expected)
        gallery.enrol({"photo": {"face": ada[:1]}}, "Ada")
        (found,) = Gallery(tmp_path / str(number)).identify({"q": {"face": ada[1:]}}).values()
        odds.append(np.log(-np.expm1(found.score)) - found.score)
    assert odds[1] - odds[0] == pytest.approx(np.log(3))


def test_clips_of_a_group_vote(tmp_path, models):
    """All tracks of a person have the name, or none has it."""
    rng = np.random.default_rng(5)
    ada, eve = draw(rng, 2, 8)
    gallery = Gallery.of_models(tmp_path / "g", models)
    gallery.enrol({"photo": {"face": ada[:1]}}, "Ada")
    vectors = gallery.embed(
        {f"{name}{n}": {"face": x[None]} for name, clips in (("a", ada), ("e", eve))
         for n, x in enumerate(clips[1:])}
    )  # fmt: skip
    groups = gallery.group(vectors)
    assert len({groups[f"a{n}"] for n in range(7)}) == len({groups[f"e{n}"] for n in range(7)}) == 1
    answers = gallery.identify(vectors, groups=groups)
    assert {answers[f"a{n}"].identity for n in range(7)} == {"Ada"}
    assert {answers[f"e{n}"].identity for n in range(7)} == {None}
    one = {answers[f"a{n}"].probability for n in range(7)}
    assert len(one) == 1 and answers["a0"].evidence == ("face",)
    assert gallery.identify(vectors.only([]), groups={}) == {}
    # A clip without a group is not of the group that has its name.
    answers = gallery.identify(vectors, groups={f"a{n}": "e0" for n in range(7)})
    assert answers["a0"].identity == "Ada" and answers["e0"].identity is None


def test_groups_are_joined_further(tmp_path, models):
    ada, eve = draw(np.random.default_rng(6), 2, 6)
    gallery = Gallery.of_models(tmp_path / "g", models)
    vectors = gallery.embed(
        {f"{name}{n}": {"face": x[None]} for name, clips in (("a", ada), ("e", eve))
         for n, x in enumerate(clips)}
    )  # fmt: skip
    begin = {clip: f"{clip[0]}{int(clip[1]) // 2}" for clip in vectors.names}
    first = dict.fromkeys("a", "unknown 1") | dict.fromkeys("e", "unknown 2")
    assert gallery.group(vectors, begin=begin) == {clip: first[clip[0]] for clip in begin}
    begin["e0"] = begin["a0"]
    found = gallery.group(vectors, begin=begin)
    assert found["e0"] == found["a0"] == found["a1"], "what somebody grouped stays together"
    found = gallery.group(vectors, [("a2", "a4")], begin=begin)
    assert found["a2"] == found["a3"] != found["a4"] == found["a5"]


def seen(name, start, end):
    return appearances.Appearance("a.mp4", start, end, name, 0.9, (name,))


def test_subtitles_name_all_who_are_seen_and_do_not_overlap(tmp_path):
    """Many players show one subtitle at a time."""
    found = [seen("Eve", 0, 9.5), seen("Bob {x}", 3.25, 4), seen("<i>Ada", 4, 9.5), seen("A", 5, 5)]
    appearances.write(tmp_path / "a.srt", found, [])
    assert (tmp_path / "a.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:03,250\nEve\n\n"
        "2\n00:00:03,250 --> 00:00:04,000\nBob (x)\nEve\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\n\u2039i\u203aAda\nEve\n\n"
        "4\n00:00:05,000 --> 00:00:09,500\n\u2039i\u203aAda\nEve\n"
    )
    vtt = appearances.to_subtitles(found, ".vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:03.250\nEve\n\n00:00:03.250 -->")
    assert vtt.count("-->") == 4 and "&lt;i>Ada\nEve" in vtt
    assert appearances.to_subtitles([], ".vtt") == "WEBVTT\n"
    assert appearances.to_subtitles([], ".srt") == ""


def test_subtitles_are_read_by_ffmpeg(tmp_path):
    av = pytest.importorskip("av")
    found = [seen("Eve", 0, 9.5), seen("Bob", 3.25, 4)]
    for ending in appearances.SUBTITLES:
        appearances.write(tmp_path / f"a{ending}", found, [])
        with av.open(str(tmp_path / f"a{ending}")) as file:
            cues = [packet for packet in file.demux() if packet.size]
        times = [(float(one.pts * one.time_base), bytes(one).decode()) for one in cues]
        assert times == [(0, "Eve"), (3.25, "Bob\nEve"), (4, "Eve")]


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [(0.0, "00:00:00.000", "0:00"), (192.4996, "00:03:12.500", "3:12"),
     (3725.0, "01:02:05.000", "1:02:05"), (59.9996, "00:01:00.000", "1:00")],
)  # fmt: skip
def test_times_as_text(seconds, long, short):
    assert appearances.format_time(seconds) == long
    assert appearances.format_time(seconds, short=True) == short


def test_names_that_differ_in_a_blank_stay_apart_in_rttm():
    found = [
        appearances.Appearance("a b.mp4", 0, 1, name, 0.9, ("c",)) for name in ("Ada O", "Ada_O")
    ]
    rows = [line.split() for line in appearances.to_rttm(found).splitlines()]
    assert [row[7] for row in rows] == ["Ada%20O", "Ada_O"] and rows[0][1] == "a_b.mp4"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path, encoding):
    path = tmp_path / "unknown.tsv"
    path.write_bytes("clip\tidentity\r\nx\tZo\u00eb\r\n".encode(encoding))
    if encoding == "cp1252":
        with pytest.warns(UserWarning, match="is read as Windows-1252: check its names"):
            assert answers_lib.read_groups(path) == {"x": "Zo\u00eb"}
    else:
        assert answers_lib.read_groups(path) == {"x": "Zo\u00eb"}
