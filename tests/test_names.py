"""A person has one name, in whatever Unicode form it comes; similar names are reported."""

import shlex
import shutil
import sqlite3
import unicodedata

import numpy as np
import pytest

from tests.helpers import clip_files, made_galleries
from tests.helpers.made_galleries import answers, make, make_clip
from tests.helpers.seen import refused
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import changes
from vidjax.apps.gallery import gallery as gallery_lib
from vidjax.apps.gallery import store as store_lib
from vidjax.apps.gallery.gallery import Gallery, Vectors
from vidjax.cli import program
from vidjax.data import labels, memory
from vidjax.data.untrusted import names
from vidjax.evaluation import ranking

NFC, NFD = (unicodedata.normalize(form, "Zoë Müller O'Brien") for form in ("NFC", "NFD"))
RLO, ZWSP, ZWNJ = "\u202e", "\u200b", "\u200c"


@pytest.mark.parametrize("name", [
    f"Ada{ZWSP}", f"A{RLO}da", "\u2066Ada\u2069", "Ada\ufeff", "A\xadda", f"{ZWNJ}Ada", "Ada\u200d",
    f"A {ZWNJ}da",
])  # fmt: skip
def test_invisible_letters_are_refused(name, tmp_path):
    refused(lambda: names.clean_identity(name), "identity '", "leave it out")
    gallery = make(tmp_path / "g")
    refused(lambda: gallery.rename("person 1", name), "invisible letter")
    refused(lambda: gallery.add({"x": make_clip(1, name)}), "invisible letter")
    vectors = Vectors(("x",), {"face": np.ones((1, 8), np.float32)}, (None,))
    refused(lambda: gallery.enrol(vectors, name), "invisible letter")
    refused(lambda: labels.load_label_table({"x": name}, {"train": ["x"]}), "labels: clip x")


@pytest.mark.parametrize(
    "name",
    [
        "\u0646\u06cc\u200c\u0645\u0627",
        "\u0915\u094d\u200d\u0937",
        "\U0001f469\u200d\U0001f467",
        NFC,
    ],
)
def test_joiners_between_letters_belong_to_a_name(name):
    assert names.clean_identity(name) == name


def test_every_border_gives_one_form(tmp_path):
    assert NFC != NFD and names.clean_identity(NFD) == NFC
    clips = {"train": ["x", "y"]}
    assert labels.load_label_table({"x": NFD, "y": NFC}, clips)["train"] == {"x": NFC, "y": NFC}
    table = tmp_path / "labels.csv"
    table.write_text(f"clip,identity\nx,{NFD}\ny,{NFC}\n")
    assert labels.load_label_table(table, clips)["train"] == {"x": NFC, "y": NFC}
    truth = tmp_path / "train_gt.txt"
    truth.write_text(f"x.mp4 {names.escape(NFD)}\ny.mp4 {names.escape(NFC)}\n")
    assert labels.load_ground_truth(truth) == {"x": NFC, "y": NFC}
    inverted = tmp_path / "val_gt.txt"
    inverted.write_text(f"{names.escape(NFD)} x.mp4\n{names.escape(NFC)} y.mp4\n")
    refused(lambda: labels.load_ground_truth(inverted), "already in line 1")
    groups = tmp_path / "unknown.tsv"
    groups.write_text(f"clip\tidentity\nx\t{NFD}\ny\t{NFC}\n")
    assert answers_lib.read_groups(groups) == {"x": NFC, "y": NFC}
    groups.write_text(f"clip\tidentity\nx\tAda{ZWSP}\n")
    refused(lambda: answers_lib.read_groups(groups), "unknown.tsv: line 2: identity")
    clip_files.write_npz(tmp_path / "photos", {NFD: {"1": {"face": np.ones((1, 4), np.float32)}}})
    clip_files.write_npz(tmp_path / "photos", {NFC: {"2": {"face": np.ones((1, 4), np.float32)}}})
    found, identity = memory.load_people(tmp_path / "photos", {"face": 4})
    assert identity == {f"{NFC}/1": NFC, f"{NFC}/2": NFC} and set(found.names) == {*identity}


def test_a_written_ranking_matches_a_ground_truth_in_another_form(tmp_path):
    truth, submission = tmp_path / "val_gt.txt", tmp_path / "ranking.txt"
    truth.write_text(f"{names.escape(NFD)} x.mp4\n")
    submission.write_text(f"{names.escape(NFC)} x.mp4\n")
    positives = ranking.read_ground_truth(truth)
    found = ranking.read_submission(submission, identities=positives)
    assert not found.faults and ranking.score(positives, found.ranking) == 1


def test_a_gallery_knows_one_person_in_both_forms(tmp_path, say):
    gallery = make(tmp_path / "g")
    gallery.add({"x": make_clip(1, NFD)})
    gallery.add({"y": make_clip(2, NFC)})
    assert gallery.identities[NFC] == 2 and NFD in gallery and NFC in gallery
    gallery.rename("person 1", NFD, merge=True)
    gallery.relabel("stranger 1", NFD)
    refused(lambda: gallery.relabel("x", NFD), "already")
    refused(lambda: gallery.rename(NFC, NFD), "this name already")
    assert say("gallery", "list", tmp_path / "g", f"--identity={NFD}", "--json")["identities"] == {
        NFC: gallery.identities[NFC]
    }
    said = say("gallery", "rename", tmp_path / "g", f"--identity={NFD}", f"--to={NFD} 2")
    assert "with 5 clips" in said
    said = say("gallery", "remove", tmp_path / "g", f"--identity={NFD} 2", "--json")
    assert said["removed"] == 5 and NFC not in gallery


def as_before(folder, clips, monkeypatch):
    """Makes a gallery as earlier versions did, with names in the forms in which they came."""
    with monkeypatch.context() as patch:
        patch.setattr(changes, "clean_identity", lambda name: name)
        patch.setattr(unicodedata, "is_normalized", lambda *_: True)
        patch.setattr(gallery_lib, "warn", lambda _: None)
        make(folder, clips)
    with sqlite3.connect(folder / store_lib.GALLERY_FILE) as file:
        return {name for (name,) in file.execute("SELECT name FROM person")}


def test_a_gallery_of_an_earlier_version_still_matches(tmp_path, monkeypatch):
    clips = made_galleries.make_clips()
    shown = {"x": make_clip(1, NFD), "y": make_clip(2, NFC), "z": make_clip(3, f"Ada{ZWSP}")}
    assert as_before(tmp_path / "g", clips | shown, monkeypatch) >= {NFC, NFD, f"Ada{ZWSP}"}
    cleaned = {name: one._replace(identity=NFC) for name, one in shown.items() if name != "z"}
    wanted = make(tmp_path / "wanted", clips | cleaned)
    gallery = Gallery(tmp_path / "g")
    assert gallery.identities[NFC] == 2 and NFD not in gallery.identities
    gallery.refresh()
    assert gallery.remove(identity=f"Ada{ZWSP}") == 1  # what is there may always be removed
    assert answers(Gallery(tmp_path / "g")) == answers(wanted)
    shutil.rmtree(tmp_path / "g")
    as_before(tmp_path / "g", clips | shown, monkeypatch)
    gallery = Gallery(tmp_path / "g")
    gallery.add({"new": make_clip(4, NFD)})  # the first change writes all
    with sqlite3.connect(tmp_path / "g" / store_lib.GALLERY_FILE) as file:
        people = {name for (name,) in file.execute("SELECT name FROM person")}
        persons = {name for (name,) in file.execute("SELECT DISTINCT person FROM clip")}
    assert NFC in people & persons and NFD not in people | persons
    assert Gallery(tmp_path / "g").remove(identity=NFD) == 3


@pytest.mark.parametrize(("one", "other"), [
    ("Ada Lovelace", "ADA  lovelace"), ("Sofi Groß", "so\ufb01 gross"), ("\uff21da", "Ada"),
    ("Zoë", "zoE\u0308"), ("Ada", "Ada\ufe0f"),
])  # fmt: skip
def test_names_that_look_alike_are_reported(one, other, tmp_path, command):
    gallery = make(tmp_path / "a gallery", {"x": make_clip(1, one)})
    vectors = Vectors(("y",), {"face": np.ones((1, 8), np.float32),
                               "audio": np.zeros((1, 5), np.float32)}, (None,))  # fmt: skip
    with pytest.warns(UserWarning, match="looks like") as told:
        done = gallery.enrol(vectors, other)
    new = names.clean_identity(other)
    assert done.similar == {new: one}
    said = str(told[0].message)
    assert one in said and new in said
    words = shlex.split(said.partition("the same: ")[2])
    assert words[0] == "vidjax" and program.main(words[1:]) == 0
    assert Gallery(tmp_path / "a gallery").identities == {one: 2}


def test_a_gallery_that_begins_with_similar_names_reports_one(tmp_path):
    with pytest.warns(UserWarning, match="'Eve' looks like 'EVE'.*\\(similar names: 2\\)"):
        make(tmp_path / "g", {str(n): make_clip(n, name) for n, name in
                              enumerate(("Ada", "ada", "Eve", "EVE", "Bo"))})  # fmt: skip
    gallery = Gallery(tmp_path / "g")
    with pytest.warns(UserWarning, match="looks like 'Bo'"):
        gallery.rename("Eve", "BO")
