"""Rate and peak memory of converting official pickles into records, and the cost of the cage.

    python -m tests.benchmarks.conversion [--clips=20000] [--frames=30] [--rounds=5] [--engines]

One face file. Peak memory is that of the converting process and its caged child together, sampled
every .1 s; the bound is 2 x the pickle + 1 GB. The cage is timed against `pickle.load` of the same
file, in turns, each in a process of its own: `sealed.load` alone, and the whole `pickles.unpack`,
which starts a child, checks every entry and writes flat files, too.

`--engines` compares one worker with two, in turns: 20,000 clips with face and head as pickles, the
same as `.npz` files, and the same as parquet tables. All must write the same files.
"""

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common
from tests.helpers.clip_files import random_clip, write_pickle
from tests.helpers.datasets import prepare

GIB = 1 << 30


def convert(source: str, cache: str) -> None:
    """Converts and prints the seconds it took; runs in a process of its own."""
    start = time.perf_counter()
    prepare(source, cache)
    sys.stdout.write(f"{time.perf_counter() - start}\n")


def load(how: str, path: str) -> None:
    """Reads a pickle and prints the seconds it took; runs in a process of its own."""
    import gc
    import pickle

    from vidjax.data.untrusted import sandbox, unpickle

    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        if how == "unpack":
            held = sandbox.unpack(path, "face", scratch)
        elif how == "sealed":
            gc.disable()  # as in the cage
            with open(path, "rb", buffering=sandbox.READ_BYTES) as file:
                held = unpickle.load(file, Path(path).stat().st_size)
        else:
            with open(path, "rb") as file:
                held = pickle.load(file, encoding="bytes")
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        del held


def write_npz(folder: Path, args: argparse.Namespace) -> None:
    """Writes a file per clip."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    frames: Any = {n: random_clip(rng, args.frames, 512).features for n in ("face", "head")}
    for number in range(args.clips):
        np.savez(folder / "train" / f"clip_{number:06d}.npz", **frames)


def write_pickles(folder: Path, args: argparse.Namespace) -> None:
    """Writes a file per modality."""
    folder.mkdir()
    for name in ("face", "head"):
        clip = random_clip(np.random.default_rng(0), args.frames, 512)
        clips = {f"clip_{number:06d}": clip for number in range(args.clips)}
        write_pickle(folder, name, "train", clips)


def write_parquet(folder: Path, args: argparse.Namespace) -> None:
    """Writes a table per split, half of the clips each."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    flat = random_clip(np.random.default_rng(0), 1000, 512).features
    rows = args.clips // 2 * args.frames
    for split in ("train", "val"):
        values = pyarrow.array(np.resize(flat, rows * 512))
        columns = {
            "clip": [f"{split}_{row // args.frames:06d}" for row in range(rows)],
            "modality": ["face"] * rows,
            "features": pyarrow.FixedSizeListArray.from_arrays(values, 512),
        }
        parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")


def digest(cache: Path) -> str:
    """Returns the sha256 of all shards and of the report of the one conversion in a cache."""
    sha256 = hashlib.sha256()
    paths = [*cache.rglob("*.tfrecord-*"), *cache.rglob("index.npz")]
    for path in sorted([*paths, *cache.rglob("data_report.json")], key=lambda path: path.name):
        sha256.update(path.read_bytes())
    return sha256.hexdigest()


ONE = "one worker"
ENGINES = {ONE: ["--workers=1"], "2 workers": ["--workers=2"]}
SOURCES = {
    "pickles": (write_pickles, "vidjax.data.iqiyi_vid"),
    "npz": (write_npz, "vidjax.data.arrays"),
    "parquet": (write_parquet, "vidjax.data.arrays"),
}


def compare_engines(args: argparse.Namespace) -> None:
    """Prints the seconds of every engine, and how many times it is faster than one process."""
    rows: list[list[str]] = [[f"{name}, s"] for name in ENGINES]
    rows += [[f"{name} are faster by"] for name in ENGINES if name != ONE]
    for kind in SOURCES:
        seconds = time_engines(kind, args)
        cells = [f"{common.median(found):.1f}" for found in seconds.values()]
        cells += [common.ratio(seconds, ONE, name) for name in ENGINES if name != ONE]
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    common.write_table(["engine", *SOURCES], rows)


def time_engines(kind: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of every engine in every round, in turns; all must write the same."""
    write, module = SOURCES[kind]
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    digests = set()
    with tempfile.TemporaryDirectory() as place:
        write(Path(place, "source"), args)
        for _ in range(args.rounds):
            for name, words in ENGINES.items():
                cache = Path(place, "cache")
                command = [sys.executable, "-m", module, f"{place}/source", *words]
                start = time.perf_counter()
                subprocess.run([*command, f"--cache_dir={cache}"], check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
                digests.add(digest(cache))
                shutil.rmtree(cache)
    if len(digests) > 1:
        raise SystemExit(f"{kind}: the engines wrote other files")
    return seconds


def loading_seconds(path: Path, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each way to read a pickle, the ways in turns."""
    seconds = {how: [] for how in ("pickle", "sealed", "unpack")}
    for _ in range(rounds):
        for how, found in seconds.items():
            found.append(float(common.run_again("conversion", "--load", how, str(path))))
    return seconds


def resident_bytes(root: int) -> int:
    """Returns the resident memory of a process and all below it, now."""
    parents, resident = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it ended meanwhile
            continue
        pid = int(fields["Pid"])
        parents[pid] = int(fields["PPid"])
        resident[pid] = 1024 * int(fields.get("VmRSS", "0").split()[0])
    family = {root}
    for pid in sorted(parents):
        if parents[pid] in family:
            family.add(pid)
    return sum(resident.get(pid, 0) for pid in family)


def main() -> None:
    """Prints faces per second and peak memory of one conversion."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", action="store_true", help="one worker or two")
    parser.add_argument("--load", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=2, metavar=("SOURCE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert)
        return
    if args.load:
        load(*args.load)
        return
    if args.engines:
        compare_engines(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        clip = random_clip(np.random.default_rng(0), args.frames, 512)
        clips = {f"clip_{number:06d}": clip for number in range(args.clips)}
        path = write_pickle(Path(folder), "face", "train", clips)
        size = path.stat().st_size
        command = [sys.executable, "-m", "tests.benchmarks.conversion", "--convert", folder]
        peak = 0
        with subprocess.Popen(
            [*command, f"{folder}/cache"], stdout=subprocess.PIPE, text=True
        ) as converter:
            while converter.poll() is None:
                peak = max(peak, resident_bytes(converter.pid))
                time.sleep(0.1)
            seconds = float(converter.communicate()[0])
        faces = args.clips * args.frames
        sys.stdout.write(
            f"{faces} faces, pickle {size / GIB:.2f} GiB, {seconds:.1f} s: "
            f"{faces / seconds:.0f} faces/s (15000 wanted)\n"
            f"peak {peak / GIB:.2f} GiB, {(2 * size + GIB) / GIB:.2f} allowed\n"
        )
        seconds = loading_seconds(path, args.rounds)
        plain = statistics.median(seconds["pickle"])
        times = {
            how: statistics.median(a / b for a, b in zip(found, seconds["pickle"], strict=True))
            for how, found in seconds.items()
        }
        sys.stdout.write(
            f"pickle.load {plain:.2f} s, median of {args.rounds}; "
            f"sealed.load {times['sealed']:.2f} x, "
            f"the whole pickles.unpack {times['unpack']:.2f} x (1.6 allowed)\n"
        )


if __name__ == "__main__":
    main()
