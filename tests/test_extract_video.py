"""Decoding of films and photos: times, rotation, sound, face tags, damaged and hostile files."""

import io
import itertools
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="needs the extra [video]")

from tests.helpers import films, seen, xmp
from tests.helpers.limits import slowness
from vidjax.apps.video import decode, pictures, regions

Image = pytest.importorskip("PIL.Image")
CODECS = {"mp4": "libx264", "mkv": "ffv1", "mov": "mpeg4", "webm": "libvpx-vp9", "avi": "mpeg4",
          "ts": "libx264", "mpg": "mpeg1video", "wmv": "wmv2", "flv": "flv1"}  # fmt: skip
PHOTOS = [(ending, 6) for ending in ("heic", "jpg", "avif", "tiff", "png", "webp")]
PHOTOS += [("jpg", orientation) for orientation in (1, 2, 3, 4, 5, 7, 8)]
# Face tags: name, x and y of the middle, width, height.
TAGS = [("Ada", 0.25, 0.5, 0.2, 0.4), ("Bob Müller & Co", 0.7, 0.4, 0.1, 0.2)]
SPELLED = [(name.replace("&", "&amp;"), *box) for name, *box in TAGS]
EVE = ("Eve", 0.5, 0.5, 0.1, 0.1)
MWG = xmp.packet(xmp.attributes(SPELLED))
BOMB = b'<!DOCTYPE x [<!ENTITY a "%b"><!ENTITY b "%b"><!ENTITY c "%b">]>'
BOMB %= b"Ada" * 1000, b"&a;" * 1000, b"&b;" * 1000
DEEP = xmp.packet("<MPRI:Regions><rdf:li>" * 20_000 + "</rdf:li></MPRI:Regions>" * 20_000)


def corner():
    """Returns a picture of 120 x 160 pixels, grey with a red corner at its top left."""
    picture = np.full((120, 160, 3), 90, np.uint8)
    picture[:40, :50] = (250, 0, 0)
    return picture


def red_corners(rgb):
    """Returns the numbers of the red corners, clockwise from 0 at the top left."""
    corners = rgb[[10, 10, -10, -10], [10, -10, -10, 10]].astype(int)
    return np.flatnonzero(corners[:, 0] - corners[:, 1] > 80).tolist()


def read(path, fps=5):
    """Returns all frames of a film, and the video. `fps` frames per second have a picture `rgb`."""
    with decode.open_video(path) as video:
        return list(video.frames(fps)), video


def refused(path, message):
    return seen.refused(lambda: pictures.read_photo(path) or read(path), message)


@pytest.fixture
def film(tmp_path):
    films.write(tmp_path / "film.mkv", [films.scene(n) for n in range(60)], "ffv1")
    return tmp_path / "film.mkv"


@pytest.mark.parametrize(("ending", "codec"), CODECS.items())
def test_each_film_format_gives_the_same_times_and_pictures(tmp_path, ending, codec):
    films.write(tmp_path / f"a.{ending}", [corner()] * 30, codec)
    frames, video = read(tmp_path / f"a.{ending}")
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(30) / 25, atol=0.002)
    assert [n for n, frame in enumerate(frames) if frame.rgb is not None] == [0, 5, 10, 15, 20, 25]
    for frame in frames:
        assert frame.small.shape == (36, 64, 3) and frame.small.dtype == np.uint8
        assert frame.rgb is None or red_corners(frame.rgb) == [0]
    assert (video.counts.frames, video.counts.corrupt, video.counts.damaged) == (30, 0, False)
    assert video.counts.seconds == pytest.approx(1.2, abs=0.002)


def test_pictures_are_decoded_in_the_thread_of_the_caller(film):
    """The system may refuse other threads (`ulimit -u`). Then pictures would be lost."""
    with decode.open_video(film) as video:
        before = len(os.listdir("/proc/self/task"))
        frames = video.frames(5)
        next(frames)
        assert len(os.listdir("/proc/self/task")) <= before


# The stored pictures have a width of 160. An aspect ratio of 64 is ignored as a mistake.
@pytest.mark.parametrize(("options", "place", "shape"), [
    ({"rotation": 90}, 3, (160, 120)), ({"rotation": 180}, 2, (120, 160)),
    ({"rotation": -90}, 1, (160, 120)), ({"aspect": 2.0}, 0, (120, 320)),
    ({"aspect": 0.5}, 0, (120, 80)), ({"aspect": 64.0}, 0, (120, 160)),
])  # fmt: skip
def test_pictures_are_turned_upright_and_stretched_to_their_aspect(tmp_path, options, place, shape):
    films.write(tmp_path / "a.mp4", [corner()] * 3, "mpeg4", **options)
    (frame, *_), _ = read(tmp_path / "a.mp4")
    assert frame.rgb is not None and frame.rgb.shape == (*shape, 3)
    assert red_corners(frame.rgb) == [place]


@pytest.mark.parametrize(("ending", "orientation"), PHOTOS)
def test_photos_of_each_orientation_and_format_are_decoded_upright(tmp_path, ending, orientation):
    """The photos have colour profiles, as cameras and editors write them."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    from PIL import ImageCms

    shown, path = films.scene(3, 96, 128), tmp_path / f"photo.{ending}"
    photo = Image.fromarray(np.ascontiguousarray(xmp.STORED[orientation](shown)))
    exif = photo.getexif()
    exif[0x112] = orientation  # the number of this field in EXIF
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save(path, exif=exif.tobytes(), icc_profile=profile, quality=95)
    rgb = films.read_photo(path)
    assert pictures.read_orientation(path) == orientation
    assert rgb.shape == shown.shape and np.abs(rgb.astype(int) - shown).mean() < 6


def test_only_orientations_from_1_to_8_are_read(tmp_path):
    for number in range(10):
        stored = np.ascontiguousarray(xmp.STORED.get(number, xmp.STORED[1])(corner()))
        (tmp_path / "a.jpg").write_bytes(films.photo(stored, "mjpeg", orientation=number))
        rgb = films.read_photo(tmp_path / "a.jpg")
        orientation = pictures.read_orientation(tmp_path / "a.jpg")
        assert orientation == (number if 1 <= number <= 8 else 1)
        assert rgb.shape == (120, 160, 3) and red_corners(rgb) == [0]


def test_animation_is_read_as_a_photo_of_its_first_picture(tmp_path):
    pictures = [Image.fromarray(np.ascontiguousarray(x)) for x in (corner(), corner()[::-1])]
    for name in ("a.gif", "a.png", "a.webp", "a.avif", "a.tiff"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
        assert red_corners(films.read_photo(tmp_path / name)) == [0]


def swapped_profile():
    """Returns an ICC profile that shows red as blue, and blue as red."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"swap").replace(b"bXYZ", b"rXYZ").replace(b"swap", b"bXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "Made".encode("utf-16-be"))


def test_colours_of_each_kind_of_photo_are_shown_as_in_viewers(tmp_path):
    red, grey, dim, white = (250, 0, 0), (90,) * 3, (75,) * 3, (255,) * 3
    rgb = Image.fromarray(corner())
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(corner()[..., 0] == 90, 0, 255).astype(np.uint8)))
    deep, palette = Image.fromarray(corner()[..., 0].astype(np.uint16) * 257), rgb.quantize(4)
    # Name -> photo, options, colours of its top left corner and of the rest.
    for name, (photo, options, first, rest) in {
        "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 100}, red, grey),
        "palette.png": (palette, {}, red, grey), "grey.png": (rgb.convert("L"), {}, dim, grey),
        "alpha.png": (clear, {}, red, white), "alpha.webp": (clear, {}, red, white),
        "palette_alpha.png": (palette, {"transparency": palette.getpixel((159, 119))}, red, white),
        "16.png": (deep, {}, (250,) * 3, grey), "16.tiff": (deep, {}, (250,) * 3, grey),
        "a.ppm": (rgb, {}, red, grey), "damaged.png": (rgb, {"icc_profile": b"x" * 200}, red, grey),
        "swapped.png": (rgb, {"icc_profile": swapped_profile()}, (0, 0, 250), grey),
        "bit.png": (rgb.point(lambda x: 255 * (x > 80)).convert("1"), {}, (0,) * 3, white),
    }.items():  # fmt: skip
        photo.save(tmp_path / name, **options)
        shown = films.read_photo(tmp_path / name).astype(int)
        assert shown.shape == (120, 160, 3), name
        for place, colour in (((5, 5), first), ((-5, -5), rest)):
            assert np.abs(shown[place] - colour).max() <= 3, (name, place)


# The number of bytes at the end that may be missing. WebP and BMP have no checksum of the pixels.
@pytest.mark.parametrize(("ending", "mark"), {"jpg": 2, "png": 12, "webp": 0, "bmp": 0}.items())
def test_cut_or_damaged_photo_is_refused_but_its_last_mark_may_be_missing(tmp_path, ending, mark):
    path = tmp_path / f"photo.{ending}"
    Image.fromarray(films.scene(3, 480, 640)).save(path)
    content, whole = path.read_bytes(), films.read_photo(path)
    half, bad = len(content) // 2, [content[: len(content) * 9 // 10]]
    if mark:
        bad += [content[:half] + bytes(200) + content[half + 200 :], content[:half] + bytes(half)]
        bad += [content[:-mark] + bytes(mark + 100)] * (ending == "jpg")
        path.write_bytes(content[:-mark])
        assert (films.read_photo(path) == whole).all()
    for damaged in bad:
        path.write_bytes(damaged)
        refused(path, "damaged photo")


def test_large_jpeg_photos_are_reduced_and_other_large_photos_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MOST_PIXELS", 60 * 80)
    large, exif = films.scene(3, 240, 320), Image.Exif()
    for orientation, shape in {6: (80, 60), 1: (60, 80)}.items():
        exif[0x112] = orientation
        Image.fromarray(large).save(tmp_path / "a.jpg", quality=95, exif=exif)
        assert films.read_photo(tmp_path / "a.jpg").shape == (*shape, 3)
    reduced = large.reshape(60, 4, 80, 4, 3).mean((1, 3))
    assert np.abs(films.read_photo(tmp_path / "a.jpg") - reduced).mean() < 4
    Image.fromarray(films.scene(3, 250, 320)).save(tmp_path / "b.jpg")  # too large for a quarter
    Image.fromarray(large).save(tmp_path / "a.png")
    refused(tmp_path / "b.jpg", "320 x 250 pixels, more than the limit of 4,800")
    refused(tmp_path / "a.png", "320 x 240 pixels, more than the limit of 4,800")


def test_heic_photos_that_are_films_or_too_large_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    films.write(tmp_path / "film.mp4", [corner()])
    content = (tmp_path / "film.mp4").read_bytes().replace(b"ftypisom", b"ftypheic")
    (tmp_path / "photo.heic").write_bytes(content)
    refused(tmp_path / "photo.heic", "damaged photo")
    Image.fromarray(films.scene(1)).save(large := tmp_path / "large.heic")
    monkeypatch.setattr(decode, "MOST_PIXELS", 1000)
    refused(large, "pixels, more than")
    for package, needed in {"pillow_heif": "pillow-heif", "av": "av", "PIL": "PIL and av"}.items():
        monkeypatch.setitem(sys.modules, package, None)
        refused(large, f"needs {needed}: install it with pip install 'vidjax[video]'")


def test_uneven_times_from_the_first_to_the_end_of_the_last_frame_are_kept(tmp_path):
    times_ms = np.array([0, 10, 20, 30, 500, 510, 1000, 1900, 1910, 2000])
    for name, atol in {"late.ts": 1, "late.mkv": 1e-3}.items():
        stamps = (60_000 + times_ms).tolist()  # the first frame is at 60 s
        films.write(tmp_path / name, [films.scene(0)] * 10, stamps=stamps)
        frames, video = read(tmp_path / name, fps=2)
        np.testing.assert_allclose([x.time_s * 1000 for x in frames], times_ms, atol=atol)
        sampled = [round(frame.time_s * 1000) for frame in frames if frame.rgb is not None]
        assert sampled == [0, 500, 1000, 1900, 2000]  # the first frame in each half second
        assert video.counts.repaired == 0 and not video.counts.damaged
    films.write(tmp_path / "slides.mp4", [corner()] * 20, "mpeg4", held_ms=6000)
    _, video = read(tmp_path / "slides.mp4")
    assert video.counts.seconds == pytest.approx(19 / 25 + 6, abs=0.05)  # the last frame: 6 s
    assert not video.counts.damaged


def test_pipes_devices_folders_sound_and_huge_pictures_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.mp4", tmp_path / "device.mp4", tmp_path):
        refused(path, "not opened")
    films.write(tmp_path / "voice.m4a", [], sound=np.zeros(8000))
    refused(tmp_path / "voice.m4a", "give a video")
    data = bytearray(films.photo(np.zeros((10, 10, 3), np.uint8), "bmp"))
    data[18:26] = np.array([60_000, 60_000], "<i4").tobytes()  # width and height
    (tmp_path / "huge.bmp").write_bytes(data)
    refused(tmp_path / "huge.bmp", "60000 x 60000 pixels")


def test_bad_time_stamps_are_repaired():
    # Time stamps of frames, repaired times, and the number of repairs. A repair moves all later
    # time stamps, too, and counts once.
    for stamps, times, repaired in (
        ([0.0, 0.1, 0.5], [0.0, 0.1, 0.5], 0),
        ([None, None, None], [0.0, 0.1, 0.2], 3),
        ([0.0, 0.1, 0.1, 0.3], [0.0, 0.1, 0.2, 0.4], 1),
        ([5.0, 5.1, 0.0, 0.1], [5.0, 5.1, 5.2, 5.3], 1),  # two films, one after the other
        ([0.0, 0.1, 1e9, 1e9 + 0.1], [0.0, 0.1, 0.2, 0.3], 1),  # after `latest_s`
        ([-4e-7, 0.1], [0.0, 0.1], 0),  # the start of the file was rounded up
        ([-0.5, -0.4, 0.3], [0.0, 0.1, 0.8], 1),
    ):
        counts = decode.DecodeCounts(seconds=0.0, frames=0)
        clock = decode.Clock(counts, step_s=0.1, latest_s=10.0)
        np.testing.assert_allclose([clock.time(stamp) for stamp in stamps], times, atol=1e-6)
        assert counts.repaired == repaired


def steps(*parts, step=40):
    """Returns time stamps in milliseconds: `count` stamps from each `begin`."""
    return [begin + step * n for begin, count in parts for n in range(count)]


TWO = steps((0, 20), (183_000, 20))
# Time stamps -> jumps (seconds and length) in MKV, and in TS.
JUMPS = {
    "once": (TWO, [(0.8, 182.2)], [(0.8, 182.2)]),
    "twice": (
        [*TWO, *steps((400_000, 9))], [(0.8, 182.2), (183.8, 216.2)], [(0.8, 182.2), (1.6, 216.2)],
    ),
    "after the first picture": (steps((0, 1), (180_000, 20)), [(0.04, 179.96)], [(0.04, 179.96)]),
    "late start": ([60_000 + x for x in TWO], [(0.8, 182.2)], [(0.8, 182.2)]),
    "pause of 9 s": (steps((0, 20), (9_700, 20)), [], []),
    "slides of uneven lengths": ([0, 3000, 11_000, 13_000, 33_000, 38_000, 58_000, 59_500], [], []),
    "one long slide": ([*steps((0, 5), step=4000), *steps((90_000, 5), step=4000)], [], []),
    "two slides": ([0, 12_000, 12_040], [], []),
    "time lapse": (steps((0, 9), (30_000, 9), step=1000), [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPS)
@pytest.mark.parametrize("ending", ["mkv", "ts"])
def test_jumps_of_the_clock_are_found_and_removed_only_in_broadcasts(tmp_path, name, ending):
    stamps, *expected = JUMPS[name]
    path, is_ts = tmp_path / f"film.{ending}", ending == "ts"
    films.write(path, [films.scene(0)] * len(stamps), CODECS[ending], stamps=stamps)
    frames, video = read(path)
    np.testing.assert_allclose(video.counts.jumps, expected[is_ts] or np.zeros((0,)), atol=2e-3)
    times = np.array(stamps, float) / 1000 - stamps[0] / 1000
    for at, by in expected[1] if is_ts else ():
        times[times > at + by / 2] -= by
    np.testing.assert_allclose([frame.time_s for frame in frames], times, atol=2e-3)
    ends = [frame.gap_s for frame in frames if frame.gap_s < frame.time_s]
    np.testing.assert_allclose(ends, [] if is_ts else [at for at, _ in expected[0]], atol=2e-3)
    assert not video.counts.repaired and not video.counts.damaged


def test_undamaged_frames_of_a_truncated_or_damaged_film_are_read(film):
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 3])
    frames, video = read(film)
    assert 0 < len(frames) < 30 and video.counts.damaged, "a third of the bytes: about 20 frames"
    assert video.info.seconds == pytest.approx(2.4, abs=0.05)  # of 60 frames at 25 per second
    films.write(film, [films.scene(n) for n in range(60)])  # in H.264
    content, rng = bytearray(film.read_bytes()), np.random.default_rng(0)
    # Flips 15 bits outside the header and the index. A bit may damage several frames.
    for place in rng.integers(2000, len(content) - 2000, 15):
        content[place] ^= 1 << rng.integers(8)
    film.write_bytes(content)
    frames, video = read(film)
    lost = video.counts.corrupt + video.counts.refused
    assert len(frames) == video.counts.frames > 20
    assert lost > 0 and len(frames) + lost == pytest.approx(60, abs=10)


@pytest.mark.parametrize("name", films.NO_FILMS)
def test_file_that_is_not_a_film_is_refused(tmp_path, name):
    films.write(tmp_path / "secret.mkv", [films.scene(0)])  # some files of NO_FILMS refer to it
    (tmp_path / name).write_bytes(films.NO_FILMS[name])
    error = refused(tmp_path / name, name)
    assert ("an empty file" if name == "empty.mp4" else "MP4") in error
    assert ("copy the file again" in error) == (Path(name).suffix not in (".txt", ".psd"))


def test_list_of_addresses_connects_to_nobody(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        (tmp_path / "a.m3u8").write_text(films.PLAYLIST.format(address))
        refused(tmp_path / "a.m3u8", "damaged")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_damaged_file_of_a_known_format_is_to_be_copied_again(tmp_path):
    films.write(tmp_path / "a.mp4", [films.scene(0)])
    whole = (tmp_path / "a.mp4").read_bytes()
    at = whole.index(b"stts") + 8  # the number of time stamps, which becomes two billion
    many = whole[:at] + b"\x7f" * 4 + whole[at + 4 :]
    cut = dict.fromkeys(("cut.mp4", "cut", "1.jpg"), whole[:100])
    for name, content in (cut | {"many.mp4": many}).items():
        (tmp_path / name).write_bytes(content)
        assert "use MP4" not in refused(tmp_path / name, "copy the file again"), name


def test_file_names_are_not_read_as_patterns_or_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(films.photo(corner(), "png"))
    for name in ("%d.png", "concat:1.png", "-", "file:1.png"):
        for function in (read, pictures.read_photo):
            with pytest.raises(FileNotFoundError):
                function(Path(name))
    # The pattern %d.png would match 1.png, whose corner is red.
    (tmp_path / "%d.png").write_bytes(films.photo(films.scene(0), "png"))
    assert red_corners(films.read_photo(Path("%d.png"))) == []


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_sound_follows_its_time_stamps_to_its_end(tmp_path, rate):
    """The sound of 1 s begins at 0.85 s with a tone of half a second."""
    path, end = tmp_path / "film.mkv", 0
    samples = np.sin(np.arange(rate) / rate * 2 * np.pi * 440) * 0.5
    samples[rate // 2 :] = 0
    films.write(path, [films.scene(0)] * 50, sound=samples, rate=rate, start_s=0.85)
    heard = np.zeros(32_000, np.float32)  # 2 s with 16,000 samples per second
    with decode.open_video(path) as video:
        assert video.info.sound
        for time_s, block in video.sound():
            start = round(time_s * 16_000)
            end = start + len(block)
            heard[start:end] = block
    assert end == pytest.approx(1.85 * 16_000, abs=1) and not video.counts.refused
    times = np.arange(32_000) / 16_000
    np.testing.assert_allclose(times[np.abs(heard) > 0.2][[0, -1]], [0.85, 1.35], atol=0.003)
    within = (times > 0.87) & (times < 1.25)
    tone = 0.5 * np.sin((times[within] - 0.85) * 2 * np.pi * 440)
    np.testing.assert_allclose(heard[within], tone, atol=0.1)


def test_pictures_that_grow_beyond_the_limit_are_left_out(tmp_path, monkeypatch):
    """Two MPEG streams of different sizes, one after the other, are one film."""
    path, content = tmp_path / "grows.ts", b""
    for height, width in ((120, 160), (480, 640)):
        films.write(path, [films.scene(0, height, width)] * 10)
        content += path.read_bytes()
    path.write_bytes(content)
    for limit, widths, lost in ((decode.MOST_PIXELS, {160, 640}, 0), (200 * 200, {160}, 10)):
        monkeypatch.setattr(decode, "MOST_PIXELS", limit)
        frames, video = read(path, fps=25)
        assert {frame.rgb.shape[1] for frame in frames if frame.rgb is not None} == widths
        assert video.counts.refused == lost


@pytest.fixture
def tags_of(tmp_path):
    """Returns a function: bytes of a photo -> face tags, and why tags cannot be read."""

    def read(content, name="a.jpg"):
        (tmp_path / name).write_bytes(content)
        return regions.read_tags(tmp_path / name)

    return read


def boxes(parsed):
    """Returns tags as (name, x and y of the middle, width, height)."""
    return [
        (name, *np.round([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 6))
        for name, (left, top, right, bottom) in parsed.tags
    ]


def test_face_tags_of_each_photo_program_are_read(tags_of):
    for body in (
        xmp.attributes(SPELLED) + xmp.microsoft([EVE]),  # digiKam; the tags of MWG have priority
        xmp.attributes(SPELLED, unit=""),  # Lightroom
        xmp.elements(SPELLED, bag="Bag").replace('"', "'"),  # Apple and ExifTool
        xmp.elements(SPELLED, resource=""),  # each value in an rdf:Description
        xmp.microsoft(SPELLED),
        xmp.microsoft(SPELLED, as_elements=True),
    ):
        microsoft = "mwg-rs" not in body
        parsed = tags_of(xmp.packet(body, wrapper="xmp" if microsoft else "x"))  # both are read
        assert boxes(parsed) == TAGS and not parsed.problem, body
        # The tags of Microsoft lack the width and height of the picture. MWG tags contain them.
        assert parsed.shape == (None if microsoft else (400, 300))


def tagged_photo(kind, packet):
    """Returns the bytes of a photo in the format `kind` with the XMP `packet`."""
    file, picture = io.BytesIO(), Image.new("RGB", (64, 48))
    options = {"xmp": packet}
    if kind == "png":
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": (info := PngInfo())}
        info.add_itxt("XML:com.adobe.xmp", packet.decode(), zip=True)
    elif kind == "tiff":
        options = {"tiffinfo": {700: packet}}  # TIFF has XMP in the tag 700
    elif kind == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp", "heif"])
def test_face_tags_are_read_from_each_photo_format(tags_of, kind):
    assert boxes(tags_of(tagged_photo(kind, MWG))) == TAGS
    assert tags_of(tagged_photo(kind, xmp.packet(""))).tags == []


def test_face_tags_are_read_from_both_ends_of_photos(tags_of):
    # Only the first and the last 2 MB of a photo are searched.
    rest = b"\0" * (9 << 20)
    assert boxes(tags_of(MWG + rest)) == boxes(tags_of(rest + MWG)) == TAGS
    first = tagged_photo("jpeg", xmp.packet("<MP:RegionInfo/>"))  # its XMP has no face tag
    assert boxes(tags_of(first + tagged_photo("jpeg", MWG))) == TAGS


def test_face_tags_of_sidecars_replace_the_tags_of_a_photo(tags_of, tmp_path):
    """The first file with readable tags is used: a.jpg.xmp, a.xmp, or the photo a.jpg."""
    own = tagged_photo("jpeg", MWG)
    for sidecar, packet, tags, problem in (
        ("a.xmp", xmp.packet(""), TAGS, ""),  # a.xmp has no tags
        ("a.xmp", xmp.packet(xmp.elements([EVE])), [EVE], ""),
        ("a.jpg.xmp", MWG, TAGS, ""),  # a.jpg.xmp comes before a.xmp
        ("a.jpg.xmp", b"<rdf:RDF RegionList", [EVE], "the face tags in a.jpg.xmp cannot be"),
    ):
        (tmp_path / sidecar).write_bytes(packet)  # next to the sidecars of earlier rows
        parsed = tags_of(own)
        assert boxes(parsed) == tags
        assert problem in parsed.problem and bool(parsed.problem) == bool(problem)
    (tmp_path / "a.jpg.xmp").unlink()
    (tmp_path / "a.jpg.xmp").symlink_to("/etc/passwd")
    parsed = tags_of(own)
    assert boxes(parsed) == [EVE] and "in a.jpg.xmp cannot be read" in parsed.problem
    # The name has 255 bytes, the most that file systems allow, so a name with .xmp is too long.
    assert boxes(tags_of(own, "b" * 251 + ".jpg")) == TAGS


def long_namespace(size, declared='xmlns:u="{}"', begin="", name="<u:a/>"):
    """Returns XMP of `size` bytes. Half of it is an address that a parser copies for each name."""
    half, inner = size // 2, name * (size // 2 // len(name))
    return xmp.packet(f"<a {begin} {declared.format('n' * half)}>{inner}</a><MP:Regions/>")


def test_invalid_face_tags_and_tags_of_pets_are_ignored(tags_of):
    """Tags need a name and a box inside the picture. Names are returned in NFC."""
    box = EVE[1:]
    bad = [  # (name, x and y of the middle, width, height), as shares of the picture
        ("", *box), (" ", *box), ("Unknown", *box), ("a" * 401, *box),
        ("nan", "NaN", 0.5, 0.1, 0.1), ("inf", 0.5, 0.5, "inf", 0.1), ("word", "x", 0.5, 0.1, 0.1),
        ("none", "", "", "", ""), ("negative", 0.5, 0.5, -0.1, -0.1), ("zero", 0.5, 0.5, 0, 0),
        ("pixels", 200, 150, 40, 30), ("outside", 1.2, 0.5, 0.1, 0.1), ("left", -0.1, 0.5, 0.5, 1),
    ]  # fmt: skip
    for body in (
        xmp.attributes(bad), xmp.elements(bad), xmp.attributes([EVE], kind="Pet"),
        xmp.attributes([EVE], unit=' stArea:unit="pixel"'),
    ):  # fmt: skip
        assert tags_of(xmp.packet(body)).tags == []
    parsed = tags_of(xmp.packet(xmp.elements([(" Zoe\u0308 ", *box), ("A\u200eda", *box)])))
    assert [tag.name for tag in parsed.tags] == ["Zo\u00eb"]
    assert "a.jpg: identity 'A\\u200eda' contains the invisible letter" in parsed.problem


ENDLESS = "cannot be read: an XMP namespace has"
QUOTES = "".join(f'y{n}="=\'"' for n in range(300))
LONG = "n=xmlns:" * 100_000  # long values and texts are usual: they may contain pictures
# Name -> (function that returns the content, problem, number of tags that are read).
HOSTILE = {
    "namespace": (lambda: long_namespace(500_000), ENDLESS, 0), "deep": (lambda: DEEP, "", 0),
    "namespace of 4 MB": (lambda: long_namespace(4_000_000), ENDLESS, 0),
    "namespace of an attribute": (
        lambda: long_namespace(500_000, "xmlns:u\n=\n'{}'", name='<a u:b=""/>'), ENDLESS, 0),
    "default": (lambda: long_namespace(500_000, "xmlns = '\">{}'", name="<a/>"), ENDLESS, 0),
    "quotes": (lambda: long_namespace(500_000, begin="""x='="' y="='">" """), ENDLESS, 0),
    "more quotes": (lambda: long_namespace(500_000, begin=QUOTES), ENDLESS, 0),
    "long values": (lambda: xmp.packet(
        f'<a MP:b="{LONG}" MP:c=\'{LONG}\'>d="{LONG}"</a>{xmp.attributes(SPELLED)}'), "", 2),
    "entities": (lambda: BOMB + xmp.packet(xmp.elements([("&c;", *EVE[1:])])), "undefined", 0),
    "100 MB": (lambda: b"<rdf:RDF Region" + b" " * 100_000_000, "does not end within", 0),
    "many packets": (lambda: b"<rdf:RDF></rdf:RDF>" * 1_000_000, "", 0),
    "prefix": (lambda: MWG.replace(b"mwg-rs:Name", b"mwg:Name"), "unbound prefix", 0),
    "10,000": (lambda: xmp.packet(xmp.attributes([EVE] * 10_000)), "more than 500 face tags", 500),
    "a large packed one": (lambda: tagged_photo("png", b" " * 20_000_000 + MWG), "", 0),
}  # fmt: skip


@pytest.mark.parametrize(("content", "problem", "count"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_or_damaged_tags_give_one_line_in_limited_time(tags_of, content, problem, count):
    hostile, begin = content(), time.process_time()
    parsed = tags_of(hostile)
    assert time.process_time() - begin < (0.5 if problem == ENDLESS else 5) * slowness()
    assert len(parsed.tags) == count and problem in parsed.problem
    assert "\n" not in parsed.problem and bool(parsed.problem) == bool(problem)


# Ada and Bob, in a picture of 400 x 300 pixels: their heads are at one height, a little above the
# middle, and at nearly the same distance from the sides. `TIED` faces are exactly symmetric.
SIDE_BY_SIDE = np.array([[60, 90, 130, 180], [250, 95, 320, 185]])
TIED = np.array([[60, 105, 140, 195], [260, 105, 340, 195]])
TURNED, SHAPE = "its tags fit only if the photo is turned or mirrored", "picture of another shape"


def judge(faces, drawn_in, orientation, *, known=True, scale=1.0, hidden=()):
    """Returns the faces at the tags of all `faces`, and why the tags are not believed.

    The tags are drawn in the picture that the orientation `drawn_in` displays as upright, and are
    `scale` times as large as the faces. The photo has the EXIF `orientation`. If `known`, the tags
    contain the shape. `hidden` faces are not detected.
    """
    middle, half = (faces[:, :2] + faces[:, 2:]) / 2, (faces[:, 2:] - faces[:, :2]) / 2 * scale
    tags, shape = [], (0, 0)
    for left, top, right, bottom in np.hstack([middle - half, middle + half]).round().astype(int):
        picture = np.zeros((300, 400), bool)
        picture[top:bottom, left:right] = True
        stored = xmp.STORED[drawn_in](picture)  # rotates or mirrors the displayed picture
        (y, x), shape = np.nonzero(stored), stored.shape[::-1]
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / np.tile(shape, 2)
        tags.append(regions.Tag(str(len(tags)), tuple(box.tolist())))
    made = regions.Tags(tags, shape if known else None), np.delete(faces, hidden, 0), (400, 300)
    found, problem = regions.match_faces(*made, orientation)
    return found.tolist(), problem


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tags_are_believed_if_they_fit_in_the_stored_or_the_displayed_picture(orientation):
    for known, scale in itertools.product((True, False), (0.5, 1, 2)):
        options = {"known": known, "scale": scale}
        for drawn_in in {1, orientation}:
            assert judge(SIDE_BY_SIDE, drawn_in, orientation, **options) == ([0, 1], "")
            assert judge(SIDE_BY_SIDE[:1], drawn_in, orientation, **options) == ([0], "")
        assert judge(SIDE_BY_SIDE, 1, orientation, hidden=(0, 1), **options)[0] == [-1, -1]
    assert regions.match_faces(regions.Tags([]), TIED, (400, 300), 6)[0].tolist() == []


@pytest.mark.parametrize(("faces", "drawn_in", "orientation", "options", "problem"), [
    # Both readings give different names to two faces, and fit equally.
    *((TIED, 1, o, {}, regions.TWO_WAYS) for o in (2, 3)),
    *((TIED, o, o, {}, regions.TWO_WAYS) for o in (2, 3)),
    (TIED, 1, 4, {}, ""), (TIED[:1], 1, 2, {}, ""),
    (TIED, 1, 1, {}, ""),  # no program would mirror the boxes of an upright picture
    # The photo was turned or mirrored after it was tagged, and EXIF was not changed.
    (SIDE_BY_SIDE, 3, 1, {}, TURNED),
    (SIDE_BY_SIDE, 4, 1, {}, ""),  # all readings that fit give the same names
    *((SIDE_BY_SIDE, o, 1, {}, SHAPE) for o in (5, 6, 7, 8)),
    *((SIDE_BY_SIDE, o, 1, {"known": False}, TURNED) for o in (3, 5, 6, 7, 8)),
    (SIDE_BY_SIDE, 1, 1, {"hidden": [1], "scale": 2}, ""),  # one of two faces was not detected
])  # fmt: skip
def test_tags_with_two_fits_or_none_are_refused(faces, drawn_in, orientation, options, problem):
    found, reason = judge(faces, drawn_in, orientation, **options)
    assert problem in reason and bool(reason) == bool(problem)
    right = [-1 if n in options.get("hidden", []) else n for n in range(len(faces))]
    assert found == ([-1] * len(faces) if problem else right)


@pytest.mark.parametrize(("shape", "size", "orientation", "fits"), [
    ((4000, 3000), (400, 300), 1, True), ((400, 300), (400, 301), 1, True),
    ((4000, 3000), (33, 25), 1, True), ((4000, 3000), (33, 26), 1, False),
    ((300, 400), (400, 300), 1, False), ((300, 400), (400, 300), 6, True),
    ((400, 300), (400, 300), 6, True), ((300, 410), (400, 300), 6, False),
])  # fmt: skip
def test_tags_of_a_picture_of_another_shape_are_not_believed(shape, size, orientation, fits):
    tags = regions.Tags([regions.Tag("Ada", (0.45, 0.45, 0.55, 0.55))], shape)
    face = np.array([[0.45, 0.45, 0.55, 0.55]]) * np.array(size * 2)
    found, problem = regions.match_faces(tags, face, size, orientation)
    assert found.tolist() == [0 if fits else -1] and (SHAPE in problem) == (not fits)


def test_each_face_matches_at_most_one_tag_and_the_best_pairs_come_first():
    """Tags 0, 1 and 2 cover face 0, and tag 2 fits it best. Only tag 0 covers face 1."""
    boxes = [(0, 0, 1, 1), (0.1, 0.1, 0.4, 0.5), (0.14, 0.29, 0.33, 0.54), (0.6, 0.6, 0.9, 0.9)]
    faces = np.array([[60, 90, 130, 160], [200, 30, 280, 90]])
    found = regions._pair_boxes(np.array(boxes) * (400, 300, 400, 300), faces)
    assert found.tolist() == [1, -1, 0, -1]
