"""Face tags in the XMP of photos: each photo program and file format, and hostile tags."""

import io
import time

import numpy as np
import pytest

from tests.helpers import xmp
from tests.helpers.cases import nightly_after_first
from tests.helpers.limits import slowness
from vidjax.apps.video import regions

Image = pytest.importorskip("PIL.Image")
TAGS = [("Ada", 0.25, 0.5, 0.2, 0.4), ("Bob Müller & Co", 0.7, 0.4, 0.1, 0.2)]
SPELLED = [(name.replace("&", "&amp;"), *box) for name, *box in TAGS]
EVE = ("Eve", 0.5, 0.5, 0.1, 0.1)
MWG = xmp.packet(xmp.attributes(SPELLED))
BOMB = '<!DOCTYPE x [<!ENTITY a "{}"><!ENTITY b "{}"><!ENTITY c "{}">]>'.format(
    "Ada" * 1000, "&a;" * 1000, "&b;" * 1000
).encode()
DEEP = xmp.packet("<MPRI:Regions><rdf:li>" * 60_000 + "</rdf:li></MPRI:Regions>" * 60_000)
FACES = np.array([[60, 90, 130, 160], [200, 30, 280, 90]])  # in a picture of 400 x 300 pixels


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
        parsed = tags_of(xmp.packet(body, wrapper="xmp" if microsoft else "x"))
        assert boxes(parsed) == TAGS and not parsed.problem, body
        # The tags of Microsoft lack the width and height of the picture. MWG tags contain them.
        assert parsed.shape == (None if microsoft else (400, 300))


def photo(kind, packet):
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


@nightly_after_first("kind", ["jpeg", "png", "tiff", "webp", "heif"], 2)
def test_face_tags_are_read_from_each_photo_format(tags_of, kind):
    assert boxes(tags_of(photo(kind, MWG))) == TAGS
    assert tags_of(photo(kind, xmp.packet(""))).tags == []


def test_face_tags_are_read_from_both_ends_of_photos(tags_of):
    # Only the first and the last 2 MB of a photo are searched.
    rest = b"\0" * (9 << 20)
    assert boxes(tags_of(MWG + rest)) == boxes(tags_of(rest + MWG)) == TAGS
    first = photo("jpeg", xmp.packet("<MP:RegionInfo/>"))  # its XMP has no face tag
    assert boxes(tags_of(first + photo("jpeg", MWG))) == TAGS


def test_face_tags_of_sidecars_replace_the_tags_of_a_photo(tags_of, tmp_path):
    """The sidecars of a.jpg are a.jpg.xmp and a.xmp. The first one that can be read is used."""
    for sidecar, packet, tags, problem in (
        ("a.xmp", xmp.packet(""), TAGS, ""),  # a.xmp has no tags
        ("a.xmp", xmp.packet(xmp.elements([EVE])), [EVE], ""),
        ("a.jpg.xmp", MWG, TAGS, ""),  # a.jpg.xmp comes before a.xmp
        ("a.jpg.xmp", b"<rdf:RDF RegionList", [EVE], "the face tags in a.jpg.xmp cannot be"),
    ):
        (tmp_path / sidecar).write_bytes(packet)
        parsed = tags_of(photo("jpeg", MWG))
        assert boxes(parsed) == tags
        assert problem in parsed.problem and bool(parsed.problem) == bool(problem)
    assert [x.name for x in regions.list_sidecars(tmp_path / "a.jpg")] == ["a.jpg.xmp", "a.xmp"]


def test_sidecar_that_is_a_link_or_whose_name_is_too_long_is_not_read(tags_of, tmp_path):
    own = photo("jpeg", MWG)
    (tmp_path / "a.jpg.xmp").symlink_to("/etc/passwd")
    parsed = tags_of(own)
    assert boxes(parsed) == TAGS and "is a link" in parsed.problem
    # The name has 255 bytes, the most that file systems allow, so a name with .xmp is too long.
    assert boxes(tags_of(own, "b" * 251 + ".jpg")) == TAGS


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


# Name -> (function that returns the content, problem, number of tags that are read).
HOSTILE = {
    "entities": (lambda: BOMB + xmp.packet(xmp.elements([("&c;", *EVE[1:])])), "undefined", 0),
    "100 MB": (lambda: b"<rdf:RDF Region" + b" " * 100_000_000, "does not end within", 0),
    "many packets": (lambda: b"<rdf:RDF></rdf:RDF>" * 1_000_000, "", 0),
    "deep": (lambda: DEEP, "", 0),
    "prefix": (lambda: MWG.replace(b"mwg-rs:Name", b"mwg:Name"), "unbound prefix", 0),
    "10,000": (lambda: xmp.packet(xmp.attributes([EVE] * 10_000)), "more than 500 face tags", 500),
    "a large packed one": (lambda: photo("png", b" " * 50_000_000 + MWG), "", 0),
}


@pytest.mark.parametrize(("content", "problem", "count"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_or_damaged_tags_give_one_line_in_limited_time(tags_of, content, problem, count):
    hostile, begin = content(), time.process_time()
    parsed = tags_of(hostile)
    assert time.process_time() - begin < 5 * slowness()
    assert len(parsed.tags) == count and problem in parsed.problem
    assert "\n" not in parsed.problem and bool(parsed.problem) == bool(problem)


@pytest.mark.parametrize("tagged", ["stored", "shown"])
@pytest.mark.parametrize("shape_is_known", [True, False])
def test_tags_of_a_rotated_photo_match_their_faces(tagged, shape_is_known):
    """Programs tag the stored or the displayed picture. FACES refer to the displayed picture."""
    for orientation, stored in xmp.STORED.items():
        tags, shape = [], (0, 0)  # the shape of the tagged picture
        for number, (left, top, right, bottom) in enumerate(FACES):
            picture = np.zeros((300, 400))
            picture[top:bottom, left:right] = 1
            # `stored` rotates or mirrors the displayed picture.
            drawn = stored(picture) if tagged == "stored" else picture
            (y, x), (height, width) = np.nonzero(drawn), drawn.shape
            box = x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height
            tags.append(regions.Tag(str(number), box))
            shape = width, height

        made = regions.Tags(tags, shape if shape_is_known else None)
        # Tag 0 gets face 0, and tag 1 gets face 1.
        assert regions.match_faces(made, FACES, (400, 300), orientation).tolist() == [0, 1]
        # Without faces, both tags get -1.
        assert regions.match_faces(made, FACES[:0], (400, 300), orientation).tolist() == [-1, -1]
    assert regions.match_faces(regions.Tags([]), FACES, (400, 300), 6).tolist() == []


def test_recorded_shape_of_the_picture_decides_which_faces_match_tags():
    # The tag is at the top left. In the stored picture of 300 x 400 pixels, the face is at the top
    # left, too. In the displayed picture of 400 x 300 pixels, the face is at the top right. If the
    # shape is not known or is a square, the picture with more matches counts: the stored picture.
    face = np.array([[280, 30, 360, 90]])
    for shape, matches in ((None, [0]), ((300, 400), [0]), ((400, 300), [-1]), ((300, 300), [0])):
        tags = regions.Tags([regions.Tag("Ada", (0.1, 0.1, 0.3, 0.3))], shape)
        found = regions.match_faces(tags, face, size=(400, 300), orientation=6)
        assert found.tolist() == matches, shape


def test_each_face_matches_at_most_one_tag_and_the_best_pairs_come_first():
    """Tags 0, 1 and 2 cover face 0, and tag 2 fits it best. Only tag 0 covers face 1."""
    boxes = [(0, 0, 1, 1), (0.1, 0.1, 0.4, 0.5), (0.14, 0.29, 0.33, 0.54), (0.6, 0.6, 0.9, 0.9)]
    tags = regions.Tags([regions.Tag(str(number), box) for number, box in enumerate(boxes)])
    face_of_each_tag = regions.match_faces(tags, FACES, size=(400, 300), orientation=1)
    assert face_of_each_tag.tolist() == [1, -1, 0, -1]
