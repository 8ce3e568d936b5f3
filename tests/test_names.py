"""Names: Unicode forms (NFC writes ë as one letter, NFD as two), invisible and similar letters."""

import shlex
import unicodedata

import numpy as np
import pytest

from tests.helpers import clip_files
from tests.helpers.made_galleries import add, make, make_clip, vectors_of
from tests.helpers.seen import refused
from vidjax.apps.gallery import changes
from vidjax.apps.gallery.gallery import Gallery
from vidjax.cli import program
from vidjax.data import labels, memory
from vidjax.evaluation import ranking
from vidjax.utils import names

NFC, NFD = (unicodedata.normalize(form, "Zoë Müller O'Brien") for form in ("NFC", "NFD"))


def test_names_with_invisible_letters_or_outer_blanks_are_refused(tmp_path):
    refused(lambda: names.clean_identity("Ada "), "identity 'Ada '", "remove these blanks")
    for name in ("A\u202eda", "Ada\ufeff", "A\xadda", "A \u200cda", "Ada\u200d", "Ada\u200b"):
        refused(lambda x=name: names.clean_identity(x), "identity '", "remove this letter")
    # All functions that accept names of people refuse a name with an invisible letter.
    gallery, invisible = make(tmp_path / "g"), "Ada\u200b"
    vectors = vectors_of(gallery, {"x": make_clip(1, None)})
    for call in (
        lambda: gallery.rename("person 1", invisible),
        lambda: add(gallery, {"x": make_clip(1, invisible)}),
        lambda: gallery.enrol(vectors, invisible),
    ):  # fmt: skip
        refused(call, "invisible letter")
    refused(lambda: labels.load_label_table({"x": invisible}, {"train": ["x"]}), "labels: clip x")
    # Invisible joiners between letters of some scripts, or between emojis, belong to a name.
    joined = "\u0646\u06cc\u200c\u0645\u0627 \u0915\u094d\u200d\u0937 \U0001f469\u200d\U0001f467"
    for name in (NFC, *joined.split()):
        assert names.clean_identity(name) == name


def test_two_forms_of_a_name_are_one_person_in_ground_truth_and_rankings(tmp_path):
    """`test_every_table_that_names_people_warns_once_and_keeps_the_names` reads other tables."""
    nfd, nfc = map(names.escape, (NFD, NFC))  # a blank becomes %20
    for name, lines in {
        "val_gt.txt": f"{nfd} x.mp4\n{nfc} y.mp4\n",  # a line lists the clips of a person
        "truth.txt": f"{nfd} x.mp4\n",
        "ranking.txt": f"{nfc} x.mp4\n",
    }.items():
        (tmp_path / name).write_text(lines)
    refused(lambda: labels.load_ground_truth(tmp_path / "val_gt.txt"), "already in line 1")
    positives = ranking.read_ground_truth(tmp_path / "truth.txt")
    loaded = ranking.read_submission(tmp_path / "ranking.txt", positives=positives)
    assert not loaded.complaints and ranking.score(positives, loaded.ranking) == 1


def test_names_of_photo_folders_become_nfc_and_hidden_files_are_ignored(tmp_path):
    face = {"face": np.ones((1, 4), np.float32)}
    clip_files.write_npz(tmp_path, {NFD: {"1": face}, NFC: {"2": face}})
    for hidden in (".trash/x.npz", f"{NFC}/._2.npz"):  # macOS and others write such files
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    loaded, identity = memory.load_people(tmp_path, {"face": 4})
    assert identity == {f"{NFC}/1": NFC, f"{NFC}/2": NFC} and set(loaded.names) == {*identity}
    (tmp_path / NFC / "3.npy").touch()
    refused(lambda: memory.load_people(tmp_path, {"face": 4}), "3.npy' would be ignored")
    refused(lambda: memory.load_people(tmp_path / "gone", {}), "gone' does not exist: correct")


def test_gallery_treats_nfc_and_nfd_names_as_one_person(tmp_path, say, monkeypatch):
    gallery = make(tmp_path / "g")
    add(gallery, {"x": make_clip(1, NFD), "y": make_clip(2, NFC)})
    assert gallery.identities[NFC] == 2 and NFD in gallery and NFC in gallery
    gallery.rename("person 1", NFD, merge=True)  # 2 more clips
    gallery.relabel("stranger 1", NFD)  # the fifth clip
    refused(lambda: gallery.relabel("x", NFD), f"already belongs to '{NFC}'")
    refused(lambda: gallery.rename(NFC, NFD), f"the person is already called '{NFC}'")
    words = (gallery.folder, f"--identity={NFD}", "--json")
    assert say("gallery", "list", *words)["identities"] == {NFC: 5}
    assert say("gallery", "remove", *words)["removed"] == 5 and NFC not in gallery
    monkeypatch.setattr(changes, "clean_identity", lambda name: name)  # the file gets an NFD name
    refused(lambda: make(tmp_path / "nfd", {"x": make_clip(1, NFD)}), "has invalid letters")


@pytest.mark.parametrize(("name", "other"), [
    ("Ada Lovelace", "ADA  lovelace"), ("Sofi Groß", "so\ufb01 gross"),  # \ufb01 is the ligature fi
    ("Ada", "Ada\ufe0f"),  # \ufe0f is invisible
])  # fmt: skip
def test_similar_names_get_a_warning_with_the_command_to_merge_them(name, other, tmp_path):
    gallery = make(tmp_path / "a gallery", {"x": make_clip(1, name)})
    with pytest.warns(UserWarning, match="looks like .* another person\n") as caught:
        done = gallery.enrol(vectors_of(gallery, {"y": make_clip(2, None)}), other)
    new, message = names.clean_identity(other), str(caught[0].message)
    assert done.similar == {new: name} and name in message and new in message
    words = shlex.split(message.partition("the same: ")[2])
    assert words[0] == "vidjax" and program.main(words[1:]) == 0  # merges them
    assert Gallery(gallery.folder).identities == {name: 2}
    with pytest.warns(UserWarning, match=r"another person \(similar names: 2\)\n"):
        make(tmp_path / "b", {x: make_clip(1, x) for x in (name, new, name.lower())})


FOREIGN = ("Who?", 'A: "B"*', "CON", "com1.x", "Ada.", ".Eve", "a/b", "50%", "%41da", "Zo\u00eb")


def test_names_of_files_and_folders_are_allowed_on_all_drives():
    long = "\U0001f600" * 300
    *stems, one, two = names.make_file_stems([*FOREIGN, "ada", "ADA", long, f"{long}2"])
    assert one != two and max(len(one.encode()), len(two.encode())) <= 200
    assert stems == [
        "Who_", "A_ _B__", "CON_", "com1_.x", "Ada_", "_Eve", "a_b", "50%", "%41da", "Zo\u00eb",
        "ada", "ADA (2)",
    ]  # fmt: skip
    folders = dict[str, str]()
    for name in (*FOREIGN, "ada", "ADA", "Ada", "x" * 255, "?" * 255):
        folders[name] = names.make_folder_name(name, [x.casefold() for x in folders.values()])
    assert {**folders, "?" * 255: ""} == {
        "Who?": "Who%3F", 'A: "B"*': "A%3A %22B%22%2A", "CON": "%43%4F%4E",
        "com1.x": "%63%6F%6D%31.x", "Ada.": "Ada%2E", ".Eve": "%2EEve", "a/b": "a%2Fb",
        "50%": "50%", "%41da": "%2541da", "Zo\u00eb": "Zo\u00eb", "ada": "ada", "ADA": "%41%44%41",
        "Ada": "%41%64%61", "x" * 255: "x" * 255, "?" * 255: "",
    }  # fmt: skip
    assert {names.read_folder_name(folder) for folder in folders.values()} == folders.keys()
