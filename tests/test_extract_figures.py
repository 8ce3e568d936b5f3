"""Heads, bodies and the scene besides faces. Films and nets are made here."""

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import drawn_people, made_nets, seen
from tests.helpers.drawn_people import extract, write_film, write_photo
from vidjax.apps.gallery.gallery import make_models_origin
from vidjax.apps.video import cards, film

pytestmark = pytest.mark.usefixtures("read_here")
RED = {"content": made_nets.detector((0.8, 0, 0))}  # finds all but Eve, and the back of a head
BOTH = [("Ada", 20, 30), ("Back", 100, 60)]
EVE = ("Eve", 60, 10)


@pytest.fixture(autouse=True)
def _back(monkeypatch):
    monkeypatch.setitem(drawn_people.COLOURS, "Back", (255, 60, 0))


@pytest.fixture
def models(drawn):
    return drawn.models


def add(models, role, **fields):
    weights = made_nets.embedder(weights=made_nets.colours())
    content = {} if role.endswith("detector") else {"content": weights}
    return made_nets.write(models, role, role, **(content | fields))


def test_head_and_body_boxes_are_placed_relative_to_the_face(tmp_path, models):
    """A body is below the face, the head around it, and the scene is the whole picture."""
    add(models, "head_embedder", around=[-0.25, -0.25, 1.25, 1.25])
    add(models, "body_embedder", around=[0, 1, 1, 3])
    add(models, "scene_embedder")
    write_film(tmp_path / "film.mkv", (2, 20, BOTH[:1]))
    (clip,) = extract(tmp_path / "film.mkv", tmp_path / "out", models)[1].values()
    left, top, right, bottom = clip["face_box"].T
    side = right - left
    np.testing.assert_allclose(clip["head_box"][:, 0], left - side / 4, atol=1e-4)
    np.testing.assert_allclose(clip["body_box"].T, [left, bottom, right, top + 3 * side], atol=1e-4)
    assert np.all(clip["body"][:, :3] < 40), "the picture is dark below the face"
    mean = drawn_people.EMBED["input"]["mean"][0]
    assert np.all(clip["face"][:, 0] + mean > clip["head"][:, 0] + 20)
    assert np.all(clip["head"][:, 0] > clip["scene"][:, 0] + 20)
    assert not {"scene_box", "head_quality"} & clip.keys()
    for part in ("head", "body", "scene"):
        np.testing.assert_array_equal(clip[f"{part}_number"], clip["face_number"])


def test_head_detector_adds_tracks_without_faces_and_keeps_faces(tmp_path, models):
    """A head without a face gives a track; a face without a head stays a track."""
    path = tmp_path / "film.mkv"
    write_film(path, (2, 20, [*BOTH, EVE]))
    _, before = extract(path, tmp_path / "before", models)
    add(models, "head_detector", **RED)
    add(models, "head_embedder")
    extracted, clips = extract(path, tmp_path / "out", models)
    has = sorted(("face" in clip, "head" in clip) for clip in clips.values())
    assert has == [(False, True), (True, False), (True, True)]
    (back,) = (track for track in extracted.tracks if "face" not in clips[track.clip])
    assert back.box and abs(back.box[0] - 100 / 128) < 0.1, "the place of the head"
    faces = [clip for clip in clips.values() if "face" in clip]
    for old in before.values():
        (new,) = (clip for clip in faces if np.array_equal(clip["face"], old["face"]))
        for field, values in old.items():
            np.testing.assert_array_equal(new[field], values)
    write_photo(tmp_path / "photo.png", *BOTH)
    extracted, clips = extract(tmp_path / "photo.png", tmp_path / "photo", models)
    assert [track.clip for track in extracted.tracks] == ["photo"] and "face" in clips["photo"]


def test_each_detected_body_is_paired_with_the_head_inside(tmp_path, models):
    """Each of two detected bodies is given to a different person."""
    small = np.array([[10, 10, 20, 20], [40, 10, 50, 20], [90, 90, 95, 95]], np.float32)
    large = np.array([[0, 0, 55, 80], [35, 5, 60, 70], [0, 0, 5, 5]], np.float32)
    np.testing.assert_array_equal(film._pair_boxes(small, large), [0, 1, -1])
    add(models, "body_embedder")
    words = ("body_embedder.json", '"around"', "body_detector")
    seen.refused(lambda: film.load_nets(cards.load(models), 640), *words)
    add(models, "body_detector", **RED)
    write_film(tmp_path / "film.mkv", (2, 20, [BOTH[0], EVE]))
    _, clips = extract(tmp_path / "film.mkv", tmp_path / "out", models)
    assert sorted("body" in clip for clip in clips.values()) == [False, True]
    card = add(models, "body_embedder", around=[0, 1, 0, 2])
    seen.refused(lambda: cards.read(card), "body_embedder", "around")


def test_galleries_do_not_use_body_and_scene_embeddings(models):
    for part in ("head", "body", "scene"):
        add(models, f"{part}_embedder", back_end=made_nets.back_end())
    assert {*make_models_origin(models)[1]} == {"face", "head"}


def test_who_neither_names_nor_groups_tracks_without_a_face(drawn, recwarn):
    """Such a clip has no vector that the gallery compares."""
    drawn_people.write_voices(drawn.models)
    add(drawn.models, "head_detector", **RED)
    add(drawn.models, "head_embedder")
    drawn.befriend("Ada")
    write_film(drawn.folder / "film.mkv", (2, 20, [*BOTH, EVE]))
    drawn.who(drawn.folder / "film.mkv")
    assert sorted(row["identity"] or "" for row in drawn.rows()) == ["", "Ada", "unknown 1"]
    assert not [warning for warning in recwarn if "no clip has" in str(warning.message)]
