"""Trains every configuration for a short time, and writes digests of the results.

    python -m tests.campaigns.same_bytes before.json
    ... change the code ...
    python -m tests.campaigns.same_bytes after.json --against=before.json

If a change of the code changes no result, the digests stay equal. Both commands must run on the
same processor. The script uses only commands and Orbax, so it can run old versions of the code.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[2]
NOTHING = subprocess.DEVNULL
VIDJAX = (sys.executable, "-m", "vidjax.main")
SHORT = "--config.num_epochs=2 --config.log_every_steps=3 --config.eval.every_epochs=1"
PLAIN = f"{SHORT} --config.eval.report=False"
LAYER = "--config.model.layers=((32,'swish',True,0.5),)"
RUNS = {  # name -> configuration and overrides
    **{name: f"{name}.py {SHORT}" for name in ("mma", "cosine", "plda", "deepmef")},
    "knn": f"knn.py {SHORT.partition(' ')[2]}",
    "quality_fusion": f"quality_fusion.py {SHORT} {LAYER}",
    "residual_dense": f"residual_dense.py {PLAIN} --config.model.main.width=32",
    "noise_classes": f"noise_classes.py {SHORT} --config.ensemble.folds=3",
    "folds": f"quality_fusion.py:folds {PLAIN} {LAYER} --config.ensemble.folds=3"
             " --config.ensemble.seeds=2",
    "views": f"deepmef.py:views {PLAIN} --config.ensemble.only=0,2"
             " --config.model.main.hidden_dim=16",
    "streaming": f"mma.py:face,audio {PLAIN} --config.data.mode=streaming --config.mixup=0.4",
    "published": f"mma.py:published,face {PLAIN} --config.dtype=bfloat16",
    "smoothed": f"quality_fusion.py:mlp3 {PLAIN} --config.loss.label_smoothing=0.1"
                " --config.mixup=0.2 --config.data.balance=0.5"
                " --config.loss.schedule=((0.0,0.3),)",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes the digests. Returns 1 if they differ from the file `--against`."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.same_bytes")
    parser.add_argument("out", type=Path, help="the JSON file of the digests")
    parser.add_argument("--against", type=Path, help="the digests of an earlier version")
    parser.add_argument("--only", default="", help="names of runs, separated by commas")
    parser.add_argument("--cache", help="the folder of records and compiled programs")
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name] or [*RUNS, "blend"]
    results = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        env["VIDJAX_CACHE"] = args.cache or str(folder / "cache")
        for name in names:
            workdir = f"--workdir={folder / name}"
            if name == "blend":
                runs = f"--runs={folder / 'quality_fusion'},{folder / 'deepmef'}"
                words = ["--mode=evaluate", workdir, runs, "--config.join.weights=2,1"]
            else:
                spec, *overrides = RUNS[name].split()
                words = [f"--config=configs/{spec}", workdir, *overrides]
            commands = [words]
            if name == "mma":
                commands.append(["--mode=evaluate", workdir, "--config.eval.split=test"])
            for command in commands:
                subprocess.run([*VIDJAX, *command], cwd=ROOT, env=env, check=True, stdout=NOTHING)
            results[name] = digests(folder / name)
            sys.stdout.write(f"{name}\n")
            args.out.write_text(json.dumps(results, indent=2) + "\n")
    before = json.loads(args.against.read_text()) if args.against else results
    lines = [
        f"differs: {name}: {what}"
        for name in names
        for what in sorted(results[name].keys() | before[name].keys())
        if results[name].get(what) != before[name].get(what)
    ]
    if args.against:
        sys.stdout.write("\n".join(lines or ["every digest is the same"]) + "\n")
    return bool(lines)


def digests(workdir: Path) -> dict[str, str]:
    """Returns name -> sha256 of result files, of the parameters and of the analysis; and MAP."""
    paths = (workdir / name for name in ("metrics.jsonl", "ranking.txt", "ranking_test.txt"))
    results = {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in paths if x.exists()}
    results["map"] = repr(json.loads((workdir / "metrics.json").read_text())["map"])
    if steps := [int(x.name) for x in workdir.glob("checkpoints/*") if x.name.isdecimal()]:
        with warnings.catch_warnings(action="ignore"):  # Orbax warns that no sharding is given
            state = workdir / "checkpoints" / str(max(steps)) / "state"
            tree = ocp.load_checkpointables(str(state))
        kept = tree.keys() & {"params", "model_state"}
        results["params"] = _hash_tree({key: tree[key] for key in kept})
    if (workdir / "analysis.npz").exists():
        with np.load(workdir / "analysis.npz") as archive:
            arrays = dict(archive)
        facts = json.dumps(json.loads(arrays["facts"].tobytes()), sort_keys=True).encode()
        results["analysis"] = _hash_tree(arrays | {"facts": np.frombuffer(facts, np.uint8)})
    return results


def _hash_tree(tree: Any) -> str:
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
