"""The folder of a gallery: changes, removal without a trace, damage, and processes that stop."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import vidjax
from tests.campaigns import gallery_kills
from tests.helpers import made_galleries
from tests.helpers.cases import quick_first
from tests.helpers.made_galleries import WIDTHS, add, answers, contents, make, make_clip
from tests.helpers.seen import contents as folder_contents, refused
from vidjax.apps.gallery import enrolment, index as index_lib, store as store_lib
from vidjax.apps.gallery.backend import fit
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip, list_clips_of
from vidjax.models import card_backend, two_covariance

CLIPS = made_galleries.make_clips()
# The same clips, after the back end of the gallery was fitted to the clips of people.
FITTED = {name: clip._replace(fitted=bool(clip.identity)) for name, clip in CLIPS.items()}
NEW = {"new": make_clip(7777, "new")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a gallery of CLIPS."""
    return make(tmp_path_factory.mktemp("made") / "g").folder


@pytest.fixture
def gallery(made, tmp_path):
    return Gallery(shutil.copytree(made, tmp_path / "g"))


def holds(gallery, content):
    """Returns whether a file of a gallery contains some bytes."""
    return any(content in path.read_bytes() for path in gallery.folder.rglob("*"))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 3 to 8 people, so that changes of few people split and join blocks."""
    monkeypatch.setattr(index_lib, "MIN_BLOCK_PEOPLE", 3)
    for module in (index_lib, enrolment, store_lib):
        monkeypatch.setattr(module, "MAX_BLOCK_PEOPLE", 8)


def change_at_random(people, rng, number):
    """Adds, removes, renames or relabels a person or a clip of a person."""
    person = rng.choice([*people.identities])
    kind, clip = rng.randrange(5), rng.choice(people.people[person])
    if kind == 0 or len(people) < 5:
        person = rng.choice([person, f"made {number}"])
        lacks = rng.choice(["", "", "face", "audio"])
        add(people, {f"made {number}": make_clip(20_000 + number, person, lacks=lacks)})
    elif kind == 1:
        people.remove(clip=clip)
    elif kind == 2:
        people.remove(identity=person)
    elif kind == 3:
        other = next(x for x in (f"renamed {number % 3}", "renamed") if x != person)
        people.rename(person, other, merge=True)
    else:
        people.relabel(clip, rng.choice([f"other {number}", None]))


@pytest.mark.parametrize(("make_one", "shift"), quick_first([
    (make, 0.1), (made_galleries.make_with_cards, 1e-3), (make, 1e-3),
    (made_galleries.make_with_cards, 0.1),
], 2))  # fmt: skip
def test_changed_galleries_equal_the_opened_folder_and_a_gallery_made_at_once(
    tmp_path, monkeypatch, small_blocks, fault_seed, make_one, shift
):
    """The mean of few people moves far. With a large `MOST_SHIFT`, its shifts are still added."""
    monkeypatch.setattr(index_lib, "MOST_SHIFT", shift)
    people = make_one(tmp_path / "g", made_galleries.make_clips(num_people=30))
    rng, before = random.Random(fault_seed), people.state
    first = answers(people)
    for number in range(20):
        change_at_random(people, rng, number)
        opened = Gallery(people.folder)
        assert answers(people) == answers(opened)
        found, again = people.index.card_comparison, opened.index.card_comparison
        assert found[0] == again[0] and found[1:] == pytest.approx(again[1:])
    wanted = make_one(tmp_path / "once", dict(people.clips))
    assert contents(people.folder) == contents(wanted.folder)
    for opened in (people, Gallery(people.folder)):
        assert answers(opened) == answers(wanted)
        assert (opened.identities, opened.strangers) == (wanted.identities, wanted.strangers)
    people._state = before  # another thread may still use an old state
    monkeypatch.setattr(people, "refresh", lambda: None)
    assert answers(people) == first


def test_only_blocks_with_changed_people_are_computed_again(tmp_path, monkeypatch, small_blocks):
    clips = made_galleries.make_clips(num_people=80)
    people = made_galleries.make_with_cards(tmp_path / "g", clips)
    answers(people)
    monkeypatch.setattr(card_backend, "weigh", weigh := mock.Mock(wraps=card_backend.weigh))
    for change in (
        lambda: add(people, NEW), lambda: people.remove(identity="person 30"),
        lambda: people.relabel("clip 70", "person 8"), lambda: people.rename("person 9", "Ada"),
    ):  # fmt: skip
        change()
        answers(people)
        sizes = [len(call.args[2]) for call in weigh.call_args_list]
        assert 0 < sum(sizes) <= 2 * (8 + 8 + 4), sizes  # faces and voices, of 80 people
        weigh.reset_mock()


def test_a_refused_change_leaves_the_gallery_unchanged(gallery):
    before, good = contents(gallery.folder), make_clip(1, "x")
    untyped: Any = gallery  # gets arguments of wrong types

    def add_two(name, vector=good.vector):
        add(gallery, {"fine": good, name: good._replace(vector=vector)})

    def rename_then_fail():
        with gallery.change() as draft:
            draft.rename("person 3", "Ada")
            draft.remove(identity="person 3")

    with gallery.change() as ended_change:
        pass
    for change, *words in (
        (rename_then_fail, "no identity 'person 3'"),
        (lambda: ended_change.rename("person 3", "Ada"), "inside the block"),
        (lambda: gallery.rename("person 3", "person 3"), "choose another name"),
        (lambda: gallery.relabel("clip 3000", "person 3"), "no clip 'clip 3000'"),
        (lambda: gallery.remove(identity=["persn 3"]), "did you mean 'person 3'?"),
        (lambda: gallery.remove(clip=["clip 30", "clop 31"]), "did you mean 'clip 31'?"),
        (lambda: untyped.rename(3, "Ada"), "identity must be a name, not int 3"),
        (lambda: untyped.relabel(30, "Ada"), "clip must be a name, not int 30"),
        (lambda: add_two(30), "clip name must be"),
        (lambda: add_two("a\nb"), "control"),
        (lambda: add_two("x" * 1001), "longer than 1,000 letters"),
        (lambda: add_two("bad", good.vector[:5]), "'bad'", "shape (13,)"),  # face: 8, audio: 5
        (lambda: add_two("bad", good.vector.astype(np.float64)), "'bad'", "float64"),
        (lambda: add_two("bad", good.vector * np.nan), "'bad'", "not finite"),
        (lambda: add_two("bad", good.vector * 0), "'bad'", "no usable frame"),
    ):
        refused(change, *words)
    assert contents(gallery.folder) == before and gallery.version == 1


def test_a_gallery_that_is_a_result_is_read_and_changed_only_by_its_command(gallery, tmp_path):
    command = "vidjax review names"
    folder = tmp_path / "names" / "gallery"
    result = Gallery.of_clips(folder, gallery.origin, gallery.backend, gallery.clips, command)
    before = folder_contents(folder)
    for change in (
        lambda: result.enrol(made_galleries.vectors_of(result, NEW)), lambda: add(result, NEW),
        lambda: result.remove(identity="person 3"), lambda: result.relabel("clip 30", None),
        lambda: result.rename("person 3", "Ada"),
    ):  # fmt: skip
        text = refused(change, "is a result of another command", f"to change names: {command}")
        assert text.count("\n") == 1
    with pytest.raises(store_lib.ResultError), result.change(command="vidjax review other"):
        pass
    assert folder_contents(folder) == before and answers(result) == answers(gallery)
    assert result.identities == gallery.identities
    with result.change(command=command) as draft:  # adds to the file
        draft.add(NEW)
    with result.change(command=command) as draft:  # writes the file again
        draft.remove(identity="person 3")
    assert Gallery(folder).command == command and gallery.command == ""
    refused(lambda: Gallery(folder).remove(identity="new"), command)
    with gallery.change(command=command) as draft:  # any command may change other galleries
        draft.remove(identity="person 3")


def test_back_end_is_fitted_again_without_removed_or_replaced_clips(tmp_path, capsys):
    """The back end was fitted to all clips of people. Clip 30 stays fitted as Ada's clip."""
    gallery = make(tmp_path / "g", FITTED)
    gallery.relabel("clip 30", None)  # the clip of person 3 becomes a clip of a stranger
    assert gallery.clips["clip 30"].fitted and "clip 30" in gallery.strangers
    add(gallery, {"clip 30": CLIPS["clip 30"]._replace(identity="Ada")})  # becomes a clip of Ada
    for name, other, must_refit in (
        ("clip 30", {}, True), ("stranger 0", {"stranger 0": make_clip(9999, None)}, False),
        ("clip 71", {"clip 71": make_clip(9999, "person 7")}, True),
    ):  # fmt: skip
        before = gallery.backend.numbers()
        with gallery.change() as draft:
            draft.remove(clip=name)
            draft.add(other)  # the same name with another vector
        assert np.array_equal(gallery.backend.numbers(), before) != must_refit
        if must_refit:  # to the clips that are left
            again = fit(*enrolment.stack_people(gallery.clips, WIDTHS), centred=False)
            assert np.array_equal(gallery.backend.numbers(), again.numbers())
            assert "9, too few to calibrate probabilities" in capsys.readouterr().err
        assert answers(Gallery(gallery.folder)) == answers(gallery)


def pieces(vectors):
    """Returns the bytes of each four neighbouring numbers of some vectors, if none is 0."""
    fours = [x[at : at + 4] for x in vectors for at in range(0, len(x) - 3, 4)]
    return [four.tobytes() for four in fours if four.all()]


def test_removed_and_replaced_people_leave_no_byte_of_names_or_vectors_on_disk(gallery):
    clips, stranger = list_clips_of(CLIPS)["person 7"], CLIPS["stranger 3"]
    vectors = [CLIPS[name].vector for name in clips]
    for block in gallery.index.blocks:  # coefficients are computed from the vectors
        vectors += [x[block.names.index("person 7")] for x in block.linear]
    assert all(holds(gallery, x) for x in pieces(vectors))
    gallery.remove(identity=["person 7"])
    texts = [name.encode() for name in (*clips, "person 7")]
    assert not any(holds(gallery, x) for x in (*pieces(vectors), *texts))
    assert "person 7" not in gallery.identities and "person 7" not in gallery.index.names
    assert add(gallery, {"stranger 3": stranger._replace(identity="known now")}) == 1
    assert add(gallery, {"stranger 3": stranger}) == 0  # the clip keeps its person
    gallery.remove(identity="known now")
    assert "stranger 3" not in gallery.strangers and not holds(gallery, stranger.vector.tobytes())
    gallery.rename("person 5", "Ada")
    assert holds(gallery, b"Ada") and not holds(gallery, b"person 5")
    with gallery.change() as draft:
        draft.rename("Ada", "Eve")
        draft.remove(clip="clip 51")
        draft.remove(identity="person 4")
        draft.add({"clip 40": CLIPS["clip 40"]._replace(identity="Zoe")})  # a clip of person 4
    assert not any(holds(gallery, name) for name in (b"Ada", b"clip 51", b"person 4"))
    assert gallery.clips["clip 40"].identity == "Zoe"


def test_removing_the_last_person_empties_the_back_end(tmp_path):
    people = make(tmp_path / "g", {name: clip for name, clip in FITTED.items() if clip.fitted})
    people.remove(identity=list(people.identities))
    assert len(people) == 0 and people  # an empty gallery is true
    for part in people.backend.parts:
        assert part.space is not None
        assert not part.centre.any() and not part.space.mean.any() and not part.space.ratio.any()
    refused(lambda: people.threshold(0.5), "nobody is enrolled")
    add(people, NEW)
    assert people.index.names == ["new"]


def test_a_late_refresh_never_restores_an_older_state(gallery, monkeypatch):
    """A removal begins after `refresh` has read the gallery, and must wait until it has ended."""
    Gallery(gallery.folder).rename("person 1", "Bob")  # gives `refresh` something to read
    read = gallery._store.read

    def slow_read():
        state = read()
        monkeypatch.setattr(gallery._store, "read", read)
        threads.submit(gallery.remove, identity="person 2")
        time.sleep(0.2)  # without a lock, `person 2` would be removed now
        return state

    monkeypatch.setattr(gallery._store, "read", slow_read)
    with ThreadPoolExecutor() as threads:
        gallery.refresh()
    # If the gallery had the old state, its next change would write `person 2` to the disk.
    assert "person 2" not in gallery.index.names and "Bob" in gallery.index.names


def test_during_a_change_readers_see_the_old_state_and_changes_are_refused(gallery, monkeypatch):
    refuse = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    before = answers(gallery)
    with Gallery(gallery.folder).change() as draft:
        draft.rename("person 3", "Ada")
        assert answers(gallery) == answers(Gallery(gallery.folder)) == before
        gallery.lock_seconds = 0.2
        remove = functools.partial(gallery.remove, clip=["clip 30"])
        message = refused(
            remove, str(gallery.folder), "in use by another program, such as `vidjax serve`",
            "an open 'with gallery.change", "try again",
        )  # fmt: skip
        monkeypatch.setattr(fcntl, "lockf", refuse)  # SQLite calls such a file busy, too
        refused(remove, "without locks", "on another disk")
        assert message.startswith("gallery ")
    assert "Ada" in Gallery(gallery.folder) and gallery.remove(clip=["clip 30"]) == 1
    # After a removal, the file of another hard link would still contain the person.
    os.link(gallery.folder / store_lib.GALLERY_FILE, gallery.folder.parent / "other")
    refused(lambda: gallery.remove(identity=["person 7"]), "hard links")


def test_change_waits_until_the_change_of_another_program_has_ended(gallery):
    with ThreadPoolExecutor() as threads:
        with Gallery(gallery.folder).change():
            removal = threads.submit(gallery.remove, identity="person 3")
            began = time.process_time()
            time.sleep(0.7)  # servers with many changes leave a command little time between them
            assert time.process_time() - began < 0.2  # waiting does not keep a processor busy
        assert removal.result() == len([x for x in CLIPS.values() if x.identity == "person 3"])


def test_answers_do_not_wait_until_a_change_is_written(gallery, monkeypatch):
    """SQLite locks the file as soon as a change does not fit into its memory."""
    before, begun, go = answers(gallery), threading.Event(), threading.Event()
    connect, make_facts = store_lib._connect, store_lib._facts

    def connect_with_little_memory(path):
        connection = connect(path)
        connection.execute("PRAGMA cache_size=1")
        return connection

    def wait(state):  # the rows are written, but not committed
        begun.set()
        assert go.wait(30)
        return make_facts(state)

    monkeypatch.setattr(store_lib, "_connect", connect_with_little_memory)
    monkeypatch.setattr(store_lib, "_facts", wait)
    with ThreadPoolExecutor() as threads:
        removal = threads.submit(gallery.remove, identity="person 3")
        try:
            assert begun.wait(30)
            assert threads.submit(answers, gallery).result(5) == before
            assert threads.submit(len, gallery).result(5) == 12
            monkeypatch.setattr(store_lib, "_connect", connect)
            monkeypatch.setattr(store_lib, "WAIT_SECONDS", 0.1)
            refused(lambda: Gallery(gallery.folder), "in use by another program")
        finally:
            go.set()
        removal.result()
    assert "person 3" not in gallery.index.names and len(gallery) == 11
    Gallery(gallery.folder).rename("person 1", "Bob")  # the gallery is read again
    assert "Bob" in gallery


@pytest.mark.parametrize(("name", "words"), [
    ("SQLITE_IOERR_LOCK", ("without locks", "another disk", "--out=FOLDER")),
    ("SQLITE_PERM", ("without locks", "another disk", "--out=FOLDER")),
    ("SQLITE_IOERR_DIR_FSYNC", ("was changed, but a power cut may undo the change",)),
])  # fmt: skip
def test_error_of_a_drive_names_another_disk_or_a_lost_change(gallery, monkeypatch, name, words):
    error, connection = sqlite3.OperationalError("disk I/O error"), mock.MagicMock()
    error.sqlite_errorname = name
    connection.execute.side_effect = error
    monkeypatch.setattr(store_lib, "_connect", lambda path: connection)
    for action in (gallery.refresh, lambda: gallery.remove(clip=["clip 30"])):
        refused(action, str(gallery.folder), *words)


@pytest.mark.slow
def test_a_full_disk_or_a_kill_leaves_the_old_state_or_the_new_one(tmp_path, campaign):
    """`fill_once` and `kill_once` change a gallery, and assert that it has one of both states."""
    failed = 0
    for turn in range(100 if campaign else 1):
        place = tmp_path / f"full {turn}"
        failed += gallery_kills.fill_once(place / "g", place, random.Random(3 + turn))
    assert failed  # the disk was full during at least one change
    for turn in range(100 if campaign else 3):
        place = tmp_path / str(turn)
        gallery_kills.kill_once(place / "g", place, random.Random(turn))


@pytest.mark.slow
def test_the_backup_commands_of_the_page_copy_a_gallery_that_is_being_changed(gallery):
    place, stop = gallery.folder.parent, threading.Event()
    gallery.folder.rename(place / "people")
    people = Gallery(place / "people")
    # The commands of the page for a backup, one for each program, and for restoring it.
    page = Path(vidjax.__file__).parent / "apps" / "gallery" / "README.md"
    section = page.read_text().split("## Backup, restore and upgrade")[1]
    backup, restore = re.findall(r"```sh\n(.*?)```", section, re.S)[:2]
    make, *copy = backup.splitlines()
    commands = [f"{make}; {line}" for line in copy if shutil.which(line.split()[0])]
    assert commands

    def change():
        while not stop.is_set():
            add(people, NEW)
            people.remove(clip=["new"])

    def run(text):
        subprocess.run(["/bin/sh", "-c", f"set -e; {text}"], cwd=place, check=True)

    with ThreadPoolExecutor() as threads:
        changes = threads.submit(change)
        try:
            for command in [*commands] * 6:
                shutil.rmtree(place / "backup", ignore_errors=True)
                run(command)
                assert {*Gallery(place / "backup").clips} in ({*CLIPS}, {*CLIPS, *NEW})
                assert (place / "backup").stat().st_mode & 0o077 == 0
        finally:
            stop.set()
        changes.result()
    # The open gallery notices the restored file, although a journal of another file was left.
    before = answers(Gallery(place / "backup"))
    people.remove(identity=["person 7"])
    (place / "people" / store_lib.JOURNAL_FILE).write_bytes(b"journal")
    run(restore)
    assert "person 7" in people and answers(people) == before
    people.remove(identity=["person 7"])


def cut_off(folder):
    """Leaves half of a change in a gallery, and its journal, like a process that is killed."""
    with contextlib.closing(sqlite3.connect(folder / store_lib.GALLERY_FILE)) as connection:
        connection.execute("PRAGMA cache_size=1")  # so pages are written early
        connection.execute("BEGIN")
        for n in range(400):
            connection.execute("INSERT INTO clip VALUES (NULL, ?, ?)", (str(n), os.urandom(3000)))
        left = {path: path.read_bytes() for path in folder.iterdir()}
    for path, content in left.items():
        path.write_bytes(content)
    # A journal is longer than its header of 512 bytes.
    assert (folder / store_lib.JOURNAL_FILE).stat().st_size > 512


def test_journal_of_a_killed_change_is_rolled_back_unless_it_names_another_file(gallery, tmp_path):
    before = answers(gallery)
    cut_off(gallery.folder)
    assert answers(Gallery(gallery.folder)) == before
    cut_off(gallery.folder)
    add(gallery, NEW)
    assert set(Gallery(gallery.folder).clips) == set(gallery.clips) == {*CLIPS, "new"}
    # SQLite would delete the named file after it has applied the journal.
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("mine")
    cut_off(gallery.folder)
    name = str(thesis).encode()
    checksum = sum(n - 256 if n > 127 else n for n in name) & 0xFFFFFFFF  # of signed bytes
    # The end of such a journal: 4 zero bytes, the name, its length, its checksum, 8 fixed bytes.
    end = b"\0\0\0\0" + name + struct.pack(">II", len(name), checksum) + store_lib.SUPER_JOURNAL
    with (gallery.folder / store_lib.JOURNAL_FILE).open("ab") as journal:
        journal.write(end)
    refused(lambda: Gallery(gallery.folder), "it makes SQLite delete another file")
    assert thesis.read_text() == "mine"


def test_a_read_only_gallery_with_zeros_up_to_1_tib_answers(gallery):
    wanted, path = answers(gallery), gallery.folder / store_lib.GALLERY_FILE
    os.truncate(path, 1 << 40)
    path.chmod(0o400)
    gallery.folder.chmod(0o500)
    assert answers(Gallery(gallery.folder)) == wanted
    assert os.listdir(gallery.folder) == [path.name]
    if not os.access(gallery.folder, os.W_OK):  # root may write
        refused(lambda: gallery.remove(clip=["clip 30"]), "cannot be changed", "copy it")


def test_folders_without_a_gallery_or_with_other_files_are_refused(tmp_path, gallery):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "absent"):
        refused(lambda folder=folder: Gallery(folder), "contains no gallery", "create")
    shutil.copytree(gallery.folder, tmp_path / "names" / "gallery")
    for place in ("names", "names/gallery/gallery.sqlite"):
        refused(lambda place=place: Gallery(tmp_path / place), "did you mean", "names/gallery'?")
    refused(lambda: make(tmp_path), "not empty", "file")
    refused(lambda: make(tmp_path / "file"), "is a file")
    refused(lambda: make(gallery.folder), "contains a gallery")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / store_lib.GALLERY_FILE).touch()  # is left by a killed creation
    refused(lambda: Gallery(tmp_path / "new"), "contains no gallery")
    assert make(tmp_path / "new").identities


# Damages to the file of a gallery, or files next to it that SQLite would read.
DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 3),
    "link": lambda path: path.symlink_to(path.rename(path.parent.parent / "elsewhere")),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "gone": lambda path: path.unlink(),
    "write-ahead mode": lambda path: path.write_bytes(  # bytes 18 and 19 are the mode
        path.read_bytes()[:18] + b"\2\2" + path.read_bytes()[20:]
    ),
    "pipe as journal": lambda path: os.mkfifo(f"{path}-journal"),
    "link as journal": lambda path: os.symlink("/dev/zero", f"{path}-journal"),
    "write-ahead log": lambda path: Path(f"{path}-wal").write_bytes(b"x" * 4096),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_raises_an_error_that_names_the_folder(gallery, kind):
    DAMAGES[kind](gallery.folder / store_lib.GALLERY_FILE)
    refused(lambda: Gallery(gallery.folder), str(gallery.folder))
    if kind != "cut":  # `refresh` reads only the digest of the content
        refused(gallery.refresh, str(gallery.folder))


def forged(folder, sql="", facts=None, digest=False):
    """Changes the file of a gallery, like an attacker who knows its format.

    `sql` is a statement. If `digest` is true, the stored digest becomes the digest of the changed
    rows. `facts` replace values of the stored facts.
    """
    with contextlib.closing(sqlite3.connect(folder / store_lib.GALLERY_FILE)) as connection:
        connection.execute(sql)
        if digest:
            tables = ("backend", "person", "clip")
            rows = [x for name in tables for x in connection.execute(f"SELECT * FROM {name}")]  # noqa: S608
            facts = {"rows": f"{sum(map(store_lib._digest, rows)) % 2**256:064x}"}
        if facts is not None:
            ((text,),) = connection.execute("SELECT facts FROM gallery").fetchall()
            text = json.dumps(json.loads(text) | facts)
            row = (text, hashlib.sha256(text.encode()).digest())
            connection.execute("UPDATE gallery SET facts = ?, sha256 = ?", row)
        connection.commit()


# Replaces the last bytes of the numbers of each row.
END = "UPDATE {} SET numbers = CAST(substr(numbers, 1, length(numbers) - {}) || x'{}' AS BLOB)"
# Changes of rows that do not match their digest.
FORGED = (
    "CREATE TRIGGER mine AFTER INSERT ON clip BEGIN DELETE FROM clip; END",
    "DROP TABLE person",
    "UPDATE clip SET words = replace(words, 'person 7', 'person 8')",
    "INSERT INTO backend VALUES (1, '', zeroblob(8))",
    "INSERT INTO gallery SELECT * FROM gallery",
    "UPDATE clip SET words = zeroblob(900000)",
)
# Wrong rows or columns with a correct digest.
ILL_FORMED = (
    # Only the exact columns are safe: SQL code of a column could compute gigabytes for each row.
    "ALTER TABLE clip RENAME words TO other",
    END.format("clip", 56, "0000c07f" * 13 + "00000000"),  # 13 float32 NaN, `fitted` is 0
    END.format("clip", 4, "02000000"),  # `fitted` is 2
    END.format("person", 76, "ff" * 76),  # all bytes of a person
    "UPDATE clip SET numbers = zeroblob(length(numbers) - 4)",
    "UPDATE clip SET words = words || char(10)",
    "UPDATE clip SET words = replace(words, 'clip 30', '')",
    "UPDATE clip SET words = replace(words, 'clip 30', 'a' || char(7))",
    "UPDATE clip SET words = replace(words, 'person 7', 'nobody')",
    "UPDATE person SET words = replace(words, 'person 7', 'e' || char(769))",  # is not NFC
)
# Wrong facts with a correct digest.
FACTS = (
    {"parts": [{"name": "x", "width": 2**31 - 1}]},
    {"parts": [{"name": "x", "width": 8}, {"name": "x", "width": 5}]},
    {"version": 10**300},
    {"settings": {"within": 0.1}},
    {"settings": dict.fromkeys(two_covariance.Settings._fields, float("nan"))},
    {"run": {"workdir": ["x"], "digest": "0" * 64, "centred": True}},
    {"clips": 2**31 - 1},
)


def test_forged_tables_and_facts_are_refused(gallery, tmp_path):
    folder, path = str(gallery.folder), gallery.folder / store_lib.GALLERY_FILE
    content = path.read_bytes()
    for forgery in (*FORGED, *ILL_FORMED, *FACTS):
        path.write_bytes(content)
        sql, facts = (forgery, None) if isinstance(forgery, str) else ("", forgery)
        forged(gallery.folder, sql, facts, digest=forgery in ILL_FORMED)
        refused(lambda: Gallery(folder), folder)
    path.write_bytes(content)
    forged(gallery.folder, facts={}, digest=True)  # changes nothing
    assert answers(Gallery(folder)) == answers(gallery)
    nets = made_galleries.make_with_cards(tmp_path / "nets")
    parts = [{"name": name, "width": width, "by_card": True} for name, width in WIDTHS.items()]
    forged(nets.folder, facts={"parts": parts})  # as written for nets without a mean
    assert answers(Gallery(nets.folder)) == answers(nets)
    for number, word in ((2, "damaged"), (5, "install the newest version of vidjax")):
        forged(gallery.folder, f"PRAGMA user_version={number}")  # the number of the format
        refused(lambda: Gallery(folder), word)


@pytest.mark.slow
def test_a_schema_with_exponentially_many_rows_is_refused_quickly(gallery, monkeypatch):
    """Each page of the schema refers to the next page 300 times: 300 ** 15 rows in 1 MB.

    Without the limit SCHEMA_SECONDS, the test would not end.
    https://www.sqlite.org/fileformat.html has the layout of pages.
    """
    monkeypatch.setattr(store_lib, "SCHEMA_SECONDS", 0.2)
    size, num_pages, path = store_lib.PAGE_BYTES, 16, gallery.folder / store_lib.GALLERY_FILE
    content = path.read_bytes()
    # The header of the file has 100 bytes. Bytes 28 to 31 are the number of pages.
    file_header = content[:28] + num_pages.to_bytes(4, "big") + content[32:100]
    places = range(size - 300 * 6, size, 6)  # of 300 cells of 6 bytes at the end of a page
    pages = []
    for child in range(2, num_pages + 1):
        # The header of a page: its kind (5, an interior page), its number of cells, the place of
        # the first cell, the last child, and all places. A cell contains a child and a key.
        header = struct.pack(">B2xHHxI300H", 5, 300, places[0], child, *places)
        start = header if pages else file_header + header  # page 1 begins with the file's header
        cells = (struct.pack(">IBx", child, key % 127 + 1) for key in range(300))
        pages.append(start.ljust(places[0], b"\0") + b"".join(cells))
    # The last page (kind 13) has a row: its length and key, the kinds of its values, the values.
    row = b"\x0e\1" + b"\6\x17\x0f\x0f\1\0" + b"indexxx\2"  # 'index', 'x', 'x', 2, NULL
    header = struct.pack(">B2xHHxH", 13, 1, size - len(row), size - len(row))
    path.write_bytes(b"".join([*pages, header.ljust(size - len(row), b"\0") + row]))
    refused(lambda: Gallery(gallery.folder), str(gallery.folder), "damaged")


FROZEN = sorted((Path(__file__).parent / "helpers" / "frozen_galleries").glob("*.npz"))
FROZEN_CLIPS = ("clips", "people", "vectors")  # arrays of the files of galleries of nets


def check_frozen(people, frozen):
    """Asserts that a gallery gives the answers that were recorded when it was made.

    `fpir` 2/7 lets 1 of 6 strangers pass.
    """
    assert people.threshold(fpir=2 / 7).score == pytest.approx(float(frozen["score"]), abs=1e-6)
    shown = {f"query {n}": StoredClip(None, x) for n, x in enumerate(frozen["shown"])}
    vectors = made_galleries.vectors_of(people, shown)
    found = people.identify(vectors, k=len(people.identities)).values()
    assert [answer.identity or "" for answer in found] == frozen["identity"].tolist()
    best = np.array([answer.best for answer in found], object)  # [Q, N, 2]
    np.testing.assert_array_equal(best[..., 0], frozen["names"])
    probabilities = best[..., 1].astype(float)
    np.testing.assert_allclose(probabilities, frozen["probabilities"], rtol=0, atol=1e-6)
    for clip, person, x in zip(*(frozen.get(of, ()) for of in FROZEN_CLIPS), strict=True):
        assert (people.clips[clip].identity or "") == person
        assert np.array_equal(people.clips[clip].vector, x)


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_a_gallery_of_an_earlier_version_keeps_its_answers_and_removes_people(path, tmp_path):
    """Earlier versions of vidjax wrote the files, whose names begin with the format."""
    with np.load(path) as file:
        frozen = dict(file)
    (tmp_path / store_lib.GALLERY_FILE).write_bytes(frozen["sqlite"].tobytes())
    people, before = Gallery(tmp_path), contents(tmp_path)
    check_frozen(people, frozen)
    assert (tmp_path / store_lib.GALLERY_FILE).read_bytes() == frozen["sqlite"].tobytes()
    add(people, {"new": StoredClip("new", np.ones(frozen["shown"].shape[1], np.float32))})
    people.remove(identity="new")
    for opened in (people, Gallery(tmp_path)):
        check_frozen(opened, frozen)
    assert contents(tmp_path) == before
    if not path.stem.endswith("run"):  # whose back end would be fitted again, for seconds
        people.remove(identity=(name := max(people.people)))
        assert not holds(people, name.encode())
