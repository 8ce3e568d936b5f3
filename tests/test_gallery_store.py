"""The folder of a gallery: the same bytes however people came, the old state or the new one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import made_galleries
from vidjax.gallery import blocks as blocks_lib
from vidjax.gallery import manifest as manifest_lib
from vidjax.gallery import people as people_lib
from vidjax.gallery import store as store_lib
from vidjax.gallery.blocks import Clip
from vidjax.gallery.buckets import Tree, bits_of
from vidjax.gallery.people import People
from vidjax.run import workdir as workdir_lib

CLIPS = made_galleries.make_clips()


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    made_galleries.small_files(monkeypatch)


@pytest.fixture
def gallery(tmp_path):
    return made_galleries.make(tmp_path / "g")


def refused(action, *words):
    """Asserts that an action fails in at most three lines with some words, and returns them."""
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert len(text.splitlines()) <= 3
    assert all(word in text for word in words), text
    return text


# ---- buckets


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 60), st.integers(0, 4), min_size=1, max_size=20),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 9),
)
def test_buckets_depend_on_what_is_there_alone(batches, most):
    tree, there = Tree(most), {}
    for batch in batches:
        changed = {f"key {number}": count for number, count in batch.items()}
        tree.apply(tree.moves(changed))
        there = {key: count for key, count in (there | changed).items() if count}
        at_once = Tree(most)
        at_once.apply(at_once.moves(there))
        assert tree.leaves == at_once.leaves
        assert {k: n for keys in tree.leaves.values() for k, n in keys.items()} == there
        for bits, keys in tree.leaves.items():
            assert len(keys) == 1 or sum(keys.values()) <= most
            assert all(bits_of(key).startswith(bits) and tree.leaf(key) == bits for key in keys)
            neighbour = tree.leaves.get(bits[:-1] + str(1 - int(bits[-1]))) if bits else None
            if neighbour is not None:  # together they would be too large
                assert len(keys | neighbour) > 1
                assert sum((keys | neighbour).values()) > most
        again = Tree(most, {bits: keys for bits, keys in tree.leaves.items() if keys})
        assert again.leaves == tree.leaves


@pytest.mark.parametrize(
    ("leaves", "word"),
    [
        ({"0": {"person a": 1}, "01": {"person b": 1}}, "'0' lies above"),
        ({"": {"person a": 2, "person b": 2}}, "too large"),
        ({str(1 - int(bits_of("person a")[0])): {"person a": 1}}, "another file than its own"),
    ],
)
def test_buckets_that_no_gallery_has_are_refused(leaves, word):
    refused(lambda: Tree(3, leaves), word)


# ---- the same, however people came and left


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_files_and_answers_are_those_of_a_gallery_made_at_once(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("swaps")
    names = sorted(CLIPS)
    first = data.draw(st.sets(st.sampled_from(names)))
    people = made_galleries.make(folder / "g", {name: CLIPS[name] for name in first})
    there, version = set(first), 1
    for _ in range(data.draw(st.integers(1, 4))):
        batch = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=12))
        if data.draw(st.booleans()):
            assert people.add({name: CLIPS[name] for name in batch}) == len(batch - there)
            version += bool(batch - there)
            there |= batch
        elif batch & there:
            assert people.remove(clips=batch & there) == len(batch & there)
            version += 1
            there -= batch
        if data.draw(st.integers(0, 3)) == 0:
            people = People(folder / "g")
    at_once = made_galleries.make(folder / "once", {name: CLIPS[name] for name in there})
    assert people.version == version
    if data.draw(st.booleans()) and people.identities:
        people.refit()
        at_once.refit()
    assert made_galleries.contents(folder / "g") == made_galleries.contents(folder / "once")
    assert people.identities == at_once.identities and people.strangers == at_once.strangers
    for opened in (people, People(folder / "g")):
        assert made_galleries.answers(opened) == made_galleries.answers(at_once)


def test_one_by_one_is_all_at_once(tmp_path):
    people = made_galleries.make(tmp_path / "g", {})
    for name in sorted(CLIPS, key=lambda name: name[::-1]):
        people.add({name: CLIPS[name]})
    at_once = made_galleries.make(tmp_path / "once")
    assert made_galleries.contents(tmp_path / "g") == made_galleries.contents(tmp_path / "once")
    assert made_galleries.answers(people) == made_galleries.answers(at_once)
    assert people.version == 1 + len(CLIPS)


def test_a_change_rewrites_what_it_touches(gallery):
    before = {path.name: path.stat().st_mtime_ns for path in gallery.folder.iterdir()}
    assert len(before) > 6
    gallery.add({"new": made_galleries.make_clip(7777, "new")})
    after = {path.name: path.stat().st_mtime_ns for path in gallery.folder.iterdir()}
    same = {name for name in before if after.get(name) == before[name]}
    assert len(before) - len(same - {".lock"}) <= 3  # one file of clips, manifest, lock


# ---- nothing is left of who was removed


def holds(folder, content):
    return [path.name for path in folder.rglob("*") if content in path.read_bytes()]


@pytest.mark.parametrize("by", ["identity", "clip"])
def test_no_byte_is_left_of_who_was_removed(gallery, by):
    gone = [name for name, clip in CLIPS.items() if clip.identity == "person 7"]
    assert len(gone) == 4
    numbers = [CLIPS[name].vector for name in gone]
    for block in store_lib.Store(gallery.folder, sync=False).read().contents.blocks.values():
        if "person 7" in block.people:
            numbers += [x[block.place("person 7")] for x in block.coefficients.linear]
    assert len(numbers) == 6
    parts = [piece for x in numbers for piece in np.split(x, len(x))]
    assert all(holds(gallery.folder, piece.tobytes()) for piece in parts if piece.any())
    if by == "identity":
        gallery.remove(identities=["person 7"])
    else:
        for name in gone:
            gallery.remove(clips=[name])
    assert not any(holds(gallery.folder, piece.tobytes()) for piece in parts if piece.any())
    assert not any(holds(gallery.folder, json.dumps(name).encode()) for name in gone)
    assert not holds(gallery.folder, b'"person 7"')
    assert "person 7" not in gallery.identities and "person 7" not in gallery.index.names


def test_a_stranger_who_is_enrolled_and_removed_is_gone(gallery):
    clip = CLIPS["stranger 3"]._replace(identity="known now")
    assert gallery.add({"stranger 3": clip}) == 1
    assert "stranger 3" not in gallery.strangers
    assert gallery.add({"stranger 3": CLIPS["stranger 3"]}) == 0  # a person stays one
    gallery.remove(identities=["known now"])
    assert not holds(gallery.folder, clip.vector.tobytes())


def test_what_a_killed_change_left_is_deleted_by_the_next(gallery):
    left = [".clips-01-0123456789abcdef.numbers.17.partial", "clips-01-0123456789abcdef.numbers",
            "front-0123456789abcdef.numbers", ".manifest.json.17.partial"]  # fmt: skip
    for name in left:
        (gallery.folder / name).write_bytes(b"a vector")
    (gallery.folder / "notes.txt").write_text("mine")
    gallery.remove(clips=["clip 30"])
    assert not any((gallery.folder / name).exists() for name in left)
    assert (gallery.folder / "notes.txt").read_text() == "mine"


# ---- a change that fails or is killed


class Killed(BaseException):
    pass


CHANGES = {
    "enrol": lambda people: people.add({"new": made_galleries.make_clip(7777, "new")}),
    "many": lambda people: people.add(
        {f"new {n}": made_galleries.make_clip(n, f"p {n}") for n in range(9)}
    ),
    "remove": lambda people: people.remove(identities=["person 7", "person 3"]),
    "refit": lambda people: people.refit(),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "refit")) for name in CHANGES],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
@pytest.mark.parametrize("function", ["write", "replace", "unlink"])
def test_a_change_that_fails_leaves_the_old_state_or_the_new_one(
    tmp_path, monkeypatch, change, error, function
):
    """At every call by which a change could fail; a full disk cannot stop a deletion."""
    if function == "unlink" and isinstance(error, OSError):
        return
    old = made_galleries.make(tmp_path / "g")
    shutil.copytree(tmp_path / "g", tmp_path / "new")
    CHANGES[change](People(tmp_path / "new"))
    expected = {
        "old": (made_galleries.contents(tmp_path / "g"), made_galleries.answers(old)),
        "new": (
            made_galleries.contents(tmp_path / "new"),
            made_galleries.answers(People(tmp_path / "new")),
        ),
    }
    module = workdir_lib if function == "write" else os
    name = "write_bytes" if function == "write" else function
    real, seen, at = getattr(module, name), set(), 0
    while True:
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "g", folder)
        people, calls = People(folder), iter(range(10**6))

        def failing(*args, at=at, calls=calls, **kwargs):
            if next(calls) == at:
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            try:
                CHANGES[change](people)
                break
            except (OSError, Killed):
                pass
        state = made_galleries.answers(People(folder))
        found = [key for key, (_, answers) in expected.items() if answers == state]
        assert found, f"call {at}"
        seen |= set(found)
        if isinstance(error, OSError):
            assert made_galleries.answers(people) == state  # as in memory
            assert made_galleries.contents(folder) == expected[found[0]][0]
        CHANGES["enrol"](people)  # the same object goes on, and cleans up, if nothing is new, too
        assert set(store_lib.Store(folder, sync=False).read().contents) == set(people.clips)
        names = {path.name for path in folder.iterdir()}
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert len(names) == len(manifest["buckets"]) + 3  # front, manifest, lock
        shutil.rmtree(folder)
        at += 1
    assert at > 0 and (function == "unlink" or "old" in seen)


def test_two_processes_change_in_turn(gallery):
    other = People(gallery.folder)
    other.remove(identities=["person 7"])
    gallery.add({"new": made_galleries.make_clip(7777, "new")})  # reads what the other one did
    assert "person 7" not in gallery.identities and "new" in gallery.identities
    assert made_galleries.answers(People(gallery.folder)) == made_galleries.answers(gallery)
    refused(lambda: gallery.remove(identities=["person 7"]), "person 7")


def test_the_second_process_is_told_who_changes_the_gallery(gallery):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom vidjax.run import workdir\n"
        f"with workdir.lock(Path({str(gallery.folder)!r}), 'gallery'):\n"
        "    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "locked\n"
        said = refused(lambda: gallery.remove(clips=["clip 30"]), f"process {process.pid}")
        assert said.startswith("gallery ") and str(gallery.folder) in said
        assert made_galleries.answers(People(gallery.folder))  # reading needs no lock
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout
        process.stdout.close()
    gallery.remove(clips=["clip 30"])


def test_reading_meets_the_old_state_or_the_new_one(gallery):
    """Files vanish between the manifest and their reading: a reader begins again."""
    with_new = {"new": made_galleries.make_clip(7777, "new")}
    stop = threading.Event()

    def change():
        while not stop.is_set():
            gallery.add(with_new)
            gallery.remove(clips=["new"])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        sizes = {len(People(gallery.folder).clips) for _ in range(12)}
    finally:
        stop.set()
        thread.join()
    assert sizes <= {len(CLIPS), len(CLIPS) + 1}


# ---- folders that are no galleries, or hostile ones


def test_a_folder_that_is_no_gallery(tmp_path):
    refused(lambda: People(tmp_path), "holds no gallery", "create")
    refused(lambda: People(tmp_path / "absent"), "holds no gallery")
    (tmp_path / "file").write_text("mine")
    refused(lambda: made_galleries.make(tmp_path), "not empty", "file")
    refused(lambda: made_galleries.make(tmp_path / "file"), "is a file")
    made_galleries.make(tmp_path / "g")
    refused(lambda: made_galleries.make(tmp_path / "g"), "holds a gallery")


def damage(kind, path, folder, rng):
    """Damages a file of a gallery."""
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: int(rng.integers(len(content)))])
    elif kind == "flip":
        flipped = bytearray(content)
        flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
    elif kind == "gone":
        path.unlink()
    elif kind == "longer":
        path.write_bytes(content + b"\0" * 70_000_000)
    elif kind == "link":
        path.rename(folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        other = next(p for p in sorted(folder.glob("clips-*")) if p != path)
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "kind", ["cut", "flip", "gone", "longer", "link", "folder", "pipe", "swap"]
)
@pytest.mark.parametrize("file", ["manifest.json", "front-*", "clips-*"])
def test_a_damaged_file_is_named_in_one_error(gallery, kind, file, fault_seed):
    rng = np.random.default_rng(fault_seed)
    path = min(gallery.folder.glob(file))
    damage(kind, path, gallery.folder, rng)
    said = refused(lambda: People(gallery.folder), str(gallery.folder))
    assert path.name in said or "holds no gallery" in said


def forge(folder, **entries):
    """Writes a manifest with other entries, and a sha256 that fits."""
    value = json.loads((folder / "manifest.json").read_bytes())
    value.pop("sha256")
    value |= entries
    sealed = value | {"sha256": manifest_lib.digests.sha256_json(value)}
    (folder / "manifest.json").write_text(json.dumps(sealed))


def bucket(**entries):
    return {"bits": "0", "people": 1, "clips": 1, "sha256": "0" * 64} | entries


def parts(*widths):
    return [{"name": f"part {n}", "width": width} for n, width in enumerate(widths)]


@pytest.mark.parametrize(
    "entries",
    [
        {"parts": parts(2**31 - 1)},
        {"parts": parts(2**31 - 1, 2**31 - 1)},
        {"parts": parts(16_384)},
        {"parts": parts(12)},
        {"parts": []},
        {"parts": [*parts(8), {"name": "part 0", "width": 5}]},
        {"parts": [{"name": "x", "width": "8"}, {"name": "y", "width": 5}]},
        {"version": -1},
        {"version": 10**300},
        {"settings": {"within": 0.1}},
        {"settings": dict.fromkeys(manifest_lib.Settings._fields, float("nan"))},
        {"run": {"workdir": ["x"], "digest": "0" * 64, "centred": True}},
        {"front": "../../../etc/passwd"},
        {"buckets": [bucket(clips=2**31 - 1)]},
        {"buckets": [bucket(people=2**31 - 1)]},
        {"buckets": [bucket(people=-1)]},
        {"buckets": [bucket(bits="/../x")]},
        {"buckets": [bucket(bits="0" * 64, clips=2**31 - 1)]},
        {"buckets": {"0": 1}},
        {"format": 2},
    ],
    ids=str,
)
def test_a_forged_manifest_is_refused(gallery, entries):
    forge(gallery.folder, **entries)
    refused(lambda: People(gallery.folder), str(gallery.folder))


def bucket_of(folder, content):
    """Puts a file in the place of the first one of clips, named rightly in the manifest."""
    value = json.loads((folder / "manifest.json").read_bytes())
    sha = manifest_lib.hashlib.sha256(content).hexdigest()
    bucket = value["buckets"][0]
    bucket["sha256"] = sha
    (folder / f"clips-{bucket['bits']}-{sha[:16]}.numbers").write_bytes(content)
    forge(folder, buckets=value["buckets"])


def first_block(folder):
    """Returns the content of the first file."""
    value = json.loads((folder / "manifest.json").read_bytes())["buckets"][0]
    path = folder / f"clips-{value['bits']}-{value['sha256'][:16]}.numbers"
    return manifest_lib.read_block(path, manifest_lib.Bucket(**value), made_galleries.WIDTHS)


def spoilt(kind, block):
    """Returns the bytes of a file of clips that no gallery writes."""
    numbers = block.coefficients
    if kind == "NaN":
        vectors = block.vectors.copy()
        vectors[0, 3] = np.nan
        return blocks_lib.to_bytes(block._replace(vectors=vectors))
    if kind == "infinite":
        linear = (numbers.linear[0] + np.inf, *numbers.linear[1:])
        return blocks_lib.to_bytes(block._replace(coefficients=numbers._replace(linear=linear)))
    if kind in ("too many", "too few"):
        other = numbers.num_clips + (9 if kind == "too many" else -9)
        return blocks_lib.to_bytes(block._replace(coefficients=numbers._replace(num_clips=other)))
    if kind == "other people":
        people = tuple(f"other {name}" for name in block.people)
        return blocks_lib.to_bytes(block._replace(people=people))
    content = blocks_lib.to_bytes(block)
    size = blocks_lib.num_bytes(made_galleries.WIDTHS, len(block.people), block.num_clips)
    head, tail = content[:-size], content[-size:]
    value: Any = json.loads(head)
    if kind == "fewer":
        value[0][1] = value[0][1][1:]
    if kind == "wider":
        return head + tail + tail
    if kind == "unaligned":
        return head[:-1] + b" \n" + tail
    if kind == "clips twice":
        value[0][1] = value[0][1][:1] * len(value[0][1]) + value[0][1][:1]
    if kind == "people twice":
        value[1][0] = value[0][0]
    if kind == "no names":
        value = [[1, 2] for _ in value]
    if kind == "numbers":
        value[0][1] = [1] * len(value[0][1])
    if kind == "nobody":
        value[0][0] = None
    if kind == "control":
        value[0][0] = "a\nb"
    if kind == "object":
        value = {"clips": value}
    line = json.dumps(value).encode()
    if kind == "deep":
        line = b"[" * 10_000 + b"]" * 10_000
    return line.ljust(-(-(len(line) + 1) // 64) * 64 - 1) + b"\n" + tail


@pytest.mark.parametrize(
    "kind",
    ["NaN", "infinite", "too many", "too few", "other people", "fewer", "wider", "unaligned",
     "clips twice", "people twice", "no names", "numbers", "nobody", "control", "object", "deep"],
)  # fmt: skip
def test_a_forged_file_of_clips_is_refused(gallery, kind):
    block = first_block(gallery.folder)
    assert len(block.people) > 1
    bucket_of(gallery.folder, spoilt(kind, block))
    refused(lambda: People(gallery.folder), str(gallery.folder), "damaged")


def test_a_vector_that_cannot_be_is_not_taken(gallery):
    good = made_galleries.make_clip(1, "x")
    for vector, word in {
        "width": (good.vector[:5], "wanted float32 (13,)"),
        "type": (good.vector.astype(np.float64), "float64"),
        "value": (good.vector * np.nan, "not finite"),
        "nothing": (good.vector * 0, "no usable frame"),
    }.values():
        refused(lambda v=vector: gallery.add({"fine": good, "bad": Clip("x", v)}), "'bad'", word)
    refused(lambda: gallery.add({"a\nb": good}), "control")
    refused(lambda: gallery.add({"bad": good._replace(identity=" ")}), "empty")
    refused(lambda: gallery.add({"x" * 1001: good}), "longer than 1,000 letters")
    longest = "\N{GRINNING FACE}" * 1000
    gallery.add({longest: good._replace(identity=longest)})
    assert People(gallery.folder).clips[longest].identity == longest
    assert "fine" not in gallery.clips


def test_vectors_that_are_too_wide_to_be_read_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(people_lib, "MOST_WIDTH", 12)
    refused(lambda: made_galleries.make(tmp_path / "g"), "13 numbers are too wide")
    assert not (tmp_path / "g").exists()


def test_a_clip_is_enrolled_once(gallery):
    old = CLIPS["clip 30"]
    assert gallery.add({"clip 30": old}) == 0 and gallery.version == 1
    refused(
        lambda: gallery.add({"new": old, "clip 30": old._replace(identity="person 1")}),
        "'clip 30' is enrolled as 'person 3', not 'person 1'",
        "remove G --clip=clip 30",
    )
    other = old._replace(vector=-old.vector)
    refused(lambda: gallery.add({"clip 30": other}), "another vector", "--clip=clip 30")
    assert "new" not in gallery.clips and gallery.version == 1


def test_names_that_are_not_there(gallery):
    refused(lambda: gallery.remove(identities=["persn 3"]), "did you mean 'person 3'?")
    refused(lambda: gallery.remove(clips=["clip 30", "clop 31"]), "did you mean 'clip 31'?")
    assert gallery.version == 1
    gallery.remove(identities=list(gallery.identities))
    refused(gallery.refit, "nobody enrolled")
    refused(lambda: gallery.threshold(0.5), "nobody enrolled")
