"""Times of converting clips into records by one worker and by two.

    python -m tests.benchmarks.conversion [--clips=20000] [--frames=30] [--rounds=5]

Clips with face and head as pickles, the same as `.npz` files, and faces as parquet tables. The
workers take turns, and all must write the same files.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks import common
from tests.helpers import clip_files
from tests.helpers.clip_files import random_clip, write_pickle


def write_npz(folder: Path, args: argparse.Namespace) -> None:
    """Writes a file per clip."""
    rng = np.random.default_rng(0)
    frames = {n: random_clip(rng, args.frames, 512).features for n in ("face", "head")}
    clip_files.write_npz(folder, {"train": {f"clip_{n:06d}": frames for n in range(args.clips)}})


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
                seconds[name].append(common.timed([*command, f"--cache_dir={cache}"])[0])
                digests.add(digest(cache))
                shutil.rmtree(cache)
    if len(digests) > 1:
        raise SystemExit(f"{kind}: the engines wrote other files")
    return seconds


def main() -> None:
    """Prints the seconds of every engine, and how many times it is faster than one process."""
    args = common.parse(__doc__, clips=20_000, frames=30, rounds=5)
    rows: list[list[str]] = [[f"{name}, s"] for name in ENGINES]
    rows += [[f"{name} are faster by"] for name in ENGINES if name != ONE]
    for kind in SOURCES:
        seconds = time_engines(kind, args)
        cells = [f"{common.median(found):.1f}" for found in seconds.values()]
        cells += [common.ratio(seconds, ONE, name) for name in ENGINES if name != ONE]
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    common.write_table(["engine", *SOURCES], rows)


if __name__ == "__main__":
    main()
