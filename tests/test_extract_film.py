"""Films of drawn people: search of faces, tracks, kept pictures, and voices."""

import shlex
from itertools import chain, product
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

import av
from av.stream import Disposition

from tests.helpers import films, made_nets
from tests.helpers.batches import assert_equal
from tests.helpers.drawn_people import SIDE, extract, picture, tone, write_film, write_voices
from vidjax.apps import cards
from vidjax.apps.video import film, nets, results, voices
from vidjax.apps.video.search import FilmSearch

# Faces: name of a colour, left, top. A shot is (seconds, brightness, faces).
ADA, BOB, EVE = ("Ada", 20, 30), ("Bob", 80, 50), ("Eve", 60, 10)
ROOM = 64  # a picture is divided into squares with this side, and a person moves in a square


def shoot(path, models, *shots, unit="track", **options):
    """Writes and extracts a film; returns the facts of the film, and its clips."""
    write_film(path, *shots, **options)
    return extract(path, path.with_suffix(""), models, unit=unit)


def write_joined(path, begins):
    """Writes parts of 2 s with Ada, which begin at the seconds `begins`, as a film.

    A .ts file consists of several files with a tone, as a joined recording.
    """
    stamps, pictures = [[1000 * x + 100 * n for n in range(20)] for x in begins], [picture([ADA])]
    if path.suffix != ".ts":
        films.write(path, pictures * 20 * len(begins), fps=10, stamps=[*chain(*stamps)])
        return
    for begin_s, times in zip(begins, stamps, strict=True):
        part = path.with_suffix(f".{begin_s}.ts")
        films.write(part, pictures * 20, stamps=times, sound=tone(440, 2), start_s=begin_s)
        with path.open("ab") as file:
            file.write(part.read_bytes())


# The name of a film, the starts of its parts in seconds -> tracks, jumps, start of the last voice.
JOINED = [
    ("a.mp4", (5, 67, 400), [(0, 2), (62, 64), (395, 397)], [(2, 60), (64, 331)], None),
    ("a.ts", (0, 182, 400), [(0, 6)], [(2, 180), (4, 216)], 4),
    ("a.ts", (0, 182, 50), [(0, 6)], [(2, 180)], 3),  # the last step is back: its sound is left out
]


@pytest.mark.parametrize(("name", "begins", "spans", "jumps", "voice"), JOINED)
def test_nobody_is_visible_while_the_clock_jumps(
    tmp_path, models, name, begins, spans, jumps, voice
):
    path = tmp_path / name
    write_joined(path, begins)
    found, clips = extract(path, tmp_path / "out", models)
    tracks = sorted((track.start_s, track.end_s) for track in found.tracks)
    np.testing.assert_allclose(tracks, spans, atol=0.1)
    np.testing.assert_allclose(found.jumps, jumps, atol=0.3)
    assert found.rate == pytest.approx(10, abs=0.1)
    line = f"the times of the pictures jump by {jumps[0][1] // 60}:00 at 0:02"
    lines = results.list_problems(found, path)
    assert lines[0].startswith(line) and not any("fewer than" in x for x in lines)
    if voice:
        assert max(x["audio_number"].max() for x in clips.values()) / 1000 == pytest.approx(
            voice, abs=1
        )


# Two equal halves -> the shape of a half, and the words for ffmpeg.
LAYOUTS = {
    "side by side": ((96, 128), "iw/2:ih:0:0"),
    "half width": ((96, 64), "iw/2:ih:0:0,scale=2*iw:ih"),
    "one above the other": ((96, 128), "iw:ih/2:0:0"),
    "half height": ((48, 128), "iw:ih/2:0:0,scale=iw:2*ih"),
}


def lay_out(name, number):
    """Returns a picture of two halves. `number` is the number of the picture in the film."""
    shape, _ = LAYOUTS.get(name, ((96, 128), ""))
    first, other = (picture([(x, 20 + number, 30)], size=shape) for x in ("Ada", "Bob"))
    shifted = np.roll(np.minimum(first, 250) + 2, -2, 1)  # the other eye, a little brighter
    stack = np.hstack if shape[0] == 96 and name != "one above the other" else np.vstack
    wall = films.scene(3, *shape) // 2
    singles = {
        "two people": [first, other], "two rooms": [first, np.maximum(first, wall)],
        "mirrored": [first, first[:, ::-1]], "one person": [first],
        "a room with two": [picture([("Ada", 10 + number, 30), ("Ada", 74 + number, 40)])],
        "black": [np.zeros((96, 256, 3), np.uint8)],
    }  # fmt: skip
    return stack(singles.get(name, [first, shifted]))


@pytest.mark.parametrize("name", [
    *LAYOUTS, "two people", "two rooms", "mirrored", "one person", "a room with two", "black",
])  # fmt: skip
def test_film_with_two_equal_halves_is_reported_with_a_command_that_cuts_it(tmp_path, drawn, name):
    path = tmp_path / "two eyes.mkv"
    films.write(path, [lay_out(name, n) for n in range(10)], "ffv1", fps=10)
    found, _ = extract(path, tmp_path / "out", drawn.models)
    _, words = LAYOUTS.get(name, ("", None))
    kind = {"half width": "side by side", "half height": "one above the other"}.get(name, name)
    lines = results.list_problems(found, path)
    assert found.halves == words and len(lines) == (name in LAYOUTS)
    assert all(f"{kind} (3D)" in x and f"-i '{path}' -vf crop={words} " in x for x in lines)


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_video_stream_that_players_show_is_read(tmp_path, drawn, chosen):
    """A film may have several video streams, of which one is the default stream."""
    path = tmp_path / "two angles.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = 128, 96, "bgr0"
            stream.disposition = Disposition.default if number == chosen else Disposition(0)
        for n, (number, stream) in product(range(20), enumerate(streams)):
            people = [("Ada", 20 + n, 30)] * (number == chosen)  # nobody in the other stream
            frame = av.VideoFrame.from_ndarray(picture(people), format="rgb24")
            container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    found, _ = extract(path, tmp_path / "out", drawn.models)
    assert len(found.tracks) == 1
    (line,) = results.list_problems(found, path)
    assert line.startswith(f"only number {chosen + 1} of its 2 video streams")
    assert f"-i '{path}' -map 0:V:{1 - chosen} " in line


@pytest.mark.slow
def test_kept_faces_cover_the_whole_time_of_a_track(tmp_path, drawn):
    shot = (30, 20, [("Ada", 0, 30)])  # 30 s, 10 pictures per second
    extracted, clips = shoot(tmp_path / "long.mkv", drawn.models, shot, size=(96, 256))
    (track,) = extracted.tracks
    number = clips[track.clip]["face_number"]
    assert film.MOST_FRAMES / 2 < len(number) <= film.MOST_FRAMES  # MOST_FRAMES is 32
    assert number[0] < 20 and number[-1] > 280, "of 300 frames"
    assert np.diff(number).max() < 25, "between two kept faces, where 300 / 32 frames are the mean"


@pytest.mark.parametrize("degrees", [90, 0])
def test_box_of_a_track_is_the_place_of_its_face_at_the_time_of_the_box(tmp_path, drawn, degrees):
    """Boxes are fractions of the displayed picture of 128 x 96 pixels."""
    pictures = [picture([("Ada", 16 + 2 * n, 40), ("Bob", 113, 72)]) for n in range(20)]
    stored = [np.rot90(x, -degrees // 90) for x in pictures]
    films.write(tmp_path / "film.mp4", stored, "mpeg4", fps=10, rotation=degrees)
    extracted, _ = extract(tmp_path / "film.mp4", tmp_path / "out", drawn.models)
    assert len(extracted.tracks) >= 2
    for track in extracted.tracks:
        assert track.box and track.box_at_s is not None
        assert track.start_s <= track.box_at_s < track.end_s
        # The right edge cuts Bob's face. Ada moves by 2 pixels in each of 10 pictures per second.
        left, top = (113, 72) if track.box[0] > 0.7 else (16 + 20 * track.box_at_s, 40)
        wanted = np.array([left, top, min(left + SIDE, 128), top + SIDE]) / np.tile([128, 96], 2)
        np.testing.assert_allclose(track.box, wanted, atol=0.02)


@pytest.mark.usefixtures("read_here")
@pytest.mark.parametrize("ending", [".mp4", ".ts"])
def test_extract_warns_of_slow_films_and_unused_video_streams(tmp_path, drawn, ending):
    """The unused stream is a second camera. A cover picture gives no warning."""
    single, both = tmp_path / f"single{ending}", tmp_path / f"of both{ending}"
    one = tmp_path / f"one{ending}"
    for path, name in ((single, "Ada"), (one, "Bob")):
        films.write(path, [picture([(name, 50, 40)])] * 3, "mpeg4", fps=1)
    films.double(one, both, cover=ending == ".mp4")
    for path, count in ((single, 0), (both, 1)):
        _, text = drawn.extract(path, flags=["--quiet"])  # does not hide warnings
        assert f"{path.name}: 3.0 s" in text and "fewer than 2 pictures a second" in text
        remedy = f"ffmpeg -i {shlex.quote(str(path))} -map 0:V:1 -map 0:a? -c copy other.mkv"
        assert text.count(remedy) == count


@pytest.fixture
def models(drawn):
    return write_voices(drawn.models)


def test_clip_has_a_voice_if_its_face_is_the_only_visible_face(tmp_path, models):
    """A tone begins at 1 s of the first shot; the second shot has two faces."""
    sound = tone(440, 8)
    sound[:16_000] = 0
    shots = (4, 20, [ADA]), (2, 60, [ADA, BOB]), (2, 35, [BOB])
    extracted, clips = shoot(tmp_path / "film.mkv", models, *shots, sound=sound)

    voice = {name for name, arrays in clips.items() if "audio" in arrays}
    assert voice == {"film.s000.t00", "film.s002.t00"} and extracted.voices == 2
    assert len(clips) == 4 and all("face" in arrays for arrays in clips.values())
    # The face is visible for 4 s. A window of 1.6 s begins every 0.8 s. The first window is left
    # out, because only 0.6 s of it have sound.
    first = clips["film.s000.t00"]
    np.testing.assert_allclose(first["audio_number"], [800, 1600, 2400], atol=1)
    np.testing.assert_allclose(first["audio_quality"], [1.4 / 1.6, 1, 1], atol=0.03)
    embed = voices.VoiceEmbedder(cards.load(models)["voice_embedder"])
    windows = tone(440, 3.2).astype(np.float32).reshape(2, -1)  # from 0 and from 1.6 s
    wanted = embed(windows)[1]
    np.testing.assert_allclose(first["audio"][1], wanted, rtol=0.05, atol=0.02 * abs(wanted).max())
    # Without the nets of voices, the other arrays are the same.
    for name in ("speech", "voice"):
        (models / f"{name}.json").unlink()
    _, faces = extract(tmp_path / "film.mkv", tmp_path / "faces", models)
    for name, arrays in clips.items():
        without = {field: x for field, x in arrays.items() if not field.startswith("audio")}
        assert_equal(without, faces[name])


@pytest.mark.slow
def test_broken_sound_is_reported_and_the_film_is_still_extracted(tmp_path, models, drawn):
    path, shots = tmp_path / "broken.mkv", ((4, 20, [ADA]), (4, 60, [BOB]))
    # The sound of the first shot is broken.
    extracted, clips = shoot(path, models, *shots, sound=tone(440, 8), broken=0.5)
    assert [name for name, clip in clips.items() if "audio" in clip] == ["broken.s001.t00"]
    assert extracted.lost_sound > 10, "of 16 damaged packets"
    assert not extracted.damaged and extracted.refused == 0, "only the sound is damaged"
    _, warnings = drawn.extract(path)
    assert f"pieces of sound that could not be read: {extracted.lost_sound:,}" in warnings


@pytest.mark.slow
def test_shot_has_the_voice_of_its_main_figure_while_no_one_else_is_visible(tmp_path, models):
    """Bob leaves the picture in the first shot. The second shot shows two people until its end."""
    shots = (8, 20, [ADA, ("Bob", 296, 50)]), (4, 60, [ADA, BOB]), (4, 35, [EVE])
    path, options = tmp_path / "film.mkv", {"sound": tone(440, 16), "size": (240, 320)}
    _, clips = shoot(path, models, *shots, unit="shot", **options)
    assert {*clips} == {"film.s000", "film.s002"}
    extracted, by_track = extract(path, tmp_path / "tracks", models)
    # The tracks of the first shot. Bob leaves before 7 s, and Ada stays until 8 s.
    bob_s, ada_s = sorted(each.end_s for each in extracted.tracks if each.shot == 0)
    assert 1 < bob_s < 7 and ada_s == pytest.approx(8, abs=0.01)
    begins_ms = clips["film.s000"]["audio_number"]  # of windows of sound
    assert begins_ms[0] == pytest.approx(bob_s * 1000, abs=1) and len(begins_ms) > 2
    # The main figures are Ada, who is track 1, and Eve.
    for clip, same in {"film.s000": "film.s000.t01", "film.s002": "film.s002.t00"}.items():
        np.testing.assert_array_equal(clips[clip]["audio"], by_track[same]["audio"])


def draw_shot(rng, frames, slow):
    """Returns pictures of people, who move slowly and are visible for five frames or more.

    If `slow` is False, each person is in all pictures, at random places.
    """
    faces = [[] for _ in range(frames)]  # of each picture
    for room in rng.choice(12, rng.integers(1, 7), replace=False):  # 1 to 6 of 3 x 4 rooms
        begin = rng.integers(0, max(1, frames - 4)) if slow else 0
        end = rng.integers(min(begin + 5, frames), frames + 1) if slow else frames
        place, step = rng.uniform(8, 40, 2), rng.uniform(-3, 3, 2)
        for number in range(begin, end):
            place = np.clip(place + step, 4, 44) if slow else rng.uniform(4, 44, 2)
            left, top = place.astype(int)
            faces[number].append(("Ada", left + room % 4 * ROOM, top + room // 4 * ROOM))
    return [picture(squares, size=(3 * ROOM, 4 * ROOM)) for squares in faces]


# People who move slowly, people who jump as in a fast pan, and slides of a second.
@pytest.mark.parametrize(("slow", "step_s"), [(True, 0.2), (False, 0.2), (False, 1.0)])
def test_people_who_are_visible_for_a_second_are_found_in_all_frames(
    tmp_path, monkeypatch, slow, step_s
):
    made_nets.write(tmp_path, "find", "face_detector")
    detector = nets.Detector(cards.load(tmp_path)["face_detector"])
    searches = mock.Mock(wraps=detector.search)
    monkeypatch.setattr(detector, "search", searches)
    search, rng = FilmSearch(detector), np.random.default_rng(0)
    wanted = []  # the boxes of the faces of each picture
    searched = []  # the pictures that `search` returns
    for length in (1, 2, 4, 6, 30):
        for rgb in draw_shot(rng, length, slow):
            number = len(wanted)
            searched += search.add(number, number * step_s, rgb)
            wanted.append(sorted(detector(rgb).boxes.tolist()))  # searches the whole picture
        searched += search.end_shot()
    assert [x.number for x in searched] == [*range(len(wanted))]
    assert [sorted(x.faces.boxes.tolist()) for x in searched] == wanted
    assert sum(map(len, wanted)) > len(wanted)  # more than one face per picture, on average
    if slow:  # `FilmSearch` searches fewer than 60 % of the pictures as a whole
        num_whole = sum(len(call.args) == 1 for call in searches.call_args_list)  # only an image
        assert num_whole - len(wanted) < 0.6 * len(wanted)  # without the calls `detector(rgb)`
