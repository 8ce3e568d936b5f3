"""Random mutations of every file of a run, under every command that reads a run's folder.

A small run is trained. Then each mutation is made in a fresh copy of it, once per mode. A mode has
to end within 10 s of processor time and 1 GB, with exit code 0, 2 or 3, with at most three lines of
error, and may change nothing outside of the copy. Everything runs in this process.
"""

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.helpers import clip_files
from vidjax.cli import program as vidjax_main
from vidjax.runs import checkpoint
from vidjax.utils import files

ROOT = Path(__file__).parents[2]
MODES = ("check", "config", "rank", "report", "compare", "evaluate", "again", "resume")
SECONDS, MEMORY, LINES = 10, 1 << 30, 3
WEIRD: tuple[Any, ...] = (
    None, True, -1, 0, 10**18, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 20_000,
    "<script>alert(1)</script>", "../../../etc/passwd", "\x00\n\x1b[2J", [], {}, [[[]]] * 1000,
    {"a": {"b": 1}},
)  # fmt: skip


class TooLong(BaseException):
    """A command hangs. No error that a command may take for one of its own."""


class Trial(NamedTuple):
    """One mutation under one mode: what came of it, and what was wrong with that."""

    file: str
    mutation: str
    mode: str
    code: int | None
    wrong: str


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"0")
    for _ in range(rng.choice((1, 1, 1, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def insert(path: Path, rng: random.Random) -> None:
    content, junk = path.read_bytes(), rng.randbytes(rng.choice((1, 8, 5000)))
    place = rng.randrange(len(content) + 1)
    path.write_bytes(content[:place] + junk + content[place:])


def repeat(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    path.write_bytes(content[:end] + content[begin:])


def nest(path: Path, rng: random.Random) -> None:
    depth = rng.choice((50, 900, 200_000))
    path.write_bytes(b"[" * depth + b"]" * depth)


def remove(path: Path, rng: random.Random) -> None:
    del rng
    path.unlink()


KINDS = ("pipe", "folder", "link", "zero", "nothing", "sparse")


def put(path: Path, kind: str, target: Path) -> None:
    """Puts one of KINDS in the place of a file, if there is one; a link leads to the target."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 30 << 30)
    else:
        other = {"zero": Path("/dev/zero"), "nothing": target.with_name("absent")}
        path.symlink_to(other.get(kind, target))


def replace(path: Path, rng: random.Random) -> None:
    """Puts something else in the place of a file."""
    put(path, rng.choice(KINDS), VICTIM[0])


VICTIM = [Path("/nonexistent")]  # the file outside of the run that links lead to


def add(path: Path, rng: random.Random) -> None:
    """Puts a pipe, a link, an endless file, or text beside a file."""
    beside = path.with_name(rng.choice(("_CHECKPOINT_METADATA.2", "a.npz", "x.json", ".zarray")))
    beside.touch()
    replace(beside, rng) if rng.random() < 0.8 else beside.write_text("{}")


def link_folder(path: Path, rng: random.Random) -> None:
    """Moves a folder above a file out of the run, and puts a link in its place."""
    inside = path.parents[: len(path.parts) - len(COPY[0].parts) - 1]
    if not inside:
        return replace(path, rng)
    folder, elsewhere = rng.choice(inside), VICTIM[0].with_name("elsewhere")
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)


def forge(path: Path, rng: random.Random) -> None:
    """Adds an older checkpoint that names files outside, behind a link, to be dropped."""
    del path
    checkpoints = COPY[0] / "checkpoints"
    newest = checkpoints / str(max(checkpoint.manifests(COPY[0])))
    forged = checkpoints / rng.choice(("0", ".partial/0", "1"))
    forged.mkdir(parents=True, exist_ok=True)
    (forged / "state").symlink_to(VICTIM[0].parent, target_is_directory=True)
    listed = {VICTIM[0].name: hashlib.sha256(VICTIM[0].read_bytes()).hexdigest()}
    manifest = checkpoint.read_manifest(newest) | {"step": int(forged.name), "files": listed}
    files.write_manifest(forged / "manifest.json", manifest)


COPY = [Path("/nonexistent")]  # the run that is mutated


def change_value(path: Path, rng: random.Random) -> None:
    """Changes a value or a key of JSON; the digest of a manifest is made to agree."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        whole = path.suffix != ".jsonl"
    except ValueError:
        lines, whole = [], True
    try:
        value = json.loads(path.read_text()) if whole else rng.choice(lines)
    except (ValueError, IndexError):
        return flip(path, rng)
    _change(value, rng)
    if path.name == "manifest.json" and isinstance(value, dict):
        value.pop("sha256", None)
        files.write_manifest(path.parent / "manifest.json", value)
    else:
        path.write_text(json.dumps(value) if whole else "\n".join(map(json.dumps, lines)) + "\n")


def _change(value: Any, rng: random.Random) -> None:
    while isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        if isinstance(value, dict) and rng.random() < 0.3:
            value[rng.choice(("", "<b>", "x" * 3000))] = value.pop(key)
        else:
            value[key] = rng.choice(WEIRD)
        return


def change_array(path: Path, rng: random.Random) -> None:
    """Changes an array of an archive, or the JSON that it holds."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(list(arrays))
    array = arrays[name]
    if name in ("facts", "members") and rng.random() < 0.8:
        value = json.loads(array.tobytes())
        _change(value, rng)
        arrays[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)
    else:
        array = np.atleast_1d(array)
        arrays[name] = rng.choice(
            (
                array[..., :0], np.repeat(array, 50, 0), array.astype(np.complex64),
                np.array(["<b>"] * 3), np.zeros((3000, 3000), np.float32), array[None],
                np.full(array.shape, np.nan), np.full(array.shape, -(1 << 40), np.int64),
            )
        )  # fmt: skip
    np.savez_compressed(path, **arrays)
    if (manifest := path.parent / "manifest.json").exists():  # of a part: let its digests agree
        value = json.loads(manifest.read_text())
        value["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        del value["sha256"]
        files.write_manifest(path.parent / "manifest.json", value)


def mutations_of(name: str) -> list[Callable[[Path, random.Random], None]]:
    """Returns the mutations that make sense for a file."""
    common = [flip, cut, insert, repeat, nest, remove, replace, replace, add, link_folder, forge]
    if name.endswith((".json", ".jsonl")):
        return [*common, *[change_value] * 10]
    return [*common, *[change_array] * 10] if name.endswith(".npz") else common


def make_run(folder: Path) -> tuple[Path, list[str]]:
    """Trains the run that is mutated; returns its folder and the words of its training."""
    os.environ["VIDJAX_CACHE"] = str(folder / "cache")
    data, run = folder / "data", folder / "run"
    words = [
        f"--config={ROOT}/configs/quality_fusion.py:iqiyi_vid",
        "--config.data.name=iqiyi_vid", f"--config.data.dir={data}", "--config.batch_size=8",
        "--config.num_epochs=2",
    ]  # fmt: skip
    if not (run / "report.html").exists():
        data.mkdir(parents=True, exist_ok=True)
        clip_files.write_learnable(data)
        if vidjax_main.main([*words, f"--workdir={run}"]):
            raise SystemExit("the run that is to be mutated could not be trained")
    (folder / "new").mkdir(exist_ok=True)
    for number in range(3):  # clips to rank
        face = np.random.default_rng(number).normal(size=(2, clip_files.WIDTHS["face"]))
        np.savez(folder / "new" / f"{number}.npz", face=face.astype(np.float32))
    victim = folder / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "mine.txt").write_text("mine\n")
    VICTIM[0] = victim / "mine.txt"
    return run, words


def files_of(run: Path) -> list[Path]:
    """Returns the files of a run that some mode reads, relative to its folder."""
    paths = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    skipped = ("events.", "report", "timing")
    kept = [path for path in paths if not path.name.startswith(skipped)]
    state = [path for path in kept if "state" in path.parts]
    return sorted(set(kept) - set(state)) + sorted(state)[:3]


def words_of(mode: str, run: Path, copy: Path, training: list[str]) -> list[str]:
    """Returns the command of a mode on the mutated copy."""
    if mode in ("again", "resume"):
        more = ["--config.num_epochs=3"] if mode == "resume" else []
        return [*training, f"--workdir={copy}", *more]
    if mode == "compare":
        return ["--mode=compare", f"--workdir={copy.parent}/out", f"--runs={run},{copy}"]
    words = [f"--mode={mode}", f"--workdir={copy}"]
    if mode == "rank":
        words += [f"--input={run.parent / 'new'}", f"--out={copy.parent / 'ranked.tsv'}"]
    return words


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Interrupts what takes longer than it may."""

    def ring(signum: int, frame: object) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)  # what every thread waits for
        raise TooLong(f"longer than {6 * SECONDS} s of wall time")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_mode(words: list[str]) -> tuple[int | None, str]:
    """Runs a command in this process; returns its exit code and what was wrong."""
    out, err = io.StringIO(), io.StringIO()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(action="ignore"),
        alarm(),
    ):
        code = vidjax_main.main(words)
    seconds = time.process_time() - began  # of this process: the machine may be busy
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    *_, said = f"\n{err.getvalue()}".split("\nvidjax:")  # the error, or all where there is none
    is_told = "\nvidjax:" in f"\n{err.getvalue()}" or words[0] == "--mode=check"
    wrong = []
    if code not in (0, 2, 3):
        wrong.append(f"exit code {code}")
    if "Traceback" in err.getvalue() + out.getvalue():
        last = err.getvalue().strip().splitlines()[-1][:300]
        wrong.append(f"traceback: {last} {places(err.getvalue())}")
    elif code and (len(said.strip().splitlines()) > LINES or not is_told):
        wrong.append(f"not an error of one to three lines: {said[:300]}")
    if seconds > SECONDS:
        wrong.append(f"{seconds:.0f} s")
    if grown > MEMORY:
        wrong.append(f"{grown / 1e9:.1f} GB")
    return code, "; ".join(wrong)


def places(trace: str) -> str:
    """Returns the last lines of code in the text of a traceback, the innermost one last."""
    lines = re.findall(r'File ".*/(.+)", line (\d+)', trace)[-8:]
    return " > ".join(":".join(line) for line in lines)


def digest(*folders: Path) -> str:
    """Returns a digest of names and contents of all files in some folders."""
    sha256 = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            sha256.update(str(path).encode())
            sha256.update(path.read_bytes() if path.is_file() else b"")
    return sha256.hexdigest()


def trials(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Yields the result of `count` mutations under every mode; the folder is for run and copies."""
    run, training = make_run(folder)
    for mode in MODES:  # compiles what a mode runs, which is not the mutation's time
        shutil.rmtree(folder / "copies", ignore_errors=True)
        shutil.copytree(run, folder / "copies" / "copy")
        run_mode(words_of(mode, run, folder / "copies" / "copy", training))
    names, rng = files_of(run), random.Random(seed)
    outside = (folder / "victim", folder / "data", folder / "new", run)
    for number in range(count):
        name = names[number % len(names)]
        mutate, choice = rng.choice(mutations_of(name.name)), rng.random()
        for mode in MODES:
            copy = COPY[0] = folder / "copies" / "copy"
            shutil.rmtree(copy.parent, ignore_errors=True)
            shutil.copytree(run, copy)
            mutate(copy / name, random.Random(choice))
            before = digest(*outside)
            try:
                code, wrong = run_mode(words_of(mode, run, copy, training))
            except (Exception, TooLong) as error:
                trace = "".join(traceback.format_exception(error))
                code, wrong = None, f"{type(error).__name__}: {error} {places(trace)}"
            if digest(*outside) != before:
                wrong += "; something outside was changed"
            yield Trial(str(name), f"{mutate.__name__} {choice}", mode, code, wrong)
