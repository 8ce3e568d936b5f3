"""`vidjax export` at official size: time, memory, bytes on disk, and the difference to our scores.

    python -m tests.benchmarks.export [--people=10034] [--systems=mma]

A run of each system, of published size, takes one step on made-up clips, one for each person, and
leaves in every format. Each export is a process of its own, whose time and peak memory include
JAX, the weights as safetensors, and the comparison; `MB` is the folder, weights included.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import vidjax
from tests.benchmarks import common
from vidjax.export.commands import NAMES

SYSTEMS = "mma"  # such as mma,residual_dense:one, which is seven times as large
WORDS = (  # one step, of few clips, by an optimiser without a state
    "--config.data.name=arrays",
    "--config.batch_size=16",
    "--config.num_epochs=0.001",
    "--config.optim.name=sgd",
    "--config.optim.momentum=0.0",
    "--config.eval.report=False",
)
RUN = """\
import sys
from vidjax import main
code = main.main(sys.argv[1:])
with open("/proc/self/status") as file:
    print(next(line for line in file if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def make_run(system: str, people: int, folder: Path) -> Path:
    """Returns the folder of a run that knows so many people."""
    name, _, word = system.partition(":")
    config = vidjax.load_config(f"{name}:{','.join(filter(None, ['iqiyi_vid', word]))}", *WORDS)
    rng, clips = np.random.default_rng(0), {}
    for split, count in {"train": people, "val": 16}.items():
        features = rng.normal(size=(len(config.modalities), count, 1, common.DIM))
        each = dict(zip(config.modalities, features.astype(np.float16), strict=True))
        clips[split] = {f"{split}{i}": {m: x[i] for m, x in each.items()} for i in range(count)}
    labels = {f"train{i}": f"person {i}" for i in range(people)}
    labels |= {f"val{i}": f"person {i}" for i in range(16)}
    data = vidjax.load_data(clips, labels, cache_dir=folder / "cache")
    vidjax.train(config, folder / system, data)
    return folder / system


def export(run: Path, to: Path, name: str) -> list[str]:
    """Exports a run and returns the cells of a row of the table."""
    words = ["export", str(run), f"--to={to}", f"--format={name}", "--json"]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    cells = [run.name, name, f"{time.monotonic() - began:.0f}"]
    try:
        *_, said, peak = done.stdout.strip().splitlines()
        told = json.loads(said)
    except ValueError:  # killed
        return [*cells, "", "", done.stderr.strip()[-200:]]
    cells.append(f"{int(peak) / 1024:,.0f}")
    if done.returncode:
        return [*cells, "", told["error"].splitlines()[0]]
    shutil.rmtree(to)
    return [*cells, f"{told['bytes'] / 1e6:,.0f}", f"{told['difference']:.1e}"]


def benchmark(systems: str, people: int) -> None:
    """Prints the table."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for system in systems.split(","):
            run = make_run(system, people, folder)
            for name in NAMES:
                rows.append(export(run, folder / "out", name))
                sys.stderr.write(f"{rows[-1]}\n")
    sys.stdout.write(f"{common.describe()}; {people:,} people\n\n")
    common.write_table(["system", "format", "s", "MiB of memory", "MB", "difference"], rows)


if __name__ == "__main__":
    args = common.parse(__doc__, people=10_034, systems=SYSTEMS)
    benchmark(args.systems, args.people)
