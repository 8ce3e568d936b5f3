"""A film is what it shows: its file may be moved, renamed, copied, turned, or get another title."""

import io
import os
import random
import shutil
import time
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import films, xmp
from tests.helpers.drawn_people import GROUP, picture, tags, write_film, write_photo
from tests.helpers.limits import slowness
from tests.helpers.seen import contents, refused
from vidjax.apps.video import align, decode, digests, film, media, pipeline
from vidjax.utils import files

Image = pytest.importorskip("PIL.Image")
ADA, BOB = [("Ada", 20, 30)], [("Bob", 60, 40)]


def identify(path):
    with decode.open_video(path) as video:
        return video.identify()


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libvpx-vp9", "ffv1"])
def test_digest_of_a_film_stays_equal_while_its_compressed_pictures_do(tmp_path, codec):
    paths = [tmp_path / f"film.{'mkv' if codec == 'ffv1' else 'mp4'}"]
    films.write(paths[0], [films.scene(n // 5) for n in range(40)], codec)
    for name in ("title.mp4", "a.mkv", "from mkv.mp4", "last.mov"):
        # QuickTime does not allow all encodings.
        if name != "last.mov" or codec not in ("libvpx-vp9", "ffv1"):
            films.remux(paths[-1], tmp_path / name, title=name, faststart=name == "title.mp4")
            paths.append(tmp_path / name)
    assert len({path.read_bytes() for path in paths}) == len(paths)
    assert len({identify(path) for path in paths}) == 1
    films.write(tmp_path / "other.mkv", [films.scene(n // 5) for n in range(39)], codec)
    assert identify(tmp_path / "other.mkv")[0] != identify(paths[0])[0]


def test_sound_does_not_change_the_digest_of_a_film(tmp_path):
    films.write(tmp_path / "a.mp4", [films.scene(0)] * 20)
    films.write(tmp_path / "b.mp4", [films.scene(0)] * 20, sound=np.zeros(8000))
    assert identify(tmp_path / "a.mp4") == identify(tmp_path / "b.mp4")


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_orientation_of_a_film_is_the_one_that_turns_its_pictures_upright(tmp_path, degrees):
    """The angle is clockwise, as phones write it: a phone that is held upright writes 90."""
    shown = films.scene(1, 96, 128)
    stored = np.rot90(shown, degrees // 90)
    films.write(tmp_path / "a.mp4", [np.ascontiguousarray(stored)], "mpeg4", rotation=-degrees)
    _, orientation = identify(tmp_path / "a.mp4")
    assert orientation == {0: 1, 90: 6, 180: 3, 270: 8}[degrees]
    np.testing.assert_array_equal(align.turn_picture(stored, orientation), shown)
    with decode.open_video(tmp_path / "a.mp4") as video:
        (frame,) = video.frames(5)
    assert frame.rgb is not None and np.abs(frame.rgb.astype(int) - shown).mean() < 10


def test_boxes_turn_with_their_picture():
    """`turn_box` marks the same pixels, is its own way back, and may be done in two steps."""
    rng, shown = np.random.default_rng(0), range(1, 9)
    corners = np.sort(rng.integers(0, 13, (4, 2, 2)) / 12, axis=1)
    for (left, top), (right, bottom) in corners.tolist():
        box = left, top, right - left, bottom - top
        marked = np.zeros((12, 24), bool)  # upright
        rows, columns = (np.round([a * n, b * n]).astype(int)
                         for a, b, n in ((top, bottom, 12), (left, right, 24)))  # fmt: skip
        marked[slice(*rows), slice(*columns)] = True
        for old in shown:
            stored = xmp.STORED[old](marked)
            for new in shown:
                turned = align.turn_box(box, old, new)
                upright = align.turn_picture(stored[..., None], new)[..., 0]
                place = np.array(turned) * np.tile(upright.shape[::-1], 2)
                x, y, width, height = place.round().astype(int)
                assert upright[y : y + height, x : x + width].all() and (
                    upright.sum() == width * height
                )
                np.testing.assert_allclose(align.turn_box(turned, new, old), box, atol=3e-6)
                for last in shown:
                    np.testing.assert_allclose(
                        align.turn_box(turned, new, last), align.turn_box(box, old, last), atol=3e-6
                    )


def save(rgb, ending, **options):
    """Returns the bytes of a photo."""
    content = io.BytesIO()
    Image.fromarray(rgb).save(content, ending, **options)
    return content.getvalue()


def digest(tmp_path, content):
    (tmp_path / "photo").write_bytes(content)
    return digests.digest_photo(tmp_path / "photo")


def metadata(number):
    """Returns options with which Pillow writes metadata into a photo."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 1 + number % 8, "words " * number  # orientation, description
    return {"exif": exif.tobytes()}


@pytest.mark.parametrize("ending", ["jpeg", "png", "webp"])
def test_digest_of_a_photo_ignores_metadata_and_what_follows_the_picture(tmp_path, ending):
    rgb, kinds = films.scene(0), [{}, {"progressive": True}] if ending == "jpeg" else [{}]
    for options in kinds:
        first, *others = (save(rgb, ending, **options, **metadata(n)) for n in range(4))
        assert len({first, *others}) == 4
        equal = [*others, first + b"a film in a photo" * 100, first + films.NO_FILMS["noise.mp4"]]
        if ending == "jpeg":
            equal += [save(rgb, ending, **options, comment=b"text"), first[:-2]]
            equal += [first[:-2] + b"\xff" * 5 + first[-2:], first + others[0]]
            equal += [first[:2] + b"\xff" * 3 + first[2:]]
        wanted = digest(tmp_path, first)
        assert [digest(tmp_path, content) for content in equal] == [wanted] * len(equal)
        changed = rgb.copy()
        changed[:9, :9] ^= 255
        assert digest(tmp_path, save(changed, ending, **options)) != wanted
        assert wanted != files.sha256_file(tmp_path / "photo")


def test_digest_of_a_png_ignores_how_its_pixels_are_divided_into_parts(tmp_path):
    content = save(films.scene(0), "png")
    start = content.index(b"IDAT") - 4
    length = int.from_bytes(content[start : start + 4])
    pixels = content[start + 8 : start + 8 + length]
    parts = [pixels[:50], pixels[50:]]
    made = b"".join(len(x).to_bytes(4) + b"IDAT" + x + bytes(4) for x in parts)
    divided = content[:start] + made + content[start + 12 + length :]
    assert digest(tmp_path, divided) == digest(tmp_path, content)


def test_damaged_photos_and_other_formats_have_the_digest_of_their_file(tmp_path):
    rng, whole = (
        random.Random(0),
        [save(films.scene(n), x) for n, x in enumerate(("jpeg", "png", "webp"))],
    )
    for content in whole:
        seen = {digest(tmp_path, content)}
        for number in range(300):
            place = rng.randrange(20, len(content))
            bad = bytearray(content[:place]) if number % 2 else bytearray(content)
            bad[rng.randrange(12, len(bad))] = rng.randrange(256)
            seen.add(digest(tmp_path, bytes(bad)))  # raises nothing
        assert None not in seen and len(seen) > 200
    for content in (whole[0][:3], whole[0][:30], whole[1][:30], whole[1][:8], whole[2][:40]):
        assert digest(tmp_path, content) == files.sha256_file(tmp_path / "photo")
    for ending in ("gif", "bmp", "tiff", "ppm", "avif", "jpeg2000"):
        made = digest(tmp_path, save(films.scene(0), ending))
        assert made == files.sha256_file(tmp_path / "photo")
    films.write(tmp_path / "a.mp4", [films.scene(0)])
    assert digests.digest_photo(tmp_path / "a.mp4") is None


def test_hostile_photos_are_digested_in_limited_time(tmp_path):
    begin = b"\xff\xd8\xff\xda\0\2"
    png = save(films.scene(0), "png")
    chunk, riff = bytes(4) + b"tEXt" + bytes(4), b"RIFF\xff\xff\xff\xff" + b"WEBP"
    for content in (
        begin + (b"\xff" * 1000 + b"\0") * 2000, begin + b"\xff" * 2_000_000 + b"\0",
        begin * 300_000, b"\xff\xd8" + b"\xff\x01" * 1_000_000,
        png[:33] + chunk * 300_000 + png[33:], riff + (b"VP8 " + bytes(4)) * 300_000,
    ):  # fmt: skip
        start = time.process_time()
        digest(tmp_path, content)
        assert time.process_time() - start < 0.5 * slowness()


class Features:
    """A folder of films, and a folder of features of these films."""

    def __init__(self, drawn):
        self.films, self.out, self.models = drawn.folder / "films", drawn.out, drawn.models
        self.films.mkdir()
        self.notes: list[str] = []
        self.read = 0  # number of files that the last call has read

    def write(self, name, faces=ADA, **options):
        """Writes a film of a second and returns its path."""
        write_film(self.films / name, (1, 20, faces), codec="mpeg4", **options)
        return self.films / name

    def extract(self, *paths, **options):
        """Returns the outcomes. By default, all films are extracted."""
        self.notes = []
        with mock.patch.object(film, "extract", wraps=film.extract) as read:
            found = pipeline.extract_files(
                paths or [self.films], self.out, self.models,
                tell=lambda note: self.notes.append(note.text), **options,
            )  # fmt: skip
        self.read = read.call_count
        return found

    def stored(self):
        """Returns stem -> description."""
        found = media.describe_media_files(self.out)
        assert {*found} == {path.stem for path in self.out.glob("*.npz")}
        for stem, x in found.items():
            assert all(track.clip.partition(".")[0] == stem for track in x.tracks)
        return found


@pytest.fixture
def folder(drawn, read_here):
    return Features(drawn)


@pytest.mark.parametrize("change", ["title", "faststart", "mkv", "mov", "name", "folder", "touch"])
def test_film_keeps_its_features_if_only_its_file_changes(folder, change):
    path = folder.write("a.mp4")
    folder.extract()
    before = contents(folder.out)
    ((stem, old),) = folder.stored().items()
    new = folder.films / {"mkv": "a.mkv", "mov": "a.mov", "name": "b.mp4"}.get(change, "a.mp4")
    kept = path.rename(folder.films.parent / "kept.mp4")
    if change == "folder":
        new = folder.films / "sub" / "c.mp4"
        new.parent.mkdir()
    films.remux(kept, new, title=change, faststart=change == "faststart")
    for check in (False, True, False):
        (outcome,) = folder.extract(check=check)
        assert outcome.kept and not outcome.copy and folder.read == 0 and not folder.notes
    ((now, media),) = folder.stored().items()
    assert now == stem and media.source.path == new and media.video == new.name
    assert (media.sha256, media.tracks, media.copies) == (old.sha256, old.tracks, [])
    after = contents(folder.out)
    assert before.keys() == after.keys() and before["a.npz"] == after["a.npz"]


def test_film_keeps_the_name_of_the_link_that_leads_to_it(folder):
    folder.write("a.mp4").rename(folder.films.parent / "0001.bin")
    (folder.films / "a.mp4").symlink_to("../0001.bin")
    for _ in range(2):
        (outcome,) = folder.extract()
        assert outcome.media.video == "a.mp4"


def test_film_whose_rotation_changes_is_read_again_under_its_stem(folder):
    path = folder.write("a.mp4")
    folder.extract()
    kept = path.rename(folder.films.parent / "kept.mp4")
    films.remux(kept, path, rotation=180)
    (outcome,) = folder.extract()
    assert not outcome.kept and folder.read == 1
    ((stem, media),) = folder.stored().items()
    assert (stem, media.orientation) == ("a", 3)
    films.remux(kept, folder.films / "turned.mp4", rotation=90)  # a copy that is turned otherwise
    outcomes = folder.extract()
    assert [x.copy for x in outcomes] == [False, True] and len(folder.notes) == 1
    path.unlink()
    (outcome,) = folder.extract()
    ((stem, media),) = folder.stored().items()
    assert (stem, media.orientation, media.video) == ("a", 8, "turned.mp4")


def test_copy_is_left_out_and_takes_the_place_of_its_original(folder):
    path = folder.write("a.mp4")
    copy = folder.films / "b.mkv"
    films.remux(path, copy, title="a copy")
    first, second = folder.extract()
    assert (first.copy, second.copy) == (False, True) and first.media is second.media
    assert folder.notes == [f"{copy} is a copy of {path} and is left out"]
    shutil.copy(path, folder.films / "c.mp4")
    folder.extract()
    assert len(folder.notes) == 1 and "c.mp4 is a copy of" in folder.notes[0]
    with mock.patch.object(film, "work", side_effect=AssertionError):
        outcomes = folder.extract()  # no file is opened
    assert [x.copy for x in outcomes] == [False, True, True] and not folder.notes
    (media,) = folder.stored().values()
    assert [x.path for x in media.stamps] == [path, copy, folder.films / "c.mp4"]
    path.unlink()
    copy.touch()
    for options in ({}, {"prune": True}):
        outcomes = folder.extract(**options)
        assert folder.read == 0 and all(x.kept for x in outcomes) and not folder.notes
        ((stem, media),) = folder.stored().items()
        assert stem == "a" and media.source.is_valid and path not in [x.path for x in media.stamps]
        assert {x.path for x in media.stamps} == {x.path for x in outcomes}
    (folder.films / "b.mkv").unlink()
    other = folder.write("d.mp4", BOB)
    folder.extract(other, prune=True)  # the film is not named in this call
    assert folder.stored()["a"].source.path == folder.films / "c.mp4"


def test_copies_of_one_call_are_read_once(folder):
    write_photo(folder.films / "Family" / "photo.png", *GROUP)
    for name in ("photo (1).png", "Ada/photo.png", "Bob/me.png"):
        (folder.films / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder.films / "Family" / "photo.png", folder.films / name)
    outcomes = folder.extract(workers=4)
    assert folder.read == 1 and [x.copy for x in outcomes] == [False, True, True, True]
    assert len(folder.notes) == 3 and len({id(x.media) for x in outcomes}) == 1
    ((stem, media),) = folder.stored().items()
    assert stem == "photo_1" and len(media.copies) == 3


def test_drive_that_is_not_connected_stays_a_place_of_its_film(folder):
    drive = folder.films / "drive"
    drive.mkdir()
    path = folder.write("drive/a.mp4")
    shutil.copy(path, folder.films / "b.mp4")
    folder.extract()
    away = drive.rename(folder.films.parent / "away")
    for prune in (False, True):
        (outcome,) = folder.extract(prune=prune)
        assert outcome.kept and outcome.media.source.path == folder.films / "b.mp4"
    away.rename(drive)
    with mock.patch.object(film, "work", side_effect=AssertionError):
        outcomes = folder.extract()
    assert {x.copy for x in outcomes} == {False, True} and not folder.notes
    assert len(folder.stored()) == 1


def test_other_film_at_an_old_path_leaves_the_features_of_the_earlier_film(folder):
    path = folder.write("a.mp4", ADA)
    (first,) = folder.extract()
    kept = shutil.copy(path, folder.films.parent / "kept.mp4")
    folder.write("a.mp4", BOB)
    (second,) = folder.extract()
    found = folder.stored()
    assert {*found} == {"a", f"a~{second.media.sha256[:8]}"} and not second.kept
    assert found["a"].tracks == first.media.tracks and not found["a"].source.is_valid
    names = {x.video: x.sha256 for x in media.read_media_files(folder.out)}
    shas = first.media.sha256, second.media.sha256
    assert names == {"a (earlier 1).mp4": shas[0], "a.mp4": shas[1]}
    (again,) = folder.extract()
    assert again.kept and again.media.sha256 == second.media.sha256
    # The earlier film comes back under another name.
    shutil.copy(kept, folder.films / "b.mp4")
    outcomes = folder.extract()
    assert [x.kept and not x.copy for x in outcomes] == [True, True] and folder.read == 0
    assert folder.stored()["a"].source.path == folder.films / "b.mp4"
    # Both exchange their places.
    os.replace(folder.films / "b.mp4", folder.films / "c.mp4")
    os.replace(path, folder.films / "b.mp4")
    os.replace(folder.films / "c.mp4", path)
    outcomes = folder.extract()
    assert folder.read == 0 and [x.media.tracks for x in outcomes] == [
        first.media.tracks, second.media.tracks,
    ]  # fmt: skip
    assert [x.media.source.path for x in outcomes] == [x.path for x in outcomes]


def test_prune_deletes_the_features_of_films_that_were_replaced(folder):
    folder.write("a.mp4", ADA)
    folder.extract()
    path = folder.write("a.mp4", BOB)
    folder.extract()
    (outcome,) = folder.extract(prune=True)
    assert folder.notes == [
        f"{path} was replaced by another film or photo: its results are deleted"
    ]
    assert [*folder.stored()] == [f"a~{outcome.media.sha256[:8]}"]
    # A film that cannot be read replaces nothing.
    path.write_bytes(b"damaged")
    (outcome,) = folder.extract(prune=True)
    assert outcome.error and len(folder.stored()) == 1


@pytest.mark.parametrize("seed", range(4))
def test_each_place_has_its_film_after_random_changes_of_files(folder, seed):
    """Files are written, renamed, exchanged, copied, edited and deleted between calls."""
    rng, made = random.Random(seed), folder.films.parent / "made"
    made.mkdir()
    for number in range(3):
        write_film(made / f"{number}.mp4", (0.5, 20, [("Ada", 20 + 20 * number, 30)]))
    for number in range(2):
        write_photo(made / f"{number}.png", ("Bob", 20 + 20 * number, 30))
    shown = {path.name: path.read_bytes() for path in made.iterdir()}
    places = [folder.films / name for name in ("a.mp4", "b.mp4", "c/a.mp4", "c/b.mp4")]
    (folder.films / "c").mkdir()
    now, stems = {}, {}  # place -> the film that it shows; film -> its stem

    def edit(path):
        """Adds a title to a film, or data to a photo."""
        if now[path].endswith("mp4"):
            films.remux(path, made / "edited.mp4", title=str(rng.random()))
            os.replace(made / "edited.mp4", path)
        else:
            path.write_bytes(path.read_bytes() + bytes(8))

    for _ in range(12):
        for _ in range(rng.randint(1, 4)):
            path, other = rng.sample(places, 2)
            action = rng.choice(["write", "write", "move", "copy", "delete", "edit", "exchange"])
            if action == "write":
                now[path] = rng.choice([*shown])
                path.unlink(missing_ok=True)
                path.write_bytes(shown[now[path]])
            elif path not in now:
                continue
            elif action == "edit":
                edit(path)
            elif action == "copy":
                shutil.copy(path, other)
                now[other] = now[path]
            elif action == "exchange" and other in now:
                os.replace(path, made / "kept")
                os.replace(other, path)
                os.replace(made / "kept", other)
                now[path], now[other] = now[other], now[path]
            else:
                os.replace(path, other if action == "move" else made / "gone")
                now = {**now, other: now[path]} if action == "move" else now
                del now[path]
        if not now:
            continue
        for first in (True, False):
            outcomes = folder.extract()
            assert folder.read == (len({*now.values()} - stems.keys()) if first else 0)
            found = folder.stored()
            stem_of = {media.sha256: stem for stem, media in found.items()}
            assert {x.path for x in outcomes} == now.keys() and len(stem_of) == len(found)
            for outcome in outcomes:
                media, name = outcome.media, now[outcome.path]
                assert stems.setdefault(name, stem_of[media.sha256]) == stem_of[media.sha256]
                assert found[stems[name]] == media and media.source.is_valid
                if outcome.copy:
                    assert outcome.path in [x.path for x in media.copies]
                else:
                    assert outcome.path == media.source.path and media.video == outcome.path.name
                (track,) = media.tracks
                assert track.box[0] * 128 == pytest.approx(20 + 20 * int(name[0]), abs=4)
                # A file in an empty folder may be on a drive that is not connected.
                assert all(x.is_valid or not [*x.path.parent.iterdir()] for x in media.stamps)
            assert {*stems.values()} == found.keys()
        assert not folder.notes


def test_new_films_of_one_name_have_different_stems(folder):
    for name, faces in {"a.mp4": ADA, "b/a.mp4": BOB, "c/A.mp4": ADA + BOB}.items():
        (folder.films / name).parent.mkdir(exist_ok=True)
        folder.write(name, faces)
    outcomes = folder.extract(workers=3)
    wanted = {"a", *(f"{x.path.stem}~{x.media.sha256[:8]}" for x in outcomes[1:])}
    assert folder.stored().keys() == wanted


def test_upgrade_reads_moved_films_under_their_stems(folder):
    path = folder.write("a.mp4")
    shutil.copy(path, folder.films / "copy.mp4")
    folder.extract()
    media.set_aside(folder.out)
    path.rename(folder.films / "b.mp4")
    outcomes = folder.extract()
    assert folder.read == 1 and [x.copy for x in outcomes].count(True) == 1
    assert [*folder.stored()] == ["a"] and not folder.notes


def test_names_of_clips_of_tagged_photos_contain_no_names_of_files(folder):
    """Photos in the folders of two people, which show the same, are one photo with two places."""
    place = folder.films
    write_photo(place / "Ada" / "Ada Smith.png", *GROUP)
    write_photo(place / "Bob" / "Bob.png", *GROUP, tagged=GROUP)  # the same picture with tags
    folder.write("Ada film.mp4", BOB)
    for _ in range(2):
        outcomes = folder.extract(tagged=True)
        assert len(outcomes) == 3 and not folder.notes
        found = folder.stored()
        assert found.keys() == {x.media.sha256[:16] for x in outcomes} and len(found) == 2
        group = [x.media for x in outcomes if x.path.suffix == ".png"]
        assert group[0] is group[1] and group[0].tags == {"Ada", "Bob"}
        assert {x.path for x in group[0].stamps} == {*place.glob("*/*.png")}
    assert folder.read == 0


def test_tags_of_a_photo_are_read_again_if_its_picture_stays_the_same(folder):
    path = folder.films / "Ada" / "1.png"
    write_photo(path, *GROUP)
    folder.extract(tagged=True)
    for number, tagged in enumerate((GROUP, GROUP[:1])):
        write_photo(path, *GROUP, tagged=tagged)
        (outcome,) = folder.extract(tagged=True)
        assert outcome.media.tags == {name for name, *_ in tagged} and folder.read == 1, number
    (path.parent / "1.png.xmp").write_bytes(tags(GROUP[1]))
    (outcome,) = folder.extract(tagged=True)
    assert outcome.media.tags == {"Bob"}
    path.touch()
    (outcome,) = folder.extract(tagged=True)
    assert outcome.kept and folder.read == 0


def test_photo_with_other_metadata_is_a_copy_unless_it_is_turned(folder):
    rgb, names = picture(GROUP), ("a.jpg", "b.jpg", "turned.jpg")
    for name, orientation, words in zip(names, (1, 1, 3), ("", "edited", ""), strict=True):
        exif = Image.Exif()
        exif[0x112], exif[0x10E] = orientation, words
        Image.fromarray(rgb).save(folder.films / name, quality=95, exif=exif)
    outcomes = folder.extract()
    assert [x.copy for x in outcomes] == [False, True, True]
    (media,) = folder.stored().values()
    assert [x.path.name for x in media.stamps] == ["a.jpg", "b.jpg"]
    for name in names[:2]:
        (folder.films / name).unlink()
    (outcome,) = folder.extract()
    assert (outcome.kept, outcome.media.orientation, [*folder.stored()]) == (False, 3, ["a"])


def test_folder_of_an_earlier_version_is_refused_and_stays_as_it_is(folder):
    folder.write("a.mp4")
    folder.extract()
    path = folder.out / "extract.json"
    path.write_text(path.read_text().replace('"format": 4', '"format": 3'))
    before = contents(folder.out)
    line = refused(folder.extract, "earlier version of vidjax: name a new folder")
    assert "\n" not in line and contents(folder.out) == before
