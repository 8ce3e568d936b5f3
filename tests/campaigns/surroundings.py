"""Commands in other surroundings: the same bytes, no network, nothing written elsewhere.

    python -m tests.campaigns.surroundings FOLDER [--only=NAME,NAME]

A small run is trained, checked, evaluated and asked to rank: once as ever, then in each of PLACES,
which differ in language, time zone, hash seed, cores, order of listings, network and more. Results
must be the same to the bit, and the commands may write nothing but what they are told to. Then
processes work at once: four with one empty cache, readers beside a training, twenty on a gallery.
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.campaigns.same_bytes import digests
from tests.helpers import clip_files, made_galleries
from vidjax.gallery.gallery import Gallery

ROOT = Path(__file__).parents[2]
TRAIN = (
    f"--config={ROOT}/configs/quality_fusion.py:iqiyi_vid", "--config.batch_size=32",
    "--config.num_epochs=2", "--config.eval.every_epochs=1",
)  # fmt: skip
# Modules of the standard library and of others, which a stranger's folder may hold, too.
SHADOWS = ("json", "numpy", "typing", "argparse", "jax", "tensorflow", "yaml", "vidjax_config")
NO_NETWORK = ("unshare", "-rn")
# Calls that write, in the words of strace.
WRITES = re.compile(
    r'(?:\d+ +)?(?:openat\([^"]*"(?P<opened>[^"]*)", [^)]*O_(?:WRONLY|RDWR|CREAT)'
    r'|(?:unlink|unlinkat|mkdir|mkdirat|rmdir|symlink|symlinkat|truncate|chmod|fchmodat|rename|'
    r'renameat2?|linkat)\([^"]*"(?P<changed>[^"]*)")'
)  # fmt: skip


class Place(NamedTuple):
    """Surroundings in which commands run.

    Attributes:
      env: variables.
      before: words before the interpreter.
      flags: of the interpreter.
      shadowed: whether the present folder holds modules that no command may run.
      reversed: whether the data's files were made in the opposite order.
    """

    env: Mapping[str, str] = {}
    before: Sequence[str] = ()
    flags: Sequence[str] = ()
    shadowed: bool = False
    reversed: bool = False


ODD = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1", "COLUMNS": "20"}
PLACES: Mapping[str, Place] = {
    "as ever": Place(),
    "language": Place({"LC_ALL": "C"}),
    "turkish": Place({"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}),
    "time zone": Place({"TZ": "Pacific/Kiritimati"}),
    "hash seed": Place({"PYTHONHASHSEED": "1"}),
    "one core": Place(before=("taskset", "-c", "0")),
    "listing order": Place(reversed=True),
    "-O": Place(flags=("-O",)),
    "-W error": Place(flags=("-W", "error")),
    "no network": Place(before=NO_NETWORK),
    "shadowed": Place(shadowed=True),
    "traced": Place(
        before=("strace", "-f", "-qq", "-e", "trace=%file", "-s", "4096", "-o", "TRACE")
    ),
    "all": Place(ODD, (*NO_NETWORK, "taskset", "-c", "0"), ("-O", "-W", "error"), True, True),
}


class Chain(NamedTuple):
    """A training and what follows it, in folders of its own.

    Attributes:
      folder: holds everything that the commands may write.
      place: the surroundings.
      data: the official files.
    """

    folder: Path
    place: Place
    data: Path

    def environment(self) -> dict[str, str]:
        """Returns the variables of its commands."""
        homes = {"HOME": "home", "TMPDIR": "tmp", "VIDJAX_CACHE": "cache", "XDG_CACHE_HOME": "xdg"}
        kept = {name: str(self.folder / value) for name, value in homes.items()}
        quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": ""}
        paths = {
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MPLCONFIGDIR": kept["TMPDIR"],
        }
        return {**os.environ, **quiet, **paths, **kept, **self.place.env}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts a command in a folder of its own."""
        trace = str(self.folder / f"trace.{time.monotonic_ns()}")
        before = [trace if word == "TRACE" else word for word in self.place.before]
        command = [*before, sys.executable, *self.place.flags, "-m", "vidjax", *words]
        return subprocess.Popen(
            command, cwd=self.folder / "here", env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def prepare(self) -> None:
        """Makes its folders."""
        for name in ("home", "tmp", "here"):
            (self.folder / name).mkdir(parents=True)
        for name in SHADOWS if self.place.shadowed else ():
            text = f"open({str(self.folder / 'home' / name)!r}, 'w')\n"
            (self.folder / "here" / f"{name}.py").write_text(text)

    def words(self) -> Iterator[list[str]]:
        """Yields the words of its commands, one after another."""
        run = f"--workdir={self.folder / 'run'}"
        yield [*TRAIN, f"--config.data.dir={self.data}", run]
        yield ["--mode=check", run]
        yield ["--mode=evaluate", run, "--config.eval.split=test"]
        out = f"--out={self.folder / 'ranked.tsv'}"
        yield ["--mode=rank", run, f"--input={self.data / 'new'}", out]

    def run(self) -> list[str]:
        """Runs its commands; returns what was wrong."""
        self.prepare()
        wrong = []
        for words in self.words():
            wrong += ended(self.start(*words), words)
        left = [*(self.folder / "home").rglob("*"), *(self.folder / "here").glob("*")]
        made = [path for path in left if path.stem not in SHADOWS or path.parent.name == "home"]
        wrong += [f"wrote {path}" for path in made]
        traces = [path.read_text() for path in self.folder.glob("trace.*")]
        return wrong + sorted({f"wrote {path}" for text in traces for path in self.outside(text)})

    def outside(self, trace: str) -> Iterator[str]:
        """Yields the paths that the calls in a trace write, but for its own folder."""
        for line in trace.splitlines():
            found = WRITES.match(line)
            path = found and (found["opened"] or found["changed"])
            if not path or " = -1 " in line or not path.startswith("/"):
                continue
            if not path.startswith((str(self.folder), "/dev/", "/proc/self/", "/proc/thread-self")):
                yield path

    def digests(self) -> dict[str, str]:
        """Returns the digests of its results."""
        return {**digests(self.folder / "run"), "ranked": (self.folder / "ranked.tsv").read_text()}


def ended(
    process: subprocess.Popen[str], words: Sequence[str], codes: Sequence[int] = (0,)
) -> list[str]:
    """Waits for a command; returns what was wrong with its end."""
    out, err = process.communicate(timeout=600)
    if process.returncode in codes and "Traceback" not in err + out:
        return []
    return [f"{' '.join(words[:2])}: exit code {process.returncode}: {err.strip()[-600:]}"]


def write_data(folder: Path, *, backwards: bool = False) -> Path:
    """Writes official files, and clips to rank, in one order or the opposite one."""
    made = folder.with_name(f"{folder.name}.made")
    (made / "new").mkdir(parents=True)
    clip_files.write_learnable(made)
    rng = np.random.default_rng(0)
    for number in range(9):
        face = rng.normal(size=(3, clip_files.WIDTHS["face"])).astype(np.float32)
        np.savez(made / "new" / f"{number}.npz", face=face)
    for path in sorted(made.rglob("*.*"), reverse=backwards):
        target = folder / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    shutil.rmtree(made)
    return folder


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns the names of digests that differ."""
    return [
        f"{name} differs"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


# ---- at once


def one_cache(folder: Path, data: Path, base: Mapping[str, str]) -> list[str]:
    """Four processes with one empty cache give the same results."""
    chains = [
        Chain(folder / str(number), Place({"VIDJAX_CACHE": str(folder / "cache")}), data)
        for number in range(4)
    ]
    for chain in chains:
        chain.prepare()
    wrong = []
    for step in range(4):
        words = [list(chain.words())[step] for chain in chains]
        started = [chain.start(*one) for chain, one in zip(chains, words, strict=True)]
        wrong += [
            text
            for process, one in zip(started, words, strict=True)
            for text in ended(process, one)
        ]
    return wrong + [text for chain in chains for text in differences(base, chain.digests())]


def beside_training(folder: Path, data: Path, base: Mapping[str, str]) -> list[str]:
    """Readers of a folder in which a training writes end in order, and do not disturb it."""
    chain, wrong = Chain(folder, Place(), data), []
    chain.prepare()
    first, *others = chain.words()
    training = chain.start(*first)
    readers = [others[0], [others[1][0], others[1][1]], ["--mode=report", others[0][1]]]
    while training.poll() is None:
        for words in readers:
            wrong += ended(chain.start(*words), words, (0, 2, 3))
    wrong += ended(training, first)
    for words in others:
        wrong += ended(chain.start(*words), words)
    return wrong + differences(base, chain.digests())


def on_a_gallery(folder: Path, data: Path, base: Mapping[str, str]) -> list[str]:
    """Twenty processes of one gallery lose no change, and read no torn state."""
    del data, base
    made_galleries.make(folder / "g")
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_change, args=(folder / "g", number)) for number in range(20)]
    with warnings.catch_warnings(action="ignore"):  # JAX has no threads yet
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(600)
    wrong = [f"worker {n}: {w.exitcode}" for n, w in enumerate(workers) if w.exitcode]
    people = Gallery(folder / "g")
    there = {name for name in people.clips if name.startswith("new")}
    wanted = {f"new {number} {turn}" for number in range(20) for turn in range(1, 5, 2)}
    return wrong + [f"lost or left: {sorted(there ^ wanted)}"] * (there != wanted)


def _change(folder: Path, number: int) -> None:
    """Adds clips to a gallery one by one, takes every second one back, and reads between."""
    rng = random.Random(number)
    for turn in range(5):
        name, people = f"new {number} {turn}", Gallery(folder)
        _again(
            lambda p=people, n=name, t=turn: p.add(
                {n: made_galleries.make_clip(9000 + 10 * number + t, f"person {number}")}
            )
        )
        if turn % 2 == 0:
            _again(lambda p=people, n=name: p.remove(clip=[n]))
        assert (name in Gallery(folder).clips) == (turn % 2 == 1)
        time.sleep(rng.random() / 20)


def _again(change: Callable[[], object]) -> None:
    """Makes a change, again while another process makes one."""
    for _ in range(200):
        try:
            change()
            return
        except ValueError as error:
            if "process " not in str(error):
                raise
            time.sleep(0.05)
    raise TimeoutError("never in turn")


TOGETHER = {"one cache": one_cache, "beside training": beside_training, "gallery": on_a_gallery}


def trials(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of each place, or of what runs at once, and what was wrong there."""
    data = write_data(folder / "data")
    first = Chain(folder / "as ever", PLACES["as ever"], data)
    yield "as ever", first.run()
    base = first.digests()
    for name in names:
        below = folder / name.replace(" ", "_")
        if name in TOGETHER:
            below.mkdir()
            yield name, TOGETHER[name](below, data, base)
            continue
        place = PLACES[name]
        if place.before and not all(
            shutil.which(word) for word in place.before if word[0].islower() and "-" not in word
        ):
            yield name, []  # the system has no such program
            continue
        files = write_data(below / "data", backwards=True) if place.reversed else data
        chain = Chain(below, place, files)
        wrong = chain.run()
        yield name, wrong or differences(base, chain.digests())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign; returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.surroundings")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join([*list(PLACES)[1:], *TOGETHER]))
    args = parser.parse_args(argv)
    failed = False
    for name, wrong in trials(args.folder.absolute(), args.only.split(",")):
        failed |= bool(wrong)
        sys.stdout.write(f"{name}: {'; '.join(wrong) or 'as it should be'}\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
