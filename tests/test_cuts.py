"""cuts: lists of the stretches that show a person, read back as the format CMX 3600 says."""

import re

import pytest

from vidjax.apps.video import cuts, pipeline
from vidjax.apps.video.appearances import Appearance
from vidjax.apps.video.features_folder import FileStamp, Film
from vidjax.utils.errors import UserError

NTSC = 30000 / 1001


def film(name, rate, seconds=100.0):
    source = FileStamp(address=f"/films/{name}", size=1, mtime_ns=0, inode=0)
    facts = {"video": name, "photo": rate is None, "seconds": seconds, "rate": rate}
    return Film(source=source, sha256="0" * 64, shots=[], tracks=[], frames=1, **facts)


def seen(film, start, end, name="Ada", probability: float | None = 0.9):
    return Appearance(film.video, start, end, name, probability, ("c",))


def read(path, base):
    """Returns (clip, begin, end) in frames of each event, whose records follow one another."""
    title, mode, *rest = path.read_text().splitlines()
    assert re.fullmatch(r"TITLE: (Ada|Bob) [\d.]+ fps", title) and mode == "FCM: NON-DROP FRAME"
    events, at = [], 0
    for number, (_, event, clip, source) in enumerate(zip(*[iter(rest)] * 4, strict=True), 1):
        fields = event.split()
        assert fields[:4] == [f"{number:03}", "AX", "AA/V", "C"]
        parts = [[*map(int, time.split(":"))] for time in fields[4:]]
        assert all(m < 60 and s < 60 and f < base for _, m, s, f in parts)
        times = [((h * 60 + m) * 60 + s) * base + f for h, m, s, f in parts]
        assert times[2:] == [at, at + times[1] - times[0]] and times[1] > times[0]
        at, name = times[3], clip.removeprefix("* FROM CLIP NAME: ")
        assert source == f"* SOURCE FILE: /films/{name}"
        events.append((name, *times[:2]))
    return events


def test_cut_list_contains_each_appearance_with_a_margin(tmp_path):
    """Margins end with the film, close appearances join, photos and unknown people are left out."""
    film_a, film_b = film("a.mp4", 25), film("b.mov", 24.99, 4000.0)
    photo = film("c.jpg", None, 0.0)
    appearances = [
        seen(film_a, 0.4, 3), seen(film_a, 4.9, 6), seen(film_a, 5.2, 5.5), seen(film_a, 98, 100),
        seen(film_a, 20, 30, "unknown 1", None), seen(film_a, 50, 51, "Bob"),
        seen(film_b, 3600.01, 3601), seen(photo, 0, 0),
    ]  # fmt: skip
    cuts.write(tmp_path, appearances, [film_a, film_b, photo], 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"Ada.edl", "Bob.edl"}
    assert read(tmp_path / "Ada.edl", 25) == [
        ("a.mp4", 0, 7 * 25), ("a.mp4", 97 * 25, 2500), ("b.mov", 3599 * 25, 3602 * 25)
    ]  # fmt: skip
    assert read(tmp_path / "Bob.edl", 25) == [("a.mp4", 49 * 25, 52 * 25)]


def test_cut_lists_are_split_by_frame_rate_and_length(tmp_path):
    """At 29.97 frames per second, a time code counts 30 frames per second."""
    for rate, exact, base in ((29.98, NTSC, 30), (30, 30, 30), (14.7, 24000 / 1001, 24)):
        source = film("a.mp4", rate, 5000.0)
        cuts.write(tmp_path, [seen(source, 1000, 2000)], [source], 0.0)
        (event,) = read(tmp_path / "Ada.edl", base)
        assert event == ("a.mp4", round(1000 * exact), round(2000 * exact))
    films = [film("a.mp4", NTSC), film("b.mp4", 25, 9000.0)]
    appearances = [seen(films[0], 1, 2)]
    appearances += [seen(films[1], 4 * n, 4 * n + 1) for n in range(cuts.MOST_EVENTS + 1)]
    cuts.write(tmp_path, appearances, films, 1.0)
    for name, base, count in (("29.97 fps", 30, 1), ("25 fps", 25, 999), ("25 fps part 2", 25, 1)):
        assert len(read(tmp_path / f"Ada {name}.edl", base)) == count


def test_each_person_has_a_cut_list_with_a_safe_file_name(tmp_path):
    long = "\U0001f600" * 300
    names = ["Ada", "ADA", "../Ada", "A/B", "A:B", ".Eve", "Dr.", "-v", long, f"{long}2", "Ada (2)"]
    source = film("a.mp4", 25)
    (tmp_path / "cuts").mkdir()
    cuts.write(tmp_path / "cuts", [seen(source, 1, 2, name) for name in names], [source], 1.0)
    files = [path.name for path in (tmp_path / "cuts").iterdir()]
    assert len({name.casefold() for name in files}) == len(names)
    assert all(len(name.encode()) <= 204 and not re.search(r"[/\\:]|^\.", name) for name in files)
    assert len([*tmp_path.iterdir()]) == 1


def test_error_of_a_misspelt_film_name_suggests_the_film(tmp_path):
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(UserError, match=r"no such file or folder\ndid you mean '.*holiday\.mp4'"):
        pipeline.list_files([tmp_path / "holidy.mp4"])
