"""A file that has taken over the process that reads it may answer anything, without an effect."""

import importlib
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")
pytest.importorskip("pyarrow", reason="needs the extra [parquet]")

import pyarrow
from pyarrow import parquet as writer

from tests.helpers import clip_files as made, family_nets, films
from tests.helpers.drawn_people import write_film, write_models, write_photo
from tests.helpers.seen import contents
from vidjax.apps import forget as traces
from vidjax.apps.video import media, net_checks, net_families, pipeline, still
from vidjax.data import parquet
from vidjax.data.memory import load_clips
from vidjax.utils import processes
from vidjax.utils.errors import UserError

DEEP = json.loads("[" * 90 + "]" * 90)
NEVER = object()  # a missing key
WRONG = [
    NEVER, None, True, -1, 3, 1 << 31, 1 << 70, 1e308, float("nan"), float("inf"), "", "1",
    "friend", "../../x", "/etc/passwd", "x.onnx\n", "a\nb\n\x1b[31mc\nd", "\ud800", "x" * 300, [],
    [1], {}, {"a": 1}, [-1, 5], DEEP,
]  # fmt: skip
LINES = [
    "", "{", "null", "[]", '"result"', "NaN", '{"result": null}', '{"result": {}}', "9" * 5000,
    '{"result": []}', '{"result": [[], []]}', '{"error": 1}', '{"error": "1\\n2\\n3\\n4\\n5"}',
    '{"net_error": []}', '{"net_error": "made up"}', '{"os_error": "x", "errno": "y"}',
    '{"os_error": "x", "errno": 1e9}', "[" * 100_000, "\x00\x1b[31m", '{"result": 1}\n{}\n{}',
]  # fmt: skip
FACES = {
    name: made.random_clip(np.random.default_rng(0), frames, 3)
    for name, frames in {"a": 3, "b": 2}.items()
}


def spoil(value):
    """Yields JSON values in which a single part of `value` is wrong, missing or added."""
    yield from WRONG
    if isinstance(value, list):
        yield from (value * 2, value[:-1], value[::-1])
    if isinstance(value, dict):
        yield value | {"unknown": 1}
    parts = dict(enumerate(value[:2])) if isinstance(value, list) else value
    for key in parts if isinstance(value, list | dict) else ():
        for wrong in spoil(value[key]):
            copy = value.copy()
            copy[key] = wrong
            if wrong is NEVER:
                del copy[key]
            yield copy


class TakenOver:
    """A child that works once, and then gives the answer `line` with the files of its work."""

    def __init__(self):
        self.answer, self.line, self.files, self.last = {}, b"", [], {}

    def run(self, module, *, given, **limits):
        jobs = json.loads(given)
        folders = [Path(folder) for folder in jobs["writes"]]
        if not self.files:
            work = importlib.import_module(module).work
            self.answer = processes._answer(work, jobs["given"][0][0], jobs["given"][0][1], "")
            self.line = json.dumps(self.answer).encode() + b"\n"
            self.files = [contents(folder) for folder in folders] or [{}]
        for folder, known in zip(folders, self.files, strict=False):
            for name, content in known.items():
                (folder / name).write_bytes(content)
        return subprocess.CompletedProcess([], 0, self.line, b"")


def play(patch, child):
    patch.setattr(processes.Children, "run", lambda _, *given, **more: child.run(*given, **more))


def read_pickle(folder):
    made.write_pickle(folder, "face", "train", FACES)
    return lambda: load_clips(folder, {"face": 3}, ()) and None


def read_table(folder):
    fields = {name: {"face": clip._asdict()} for name, clip in FACES.items()}
    path = made.write_parquet(folder / "x.parquet", fields, fields=["quality"])
    return lambda: load_clips(path, {"face": 3}, ()) and None


def search_table(folder):
    path = made.write_parquet(folder / "x.parquet", {"a": {"face": FACES["a"].features}})
    return lambda: traces.Traces(["Eve"], [], []).in_file(path)


def read_labels(folder):
    table = pyarrow.table({"clip": ["a"], "identity": ["Ada"]})
    writer.write_table(table, folder / "x.parquet")
    return lambda: [*parquet.read_labels(folder / "x.parquet")] == [(1, "a", "Ada")]


def convert_net(folder):
    (folder / "net.onnx").write_bytes(family_nets.embedder())
    out = folder / "out"

    def act():
        shutil.rmtree(out, ignore_errors=True)
        net_families.convert("own", [folder / "net.onnx"], out, "arcface")
        copied = (out / "net.onnx").read_bytes() == (folder / "net.onnx").read_bytes()
        return copied and {x.name for x in out.iterdir()} == {"net.onnx", "net.json"}

    return act


def check_net(folder):
    check = net_checks.list_checks(write_models(folder / "models"))["embed.json"]
    return lambda: "\n" not in check()


def read_still(folder):
    (folder / "x.png").write_bytes(films.photo(np.zeros((9, 9, 3), np.uint8), "png"))
    return lambda: isinstance(still.read_still(folder / "x.png", 0.0), bytes)


def read_media(folder, ending):
    path, friend, out = folder / f"x{ending}", folder / "friend.png", folder / "out"
    write_photo(friend, ("Bob", 20, 30))
    if ending == ".png":
        faces = ("Ada", 20, 20), ("Eve", 70, 40)
        write_photo(path, *faces, tagged=[faces[0], ("Zoe", 60, 70)])
    else:
        write_film(path, (1, 20, [("Ada", 20, 30)]), (1, 60, [("Eve", 80, 50)]))
    given = {
        "models": write_models(folder / "models"),
        "thumbnails": True,
        "tagged": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        play(patch, TakenOver())
        pipeline.extract_files([friend], out, **given)
    known, (friend,) = contents(out), media.describe_media_files(out)

    def act():
        for stem in media.describe_media_files(out).keys() - {friend}:
            media.remove_media_file(out, stem)
        outcome = pipeline.extract_files([path], out, **given)[0]
        if outcome.error:
            raise UserError(outcome.error)
        ((stem, film),) = (
            (x, y) for x, y in media.describe_media_files(out).items() if x != friend
        )
        assert film.digest and isinstance(film.faces, dict)
        wanted = media.FileStamp.of(path, [path] if film.source.sidecars else ())
        right = (film.source.path, film.video) == (path.resolve(), path.name)
        own = (f"{stem}.", f"videos/{stem}.", f"thumbnails/{stem}/")
        names = {x for x in contents(out) if not x.startswith(own)}
        return right and wanted.size == film.source.size and names == {*known}

    return act


KINDS = {
    "pickle": read_pickle,
    "table": read_table,
    "searched table": search_table,
    "labels": read_labels,
    "net to convert": convert_net,
    "net to check": check_net,
    "nets": lambda folder: partial(
        pipeline.check_nets, write_models(folder / "models"), pipeline.ExtractionSettings()
    ),
    "still": read_still,
    "film": partial(read_media, ending=".mkv"),
    "photo": partial(read_media, ending=".png"),
}


STEPS = {"film": 60, "photo": 60, "net to convert": 7}  # of all answers, every 60th is tried


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::vidjax.utils.errors.VidjaxWarning")
def test_taken_over_child_causes_an_error_or_nothing(kind, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    act, child = KINDS[kind](folder), TakenOver()
    play(monkeypatch, child)
    assert act() is not False
    before = contents(folder, ("out",))
    answers = [*({"result": x} for x in spoil(child.answer["result"]) if x is not NEVER)]
    faults, lines = [], [*LINES, *map(json.dumps, answers)]
    for line in lines[:: STEPS.get(kind, 2)]:
        child.line = line.encode() + b"\n"
        try:
            fine = act() is not False
        except (UserError, FileNotFoundError) as error:
            fine = 1 <= len(str(error).splitlines()) <= 3
        except Exception as error:
            fine = False
            line = f"{error!r}: {line}"
        if not fine or contents(folder, ("out",)) != before or len([*tmp_path.iterdir()]) > 1:
            faults.append(line[:300])
    assert not faults, "\n".join([str(len(faults)), *faults[:60]])
