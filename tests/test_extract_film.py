"""film: which pictures of a track are kept, and when who is seen in films that change slowly."""

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import films
from tests.helpers.cases import quick_first
from tests.helpers.drawn_people import SIDE, extract, picture, write_film
from vidjax.apps.video import film

SLIDES = ("Ada", "Eve", "Ada", "Bob")
PEOPLE = {"Ada": (1, 1, -1), "Bob": (1, -1, 1), "Eve": (-1, 1, 1)}
nightly = pytest.mark.nightly


def read_tracks(path, models):
    """Returns begin, end and colour of each track of a film, in order of time."""
    extracted, clips = extract(path, path.with_suffix(""), models)
    rows = []
    for track in extracted.tracks:
        mean = clips[track.clip]["face"].mean(0)[:3]
        who = max(PEOPLE, key=lambda name, mean=mean: mean @ PEOPLE[name])
        rows.append((round(track.start_s, 3), round(track.end_s, 3), who))
    return rows


@pytest.mark.parametrize("fade_s", quick_first([1.0, 0.5, 3.0], mark=nightly))
def test_tracks_change_in_the_middle_of_a_crossfade(tmp_path, drawn, fade_s):
    """Slides of 4 s have faces in the same place, so no cut is detected."""
    still = [picture([(name, 50, 40)]).astype(float) for name in SLIDES]
    pictures = []
    for time_s in np.arange(160) / 10:
        at = int(time_s / 4)
        share = np.clip((time_s - 4 * (at + 1)) / fade_s + 0.5, 0, 0.5) if at < 3 else 0.0
        before = np.clip((4 * at - time_s) / fade_s + 0.5, 0, 0.5) if at else 0.0
        mixed = (1 - share - before) * still[at]
        mixed += share * still[min(at + 1, 3)] + before * still[max(at - 1, 0)]
        pictures.append(mixed.round().astype(np.uint8))
    films.write(tmp_path / "show.mkv", pictures, "ffv1", fps=10)
    tracks = read_tracks(tmp_path / "show.mkv", drawn.models)
    assert [who for _, _, who in tracks] == [*SLIDES]
    for number, (start_s, end_s, _) in enumerate(tracks):
        np.testing.assert_allclose((start_s, end_s), (4 * number, 4 * number + 4), atol=0.41)


@pytest.mark.parametrize("held_s", quick_first([1.0, 0.5, 4.0], mark=nightly))
@pytest.mark.parametrize("alike", [True, False])
def test_each_picture_of_a_slow_film_is_a_track_of_its_person(tmp_path, drawn, held_s, alike):
    slides = [picture([(name, 50, 40)]) for name in SLIDES]
    for number, slide in enumerate([] if alike else slides):
        np.maximum(slide, films.scene(number, 96, 128) // 4, out=slide)
    stamps = [round(1000 * held_s * n) for n in range(4)]
    films.write(tmp_path / "slides.mkv", slides, "ffv1", fps=1 / held_s, stamps=stamps)
    ends = [held_s * n for n in range(5)]
    wanted = [*zip(ends[:-1], ends[1:], SLIDES, strict=True)]
    assert read_tracks(tmp_path / "slides.mkv", drawn.models) == wanted


@pytest.mark.slow
def test_kept_faces_cover_the_whole_time_of_a_track(tmp_path, drawn):
    """In a film of ten minutes, the best faces are at the end."""
    kept = film.BestPictures()
    for number in range(15_000):
        kept.add(film.Sighting(number / 15_000, number, number / 25, number, 1.0, np.zeros(4), {}))
        assert len(kept.pictures()) <= film.MOST_KEPT
    times = [kept_picture.time_s for kept_picture in kept.pictures()]
    assert len(times) > film.MOST_KEPT / 2 and (np.diff(times) > 0).all()
    assert times[0] < 20 and np.diff(times).max() < 20
    write_film(tmp_path / "long.mkv", (30, 20, [("Ada", 0, 30)]), size=(96, 256))
    extracted, clips = extract(tmp_path / "long.mkv", tmp_path / "out", drawn.models)
    number = clips[extracted.tracks[0].clip]["face_number"]
    assert film.MOST_FRAMES / 2 < len(number) <= film.MOST_FRAMES and len(extracted.tracks) == 1
    assert number[0] < 20 and number[-1] > 280 and np.diff(number).max() < 25


@pytest.mark.parametrize("degrees", quick_first([90, 0], mark=nightly))
def test_box_of_a_track_is_the_box_of_its_best_face(tmp_path, drawn, degrees):
    """Boxes are fractions of the displayed picture at the time of the face."""
    pictures = [picture([("Ada", 16 + 2 * n, 40), ("Bob", 113, 72)]) for n in range(20)]
    stored = [np.rot90(x, -degrees // 90) for x in pictures]
    films.write(tmp_path / "film.mp4", stored, "mpeg4", fps=10, rotation=degrees)
    extracted, _ = extract(tmp_path / "film.mp4", tmp_path / "out", drawn.models)
    assert len(extracted.tracks) >= 2
    for track in extracted.tracks:
        assert track.box and track.box_at_s is not None
        assert track.start_s <= track.box_at_s < track.end_s
        left, top = (113, 72) if track.box[0] > 0.7 else (16 + 20 * track.box_at_s, 40)
        wanted = np.array([left, top, min(left + SIDE, 128), top + SIDE]) / np.tile([128, 96], 2)
        np.testing.assert_allclose(track.box, wanted, atol=0.02)


@pytest.mark.usefixtures("read_here")
@pytest.mark.parametrize("ending", quick_first([".mp4", ".ts"], mark=nightly))
def test_extract_warns_of_slow_films_and_unused_video_streams(tmp_path, drawn, ending):
    """The second stream is another camera; a cover picture gives no warning."""
    alone, both = tmp_path / f"alone{ending}", tmp_path / f"of both{ending}"
    films.write(alone, [picture([("Ada", 50, 40)])] * 3, "mpeg4", fps=1)
    films.double(alone, both, cover=ending == ".mp4")
    for path, count in ((alone, 0), (both, 1)):
        _, text = drawn.extract(path)
        assert "fewer than 2 pictures per second" in text
        assert text.count("  only the first of 2 video streams is used; ") == count
        assert text.count(f"ffmpeg -i '{both}' -map 0:V:1 -map 0:a? -c copy second.mkv") == count
