"""Trains every shipped configuration for a short time, and writes digests of the results.

    python -m tests.campaigns.same_bytes before.json
    ... change the code ...
    python -m tests.campaigns.same_bytes after.json --against=before.json

If a change of the code changes no number, no digest changes. The script uses only the command line
and Orbax, so it runs on different versions of the code. Both runs need the same processor.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[2]
VIDJAX = (sys.executable, "-m", "vidjax.main")
SHORT = ("--config.num_epochs=2", "--config.log_every_steps=3", "--config.eval.every_epochs=1")
PLAIN = (*SHORT, "--config.eval.report=False")
LAYER = "--config.model.layers=((32,'swish',True,0.5),)"
FOLDS = ("--config.ensemble.folds=3", "--config.ensemble.seeds=2")
VIEWS = ("--config.ensemble.only=0,2", "--config.model.main.hidden_dim=16")
STREAMED = ("--config.data.mode=streaming", "--config.mixup=0.4")
SMOOTHED = (
    "--config.loss.label_smoothing=0.1", "--config.mixup=0.2", "--config.data.balance=0.5",
    "--config.loss.schedule=((0.0,0.3),)",
)  # fmt: skip

# Name of a run and its folder -> (configuration, overrides).
RUNS: Mapping[str, tuple[str, Sequence[str]]] = {
    "mma": ("mma.py", SHORT),
    "cosine": ("cosine.py", SHORT),
    "knn": ("knn.py", SHORT[1:]),
    "plda": ("plda.py", SHORT),
    "quality_fusion": ("quality_fusion.py", (*SHORT, LAYER)),
    "residual_dense": ("residual_dense.py", (*PLAIN, "--config.model.main.width=32")),
    "deepmef": ("deepmef.py", SHORT),
    "noise_classes": ("noise_classes.py", (*SHORT, "--config.ensemble.folds=3")),
    "folds": ("quality_fusion.py:folds", (*PLAIN, LAYER, *FOLDS)),
    "views": ("deepmef.py:views", (*PLAIN, *VIEWS)),
    "vmap": ("mma.py:ensemble,face", (*SHORT, "--config.ensemble.mapping=vmap")),
    "streaming": ("mma.py:face,audio", (*PLAIN, *STREAMED)),
    "published": ("mma.py:published,face", (*PLAIN, "--config.dtype=bfloat16")),
    "smoothed": ("quality_fusion.py:mlp3", (*PLAIN, *SMOOTHED)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all runs and writes the digests; returns 1 if they differ from `--against`."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.same_bytes")
    parser.add_argument("out", type=Path, help="JSON of the digests, run by run")
    parser.add_argument("--against", type=Path, help="digests of an earlier version")
    parser.add_argument("--only", default="", help="names of runs, split by commas")
    parser.add_argument("--cache", help="folder of records and compiled programs to use")
    args = parser.parse_args(argv)
    wanted = [name for name in args.only.split(",") if name] or [*RUNS, "resumed", "blend"]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        env["VIDJAX_CACHE"] = args.cache or str(folder / "cache")
        for name in wanted:
            at = f"--workdir={folder / name}"
            spec, overrides = RUNS.get(name, RUNS["mma"])
            words = (f"--config=configs/{spec}", at, *overrides)
            if name == "blend":  # two runs score val together
                runs = f"--runs={folder / 'quality_fusion'},{folder / 'deepmef'}"
                words = ("--mode=evaluate", at, runs, "--config.join.weights=2,1")
            elif name == "resumed":
                stop(words, folder / name / "metrics.jsonl", env)
            run(words, env)
            if name in ("mma", "vmap"):
                run(("--mode=evaluate", at, "--config.eval.split=test"), env)
            found[name] = digests(folder / name)
            sys.stdout.write(f"{name}\n")
            args.out.write_text(json.dumps(found, indent=2) + "\n")
    if not args.against:
        return 0
    before = json.loads(args.against.read_text())
    keys = [(name, what) for name in wanted for what in sorted({*found[name], *before[name]})]
    other = [f"{x}: {what}" for x, what in keys if found[x].get(what) != before[x].get(what)]
    lines = [f"differs: {line}" for line in other] or ["every digest is the same"]
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(other)


def run(words: Sequence[str], env: Mapping[str, str]) -> None:
    done = subprocess.run([*VIDJAX, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-3000:]}")


def stop(words: Sequence[str], metrics: Path, env: Mapping[str, str]) -> None:
    """Stops a command by SIGTERM after its first line of metrics."""
    with subprocess.Popen([*VIDJAX, *words], cwd=ROOT, env=env) as process:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)


def digests(workdir: Path) -> dict[str, str]:
    """Returns the sha256 of each file, parameter and array of a run, by name."""
    paths = (workdir / name for name in ("metrics.jsonl", "ranking.txt", "ranking_test.txt"))
    found = {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in paths if x.exists()}
    found["map"] = repr(json.loads((workdir / "metrics.json").read_text())["map"])
    steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal()]
    if steps:
        latest = workdir / "checkpoints" / str(max(steps))
        with warnings.catch_warnings(action="ignore"):  # Orbax warns that no sharding is given
            tree = ocp.load_checkpointables(str(latest / "state"))
        learned = {key: tree[key] for key in ("params", "model_state") if key in tree}
        found["params"] = _digest_of_tree(learned)
    if (workdir / "analysis.npz").exists():
        with np.load(workdir / "analysis.npz") as archive:
            arrays = dict(archive)
        text = json.dumps(json.loads(arrays.pop("facts").tobytes()), sort_keys=True).encode()
        found["analysis"] = _digest_of_tree({**arrays, "values": np.frombuffer(text, np.uint8)})
    return found


def _digest_of_tree(tree: Any) -> str:
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
