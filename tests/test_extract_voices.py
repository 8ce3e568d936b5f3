"""Voices of films: times with a single face, the time of the sound, and the audio of clips."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import made_nets
from tests.helpers.clip_files import read_arrays
from tests.helpers.drawn_people import extract, tone, write_film, write_models, write_voices
from tests.helpers.seen import contents, refused
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import cards, pipeline, voices
from vidjax.apps.video.features_folder import FilmTrack

ADA, BOB, EVE = ("Ada", 20, 30), ("Bob", 80, 50), ("Eve", 60, 10)


@pytest.fixture
def models(drawn):
    return write_voices(drawn.models)


def hear(folder, models, name, *shots, unit="track", **sound):
    """Writes a film and extracts it; returns its description and its clips."""
    path = folder / name
    write_film(path, *shots, **sound)
    return extract(path, folder / path.stem, models, unit=unit)


def track(clip, start_s, end_s, shot=0):
    return FilmTrack(clip=clip, shot=shot, start_s=start_s, end_s=end_s, seen=2)


def test_clip_has_a_voice_if_its_face_is_the_only_visible_face(tmp_path, models):
    """A tone begins at 1 s of the first shot; the second shot has two faces."""
    sound = tone(440, 12)
    sound[:16_000] = 0
    shots = (4, 20, [ADA]), (4, 60, [ADA, BOB]), (4, 35, [BOB])
    film, clips = hear(tmp_path, models, "film.mkv", *shots, sound=sound)
    voice = {name for name, arrays in clips.items() if "audio" in arrays}
    assert voice == {"film.s000.t00", "film.s002.t00"} and film.voices == 2
    assert len(clips) == 4 and all("face" in arrays for arrays in clips.values())
    first = clips["film.s000.t00"]
    # Visible from 0 to 4 s; a window of 1.6 s contains only 0.6 s of the tone.
    np.testing.assert_allclose(first["audio_number"], [800, 1600, 2400], atol=1)
    np.testing.assert_allclose(first["audio_quality"], [1.4 / 1.6, 1, 1], atol=0.03)
    embed = voices.open_voice_embedder(cards.load(models)["voice_embedder"])
    wanted = embed(tone(440, 3.2).astype(np.float32).reshape(2, -1))[1]
    np.testing.assert_allclose(first["audio"][1], wanted, rtol=0.05, atol=0.02 * abs(wanted).max())
    for name in ("speech", "voice"):
        (models / f"{name}.json").unlink()
    film, faces = extract(tmp_path / "film.mkv", tmp_path / "faces", models)
    assert film.voices == 0
    for name, arrays in faces.items():
        assert {*clips[name]} - {*arrays} <= {"audio", "audio_quality", "audio_number"}
        for field, array in arrays.items():
            np.testing.assert_array_equal(array, clips[name][field])


@pytest.mark.slow
def test_broken_sound_is_reported_and_the_film_is_still_extracted(tmp_path, models, drawn):
    shots = (4, 20, [ADA]), (4, 60, [BOB])
    sound = tone(440, 8)
    film, clips = hear(tmp_path, models, "broken.mkv", *shots, sound=sound, broken=0.5)
    assert "audio" not in clips["broken.s000.t00"] and "audio" in clips["broken.s001.t00"]
    assert film.lost_sound > 10 and not film.damaged and film.refused == 0
    _, warnings = drawn.extract(tmp_path / "broken.mkv")
    assert f"{film.lost_sound:,} pieces of sound could not be decoded" in warnings
    for name, sound in (("mute", None), ("silence", 0 * tone(440, 4))):
        film, clips = hear(tmp_path, models, f"{name}.mkv", shots[0], sound=sound)
        assert len(clips) == 1 and film.voices == 0 and film.lost_sound == 0


@pytest.mark.slow
def test_shot_has_the_voice_of_its_main_figure_while_no_one_else_is_visible(tmp_path, models):
    """Bob leaves in the first shot; the second shot always shows two people."""
    shots = (8, 20, [ADA, ("Bob", 296, 50)]), (4, 60, [ADA, BOB]), (4, 35, [EVE])
    sound = {"sound": tone(440, 16), "size": (240, 320)}
    _, clips = hear(tmp_path, models, "film.mkv", *shots, unit="shot", **sound)
    assert {*clips} == {"film.s000", "film.s002"}
    film, by_track = extract(tmp_path / "film.mkv", tmp_path / "tracks", models)
    gone = max(each.end_s for each in film.tracks if each.shot == 0 and each.end_s < 7)
    begins = clips["film.s000"]["audio_number"]
    assert begins[0] == pytest.approx(gone * 1000, abs=1) and begins[0] > 1000 and len(begins) > 2
    for clip, same in {"film.s000": "film.s000.t01", "film.s002": "film.s002.t00"}.items():
        np.testing.assert_array_equal(clips[clip]["audio"], by_track[same]["audio"])


@pytest.mark.slow
def test_extraction_by_one_and_two_processes_writes_the_same_bytes(tmp_path, models):
    paths = [tmp_path / f"{hertz}.mkv" for hertz in (440, 3000)]
    for path in paths:
        write_film(path, (3, 20, [ADA]), (2, 60, [BOB, EVE]), sound=tone(int(path.stem), 5))
    written = []
    for workers in (1, 2):
        out = tmp_path / f"by{workers}"
        pipeline.extract(paths, out, models, workers=workers)
        written.append(contents(out))
    assert written[0] == written[1] and len(written[0]) == 2 + 2 + 1
    assert sum("audio" in clip for clip in read_arrays(tmp_path / "by1").values()) == 2


@pytest.mark.usefixtures("read_here")
def test_folder_of_features_refuses_other_voice_nets(tmp_path, models):
    path, out = tmp_path / "film.mkv", tmp_path / "out"
    write_film(path, (1, 20, [ADA]), sound=tone(440, 1))
    silent = write_models(tmp_path / "silent")
    pipeline.extract([path], out, models)
    refused(lambda: pipeline.extract([path], out, silent), "another voice_activity")
    made_nets.write(models, "voice", "voice_embedder", notes="another card")
    refused(lambda: pipeline.extract([path], out, models), "another voice_embedder")
    (models / "speech.json").unlink()
    refused(lambda: pipeline.extract([path], out, models), "no net for the role voice_activity")


def test_solo_spans_are_times_with_one_visible_track():
    """Long spans are divided into pieces with the same windows."""
    tracks = [track("a", 0, 10), track("b", 4, 6), track("c", 20, 30, 1), track("d", 30.2, 31, 2)]
    spans = list(voices.find_solo_spans(tracks))
    # Windows of 1.6 s, 0.8 s apart: from 0 to 4 s, 6 to 10 s, and 20 to 30 s.
    assert [span.clip for span in spans] == ["a", "a", "c"]
    np.testing.assert_allclose([span.start_s for span in spans], [0, 6, 20])
    np.testing.assert_allclose([span.end_s for span in spans], [4, 10, 29.6])
    spans = list(voices.find_solo_spans([track("a", 1, 200)]))
    assert max(span.end_s - span.start_s for span in spans) <= 60.001
    begins = np.concatenate([np.arange(x.start_s, x.end_s - 1.6 + 1e-6, 0.8) for x in spans])
    np.testing.assert_allclose(begins, 1 + 0.8 * np.arange(len(begins)))
    assert begins[-1] + 1.6 <= 200 < begins[-1] + 2.4


def test_each_span_receives_the_samples_of_its_time():
    """Cuts blocks of random lengths, with gaps, and compares with one array of the film."""
    rng = np.random.default_rng(0)
    whole, blocks, at = np.zeros(40 * voices.RATE, np.float32), [], 3_000
    while at < 34 * voices.RATE:
        block = rng.normal(size=rng.integers(1, 60_000)).astype(np.float32)
        whole[at : at + len(block)] = block
        blocks.append((at / voices.RATE, block))
        at += len(block) + rng.integers(0, 2) * rng.integers(0, 90_000)
    ends = [(0.1, 2.5), (2.5, 9), (8.2, 9.9), (12, 20), (29, 39)]
    spans = [voices.Span(str(n), *both) for n, both in enumerate(ends)]
    pieces = list(voices.cut_spans(blocks, [*spans, voices.Span("unheard", 38, 39.9)]))
    assert [span for span, _ in pieces] == spans
    for span, samples in pieces:
        first = round(span.start_s * voices.RATE)
        np.testing.assert_array_equal(samples, whole[first : first + len(samples)])
        assert len(samples) == round((span.end_s - span.start_s) * voices.RATE)


def test_memory_does_not_grow_with_the_length_of_the_sound():
    block = np.zeros(voices.RATE, np.float32)
    sound = ((float(second), block) for second in range(3600))
    tracemalloc.start()
    spans = voices.find_solo_spans([track("a", 0, 3600)])
    pieces = sum(1 for _ in voices.cut_spans(sound, spans))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces > 60 and peak < 12 << 20  # 12 MiB


@pytest.mark.slow
def test_gallery_identifies_people_by_face_and_voice(tmp_path, models):
    def speak(name, hertz):
        shot, sound = (4, 20, [(name, 40, 40)]), tone(hertz, 4)
        (arrays,) = hear(tmp_path, models, f"{name}{hertz}.mkv", shot, sound=sound)[1].values()
        return {
            part: {"features": arrays[part], "quality": arrays[f"{part}_quality"]}
            for part in ("face", "audio")
        }

    gallery = Gallery.of_models(tmp_path / "g", models)
    both = speak("Ada", 440)
    gallery.enrol({"film": both}, "Ada")
    clips = {"both": both, "hoarse": speak("Ada", 3000), "dubbed": speak("Bob", 440),
             "mute": {"face": both["face"], "audio": None}}  # fmt: skip
    answers = gallery.identify(clips)
    assert [answers[name].identity for name in ("both", "mute", "dubbed")] == ["Ada", "Ada", None]
    assert answers["both"].evidence == ("face", "audio") and answers["mute"].evidence == ("face",)
    assert answers["dubbed"].evidence == ()
    assert answers["both"].score > answers["mute"].score > answers["hoarse"].score
    # A face alone is judged as in a gallery without voices.
    faces = Gallery.of_models(tmp_path / "f", write_models(tmp_path / "silent"))
    faces.enrol({"film": {"face": both["face"]}}, "Ada")
    alone = faces.identify({"mute": {"face": both["face"]}})["mute"]
    assert answers["mute"].score == pytest.approx(alone.score, rel=1e-6)
    # A voice does not name whose voice nobody knows.
    gallery = Gallery.of_models(tmp_path / "unheard", models)
    gallery.enrol({"photo": {"face": both["face"]}}, "Ada")
    clips = {"voice": {"face": None, "audio": both["audio"]}, "seen": both}
    answers = gallery.identify(clips, threshold=0.4)
    assert answers["voice"].identity is None and answers["voice"].evidence == ()
    assert answers["seen"].identity == "Ada"


def test_voice_changes_the_odds_of_a_face_at_most_ninefold():
    """Clips with only a voice are not limited."""
    card = cards.BackEnd(centre=[0.0] * 4, same=(0.95, 0.05), different=(0.0, 0.2), pairs=(1, 1),
                         data="made")  # fmt: skip
    both = backend.make_card_backend({"face": card, "audio": card})
    ada, bob = np.eye(4, dtype=np.float32)[:2]
    people = both.enrol(["Ada", "Bob"], np.stack([np.r_[ada, ada], np.r_[bob, 0 * ada]]),
                        np.arange(2))  # fmt: skip

    def odds(face, voice):
        (logs,) = backend.Index(both, [people]).search([face[None], voice[None]])
        return (logs[1:] - logs[0])[0]

    none = np.zeros(4, np.float32)
    seen = odds(ada, none)
    assert odds(ada, ada) - seen == pytest.approx(np.log(9))
    assert odds(ada, bob) - seen == pytest.approx(-np.log(9))
    assert odds(bob, ada) < 0  # another face, with Ada's voice
    assert odds(none, ada) > np.log(9)
