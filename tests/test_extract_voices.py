"""Voices of films: whose face is seen alone, where sound lies in time, and what clips get of it."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("av", reason="needs the extra [video]")
pytest.importorskip("onnxruntime", reason="needs the extra [video]")
pytest.importorskip("onnx")

from tests.helpers import made_nets
from tests.helpers.clip_files import read_arrays
from tests.helpers.drawn_people import tone, write_film, write_models, write_photo, write_voices
from tests.helpers.seen import contents, refused
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import cards, features_folder, pipeline, voices
from vidjax.apps.video.features_folder import FilmTrack
from vidjax.data.clip_files import read_clips, write_npz

ADA, BOB, EVE = ("Ada", 20, 30), ("Bob", 80, 50), ("Eve", 60, 10)


@pytest.fixture
def models(drawn):
    return write_voices(drawn.models)


def extract(path, models, out=None):
    """Returns clip -> its arrays, and what is told of the film."""
    out = out or path.with_suffix("")
    (outcome,) = pipeline.extract([path], out, models)
    assert outcome.film
    return read_arrays(out), outcome.film


def track(clip, start_s, end_s, shot=0):
    return FilmTrack(clip=clip, shot=shot, start_s=start_s, end_s=end_s, seen=2)


def test_a_clip_has_the_voice_of_a_face_that_is_seen_alone(tmp_path, models):
    """In the first shot a tone sounds from 1 s on; in the second one two faces are seen."""
    path, sound = tmp_path / "film.mkv", tone(440, 12)
    sound[:16_000] = 0
    write_film(path, (4, 20, [ADA]), (4, 60, [ADA, BOB]), (4, 35, [BOB]), sound=sound)
    clips, film = extract(path, models)
    voice = {name for name, arrays in clips.items() if "audio" in arrays}
    assert voice == {"film.s000.t00", "film.s002.t00"} and film.voices == 2
    assert len(clips) == 4 and all("face" in arrays for arrays in clips.values())
    first = clips["film.s000.t00"]
    # Seen from 0 to 4 s; windows of 1.6 s, of which one hears the tone for 0.6 s alone.
    np.testing.assert_allclose(first["audio_number"], [800, 1600, 2400], atol=1)
    np.testing.assert_allclose(first["audio_quality"], [1.4 / 1.6, 1, 1], atol=0.03)
    embed = voices.open_voice_embedder(cards.load(models)["voice_embedder"])
    wanted = embed(tone(440, 3.2).astype(np.float32).reshape(2, -1))[1]
    np.testing.assert_allclose(first["audio"][1], wanted, rtol=0.05, atol=0.02 * abs(wanted).max())
    (clip, *_) = read_clips([path.with_suffix("") / "film.npz"])
    assert {*clip.modalities} == {"face", "audio"}
    assert {*clip.modalities["audio"]} == {"features", "quality", "number"}


def test_without_nets_of_voices_nothing_changes(tmp_path, models):
    path = tmp_path / "film.mkv"
    write_film(path, (4, 20, [ADA]), sound=tone(440, 4))
    with_voices, _ = extract(path, models)
    for name in ("speech", "voice"):
        (models / f"{name}.json").unlink()
    faces, film = extract(path, models, tmp_path / "faces")
    assert film.voices == 0
    (one,), (two,) = faces.values(), with_voices.values()
    assert {*two} - {*one} == {"audio", "audio_quality", "audio_number"}
    for field, array in one.items():
        np.testing.assert_array_equal(array, two[field])
    told = features_folder.read_extraction(tmp_path / "faces")
    assert told and {*told.models} == {*pipeline.ROLES}


@pytest.mark.slow
def test_a_film_without_sound_and_a_photo_have_no_voice(tmp_path, models):
    write_film(tmp_path / "mute.mkv", (4, 20, [ADA]))
    write_film(tmp_path / "silence.mkv", (4, 20, [ADA]), sound=0 * tone(440, 4))
    write_photo(tmp_path / "photo.png", ("Ada", 20, 30))
    for name in ("mute.mkv", "silence.mkv", "photo.png"):
        clips, film = extract(tmp_path / name, models)
        assert len(clips) == 1 and film.voices == 0 and film.lost_sound == 0
        assert not any("audio" in arrays for arrays in clips.values())


def test_sound_that_starts_late_is_placed_by_its_time_stamps(tmp_path, models):
    path = tmp_path / "late.mkv"
    write_film(path, (3, 20, [ADA]), (4, 60, [BOB]), sound=tone(440, 3), start_s=4)
    clips, _ = extract(path, models)
    assert "audio" not in clips["late.s000.t00"]
    begin = clips["late.s001.t00"]["audio_number"]
    assert 3_200 <= begin.min() <= 4_000 and begin.max() + 1_600 <= 7_000


@pytest.mark.slow
def test_broken_sound_is_told_and_the_film_goes_on(tmp_path, models, drawn):
    shots = (4, 20, [ADA]), (4, 60, [BOB])
    write_film(tmp_path / "broken.mkv", *shots, sound=tone(440, 8), broken=0.5)
    clips, film = extract(tmp_path / "broken.mkv", models)
    assert "audio" not in clips["broken.s000.t00"] and "audio" in clips["broken.s001.t00"]
    assert film.lost_sound > 10 and not film.damaged and film.refused == 0
    _, said = drawn.extract(tmp_path / "broken.mkv")
    assert f"{film.lost_sound:,} pieces of sound could not be decoded" in said
    write_film(tmp_path / "deaf.mkv", *shots, sound=tone(440, 8), broken=1)
    clips, film = extract(tmp_path / "deaf.mkv", models)
    assert len(clips) == 2 and film.voices == 0 and film.lost_sound > 20


@pytest.mark.slow
def test_a_shot_has_the_voice_of_its_main_figure_while_nobody_else_is_seen(tmp_path, models):
    """Bob leaves the picture of the first shot; Eve is seen all along beside Ada in the second."""
    path = tmp_path / "film.mkv"
    write_film(path, (8, 20, [ADA, ("Bob", 296, 50)]), (4, 60, [ADA, BOB]), (4, 35, [EVE]),
               sound=tone(440, 16), size=(240, 320))  # fmt: skip
    out = tmp_path / "shots"
    pipeline.extract([path], out, models, features_folder.ExtractionSettings(unit="shot"))
    clips = read_arrays(out)
    assert {*clips} == {"film.s000", "film.s002"}
    by_track, film = extract(path, models, tmp_path / "tracks")
    gone = max(one.end_s for one in film.tracks if one.shot == 0 and one.end_s < 7)
    begins = clips["film.s000"]["audio_number"]
    assert begins[0] == pytest.approx(gone * 1000, abs=1) and begins[0] > 1000 and len(begins) > 2
    for clip, same in {"film.s000": "film.s000.t01", "film.s002": "film.s002.t00"}.items():
        np.testing.assert_array_equal(clips[clip]["audio"], by_track[same]["audio"])


@pytest.mark.slow
def test_one_and_two_processes_write_the_same_bytes(tmp_path, models, drawn):
    paths = [tmp_path / "a.mkv", tmp_path / "b.mkv", drawn.film()]
    for path, hertz in zip(paths[:2], (440, 3000), strict=True):
        write_film(path, (6, 20, [ADA]), sound=tone(hertz, 6))
    written = []
    for workers in (1, 2):
        out = tmp_path / f"by{workers}"
        pipeline.extract(paths, out, models, workers=workers)
        written.append(contents(out))
    assert written[0] == written[1] and len(written[0]) == 3 + 3 + 1
    assert sum("audio" in clip for clip in read_arrays(tmp_path / "by1").values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [("another", "another voice_embedder"), ("none", "another voice_activity"),
     ("first", "another voice_activity"), ("half", "no net for the role voice_activity")],
)  # fmt: skip
def test_a_folder_has_one_kind_of_voices(tmp_path, models, change, message):
    path = tmp_path / "film.mkv"
    write_film(path, (2, 20, [ADA]), sound=tone(440, 2))
    silent = write_models(tmp_path / "silent")
    extract(path, silent if change == "first" else models)
    if change == "another":
        made_nets.write(models, "voice", "voice_embedder", notes="another card")
    if change == "half":
        (models / "speech.json").unlink()
    refused(lambda: extract(path, silent if change == "none" else models), message)


def test_alone_is_who_is_seen_while_nobody_else_is():
    tracks = [track("a", 0, 10), track("b", 4, 6), track("c", 20, 30, 1), track("d", 30.2, 31, 2)]
    found = [(span.clip, span.start_s, span.end_s) for span in voices.find_solo_spans(tracks)]
    # Windows of 1.6 s, 0.8 s apart: from 0 to 4 s, 6 to 10 s, and 20 to 30 s.
    wanted = [("a", 0, 4.0), ("a", 6, 10), ("c", 20, 29.6)]
    assert [one[0] for one in found] == [one[0] for one in wanted]
    np.testing.assert_allclose([x[1:] for x in found], [x[1:] for x in wanted], atol=1e-9)


def test_long_spans_are_heard_in_pieces_with_the_same_windows():
    found = list(voices.find_solo_spans([track("a", 1, 200)]))
    assert max(one.end_s - one.start_s for one in found) <= 60.001
    begins = [
        begin
        for one in found
        for begin in np.arange(one.start_s, one.end_s - 1.6 + 1e-6, 0.8).tolist()
    ]
    np.testing.assert_allclose(begins, 1 + 0.8 * np.arange(len(begins)))
    assert begins[-1] + 1.6 <= 200 < begins[-1] + 2.4


def test_spans_get_the_samples_at_their_times():
    """Blocks of all lengths, with gaps, against one array of the whole film."""
    rng = np.random.default_rng(0)
    whole, blocks, at = np.zeros(40 * voices.RATE, np.float32), [], 3_000
    while at < 34 * voices.RATE:
        block = rng.normal(size=rng.integers(1, 60_000)).astype(np.float32)
        whole[at : at + len(block)] = block
        blocks.append((at / voices.RATE, block))
        at += len(block) + rng.integers(0, 2) * rng.integers(0, 90_000)
    ends = [(0.1, 2.5), (2.5, 9), (8.2, 9.9), (12, 20), (29, 39)]
    spans = [voices.Span(str(n), *both) for n, both in enumerate(ends)]
    found = list(voices.cut_spans(blocks, [*spans, voices.Span("unheard", 38, 39.9)]))
    assert [span for span, _ in found] == spans
    for span, samples in found:
        first = round(span.start_s * voices.RATE)
        np.testing.assert_array_equal(samples, whole[first : first + len(samples)])
        assert len(samples) == round((span.end_s - span.start_s) * voices.RATE)


def test_memory_does_not_grow_with_the_length_of_the_sound():
    block = np.zeros(voices.RATE, np.float32)
    sound = ((float(second), block) for second in range(6 * 3600))
    tracemalloc.start()
    pieces = sum(
        1 for _ in voices.cut_spans(sound, voices.find_solo_spans([track("a", 0, 6 * 3600)]))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces == 365 and peak < 12 << 20


def speak(film, models, *, name, hertz):
    """Writes and extracts a film of 4 s of one face and one tone; returns its features."""
    path = film.parent / f"{film.name}.mkv"
    write_film(path, (4, 20, [(name, 40, 40)]), sound=tone(hertz, 4))
    pipeline.extract([path], film, models)
    return film


def modalities(features):
    """Returns modality -> its features and their quality, of the one clip of a folder."""
    (arrays,) = read_arrays(features).values()
    return {
        name: {"features": arrays[name], "quality": arrays[f"{name}_quality"]}
        for name in ("face", "audio")
    }


@pytest.mark.slow
def test_a_gallery_hears_and_sees_and_a_face_alone_is_judged_alone(tmp_path, models, drawn):
    ada, g = speak(tmp_path / "ada", models, name="Ada", hertz=440), drawn.out / "gallery"
    drawn.gallery("create", f"--models={models}")
    assert {*Gallery(g).backend.widths} == {"face", "audio"}
    drawn.gallery("enrol", f"--input={ada}", "--identity=Ada")
    asked = {
        "both": speak(tmp_path / "both", models, name="Ada", hertz=440),
        "hoarse": speak(tmp_path / "hoarse", models, name="Ada", hertz=3000),
        "dubbed": speak(tmp_path / "dubbed", models, name="Bob", hertz=440),
    }
    heard = {name: modalities(path) for name, path in asked.items()}
    clips = {**heard, "mute": {"face": heard["both"]["face"], "audio": None}}
    answers = Gallery(g).identify(clips)
    assert [answers[name].identity for name in ("both", "mute", "dubbed")] == ["Ada", "Ada", None]
    assert answers["both"].evidence == ("face", "audio") and answers["mute"].evidence == ("face",)
    assert answers["dubbed"].evidence == ()
    assert answers["both"].score > answers["mute"].score > answers["hoarse"].score
    faces = Gallery.of_models(tmp_path / "f", write_models(tmp_path / "silent"))
    faces.enrol({"film": {"face": modalities(ada)["face"]}}, "Ada")
    alone = faces.identify({"mute": {"face": clips["mute"]["face"]}})["mute"]
    assert answers["mute"].score == pytest.approx(alone.score, rel=1e-6)


def test_a_voice_alone_does_not_name_whose_voice_nobody_knows(tmp_path, models):
    gallery = Gallery.of_models(tmp_path / "g", models)
    clip = modalities(speak(tmp_path / "ada", models, name="Ada", hertz=440))
    gallery.enrol({"photo": {"face": clip["face"]}}, "Ada")
    heard = {"voice": {"face": None, "audio": clip["audio"]}}
    for threshold in (None, 0.4):
        answer = gallery.identify(heard, threshold=threshold)["voice"]
        assert answer.identity is None and answer.evidence == ()
        assert gallery.identify({"seen": clip}, threshold=threshold)["seen"].identity == "Ada"


def test_a_voice_beside_a_face_moves_the_odds_nine_to_one_at_most():
    """Whatever the voice says; a voice alone, and parts of a run, are as they were."""
    card = cards.BackEnd(centre=[0.0] * 4, same=(0.95, 0.05), different=(0.0, 0.2), pairs=(1, 1),
                         data="made")  # fmt: skip
    both = backend.make_card_backend({"face": card, "audio": card})
    one, other = np.eye(4, dtype=np.float32)[:2]
    people = both.enrol(["Ada", "Bob"], np.stack([np.r_[one, one], np.r_[other, 0 * one]]),
                        np.arange(2))  # fmt: skip

    def odds(face, voice, found=both):
        (logs,) = backend.Index(found, [people]).search([face[None], voice[None]])
        return (logs[1:] - logs[0])[0]

    none = np.zeros(4, np.float32)
    seen = odds(one, none)
    assert odds(one, one) - seen == pytest.approx(np.log(9))
    assert odds(one, other) - seen == pytest.approx(-np.log(9))
    assert odds(other, one) < 0  # another face, with Ada's voice
    assert odds(none, one) > np.log(9)
    face, audio = both.parts
    other_part = backend.Backend((face, audio._replace(name="head")), both.settings)
    assert abs(odds(one, other, other_part) - odds(one, none, other_part)) > np.log(9)


@pytest.mark.slow
def test_who_tells_by_what_a_person_was_found(tmp_path, models, drawn):
    film, out = tmp_path / "film.mkv", drawn.out
    write_film(film, (4, 20, [ADA]), (4, 60, [BOB]), sound=tone(440, 8))
    drawn.befriend("Ada")
    drawn.who(film)
    rows = drawn.rows()
    assert [(row["identity"], row["evidence"]) for row in rows] == [
        ("Ada", ["face"]), ("unknown 1", []),
    ]  # fmt: skip
    assert "\tclips\tevidence\tbox\t" in (out / "names.tsv").read_text()
    (clip,) = rows[0]["clips"]
    again = tmp_path / "again.npz"
    write_npz(again, {"again": read_arrays(out / "features")[clip]})
    drawn.gallery("enrol", f"--input={again}", "--identity=Ada")
    answers = tmp_path / "answers.jsonl"
    drawn.gallery("identify", f"--input={out / 'features'}", f"--out={answers}")
    drawn.who(film, people=False)
    rows = drawn.rows()
    assert rows[0]["identity"] == "Ada" and rows[0]["evidence"] == ["face", "audio"]


def test_a_shot_is_a_clip_of_its_main_figure(tmp_path, drawn):
    """Alone; beside somebody as large, in too few frames, and too short: no clip."""
    write_film(
        tmp_path / "film.mkv",
        (2, 20, [("Ada", 20, 30)]),
        (2, 60, [("Bob", 10, 60), ("Eve", 90, 20)]),
        (2, 35, []),
        (0.6, 70, [("Eve", 80, 50)]),
        (2, 25, [("Bob", 10, 20)]),
    )
    drawn.extract(tmp_path / "film.mkv", flags=["--unit=shot"])
    (film,) = features_folder.read_films(drawn.out)
    assert [track.clip for track in film.tracks] == ["film.s000", "film.s004"]
    assert [track.shot for track in film.tracks] == [0, 4]
    for track in film.tracks:
        assert len(read_arrays(drawn.out)[track.clip]["face"]) == track.seen
