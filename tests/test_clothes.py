"""Labels of clips by faces and clothes."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.helpers import drawn_people, made_nets
from vidjax import main as main_lib
from vidjax.data import arrays
from vidjax.errors import UserError
from vidjax.extract import cards
from vidjax.extract.folder import Film, Track
from vidjax.gallery import backend, clothes


def film(*clips, name="film.mp4"):
    """Returns a film with tracks of (clip, shot, begin, end)."""
    tracks = [Track(clip=c, shot=s, start_s=b, end_s=e, seen=2) for c, s, b, e in clips]
    return Film(video=name, sha256="0" * 64, photo=False, seconds=99, shots=[], tracks=tracks,
                frames=1)  # fmt: skip


def one_each(*clips):
    return film(*((clip, shot, 10 * shot, 10 * shot + 5) for shot, clip in enumerate(clips)))


def test_a_clip_without_a_face_inherits_the_name_of_its_clothes():
    named = {"a": "Ada", "b": "Ada", "c": None, "d": None}
    groups = {"a": "1", "b": "1", "c": "1", "d": "2"}
    found = clothes.label(named, groups, [one_each("a", "b", "c", "d")], ["c", "d"])
    assert found == ({"a": "Ada", "b": "Ada", "c": "Ada"}, {"c"}, {})


def test_the_majority_decides_and_the_minority_is_in_doubt():
    named = {"a": "Ada", "b": "Ada", "c": "Bob", "d": None}
    found = clothes.label(named, dict.fromkeys("abcd", "1"), [one_each(*"abcd")], ["d"])
    assert found.identities == {"a": "Ada", "b": "Ada", "c": "Bob", "d": "Ada"}
    assert found.doubts == {"c": "its clothes are Ada's, by 2 of 3"}


def test_without_a_majority_nobody_inherits():
    named = {"a": "Ada", "b": "Bob", "c": None}
    found = clothes.label(named, dict.fromkeys("abc", "1"), [one_each(*"abc")], ["c"])
    assert found.identities == {"a": "Ada", "b": "Bob"} and not found.inherited
    assert found.doubts.keys() == {"a", "b"}


def test_nobody_is_twice_in_a_picture():
    """Uniforms: who stands beside Ada is not Ada; who is seen before or after may be."""
    tracks = [("a", 0, 0, 5), ("beside", 0, 4, 8), ("after", 0, 6, 9), ("other_shot", 1, 0, 5)]
    named = {"a": "Ada", "beside": None, "after": None, "other_shot": None}
    found = clothes.label(named, dict.fromkeys(named, "1"), [film(*tracks)], list(named))
    assert found.inherited == {"after", "other_shot"}
    twins = film(("a", 0, 0, 5), ("left", 1, 0, 5), ("right", 1, 2, 5), ("later", 1, 6, 9))
    named = {"a": "Ada", "left": None, "right": None, "later": None}
    found = clothes.label(named, dict.fromkeys(named, "1"), [twins], list(named))
    assert found.inherited == {"later"}
    # Ada has two dresses, and is seen from behind in one of them only.
    dressed = {"a": "1", "left": "1", "b": "2", "right": "2"}
    named = {"a": "Ada", "left": None, "b": "Ada", "right": None}
    twins = film(("a", 0, 0, 5), ("left", 1, 0, 5), ("right", 1, 2, 5), ("b", 2, 0, 5))
    found = clothes.label(named, dressed, [twins], list(named))
    assert found.inherited == {"left"}


def test_little_evidence_is_in_doubt():
    named = {"a": "Ada", "b": None, "c": None}
    found = clothes.label(named, dict.fromkeys("abc", "1"), [one_each(*"abc")], ["b"])
    assert found.inherited == {"b", "c"}
    assert found.doubts == {
        "b": "one clip alone is dressed so",
        "c": "its face is nobody's, its clothes are Ada's",
    }


def test_films_do_not_vote_for_each_other():
    films = [one_each("a"), film(("b", 0, 0, 5), name="other.mp4")]
    found = clothes.label({"a": "Ada", "b": None}, {"a": "1", "b": "1"}, films, ["b"])
    assert found.identities == {"a": "Ada"}


def run(capsys, *words):
    code = main_lib.main([*map(str, words), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code == 0 else said.err


@pytest.fixture
def features(tmp_path, monkeypatch, capsys):
    """Extracts a film of Ada, the back of a head in her red, Ada again, and Eve, not in red."""
    pytest.importorskip("av")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(drawn_people.COLOURS, "Back", (255, 60, 0))
    models = drawn_people.write_models(tmp_path / "models")
    red = {"content": made_nets.detector((0.8, 0, 0))}
    made_nets.write(models, "head", "head_detector", **red)
    made_nets.write(models, "person", "body_detector", **red)
    back_end = {
        "centre": [0.0] * made_nets.WIDTH, "same": [0.95, 0.05], "different": [-0.4, 0.2],
        "pairs": [10, 10], "data": "drawn",
    }  # fmt: skip
    only_red = made_nets.colours() * np.eye(1, made_nets.WIDTH, dtype=np.float32)
    content = {"content": made_nets.embedder(weights=only_red), "input": {"mean": [170.0] * 3}}
    made_nets.write(models, "clothes", "body_embedder", back_end=back_end, **content)
    shots = [("Ada", 20, 30)], [("Back", 60, 40)], [("Ada", 80, 20)], [("Eve", 40, 50)]
    drawn = [(2, 20 + 15 * number, shot) for number, shot in enumerate(shots)]
    drawn_people.write_film(tmp_path / "film.mkv", *drawn)
    drawn_people.write_photo(tmp_path / "photos" / "ada.png", ("Ada", 40, 40))
    for source, out in (("film.mkv", "features"), ("photos", "ada")):
        code, _ = run(capsys, "extract", source, f"--out={out}", "--models=models")
        assert code == 0
    assert run(capsys, "gallery", "create", "g", "--models=models")[0] == 0
    assert run(capsys, "gallery", "enrol", "g", "--input=ada", "--identity=Ada")[0] == 0
    return tmp_path / "features"


def test_films_become_labelled_clips(features, tmp_path, capsys):
    words = ["gallery", "label", "g", "--input=features", "--out=labels.csv"]
    code, told = run(capsys, *words)
    assert code == 0, told
    assert (told["clips"], told["labelled"], told["by_clothes"], told["doubted"]) == (4, 3, 1, 0)
    with open("labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = ["film.s000.t00", "film.s001.t00", "film.s002.t00"]
    assert rows == [{"clip": clip, "identity": "Ada"} for clip in wanted]
    assert (tmp_path / "labels_doubts.tsv").read_text() == "clip\tidentity\tdoubt\n"
    code, said = run(capsys, *words)
    assert code == 2 and "labels.csv" in said
    # A clip that is no longer there has no label.
    (features / "film.s002.t00.npz").unlink()
    code, told = run(capsys, *words[:-1], "--out=fewer.csv")
    assert code == 0 and (told["clips"], told["labelled"], told["by_clothes"]) == (3, 2, 1), told


def test_extracted_folders_are_splits_to_train_on(features, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(features, tmp_path / "data" / split)
        (tmp_path / "data" / split / "thumbnails").mkdir()
    found = arrays.files_by_split(tmp_path / "data")
    assert {split: len(paths) for split, paths in found.items()} == {"train": 4, "val": 4}
    assert {path.suffix for paths in found.values() for path in paths} == {".npz"}
    (tmp_path / "data" / "val" / "extract.json").unlink()
    with pytest.raises(UserError, match="thumbnails: not a clip"):
        arrays.files_by_split(tmp_path / "data")


def test_clothes_of_another_net_are_refused(features, capsys):
    card = json.loads((features.parent / "models" / "clothes.json").read_text())
    other = card | {"notes": "changed"}
    (features.parent / "models" / "clothes.json").write_text(json.dumps(other))
    code, said = run(capsys, "gallery", "label", "g", "--input=features", "--out=labels.csv")
    assert code == 2 and "body vectors are of another model" in said
    (features.parent / "models" / "clothes.json").write_text(json.dumps(card | {"back_end": None}))
    code, said = run(capsys, "gallery", "label", "g", "--input=features", "--out=labels.csv")
    assert code == 2 and len(said.splitlines()) <= 3


def test_more_clips_than_all_pairs_can_be_compared_of_are_refused():
    card = cards.BackEnd(centre=[0.0], same=(0.9, 0.1), different=(0.0, 0.1), pairs=(1, 1),
                         data="made")  # fmt: skip
    with pytest.raises(UserError, match=r"8,001 clips(.|\n)*fewer"):
        backend.of_cards({"body": card}).odds([np.ones((8001, 1), np.float32)])
