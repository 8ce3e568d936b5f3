"""Folders that look like those of evaluated runs, of any score that a test wants."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax import config as config_lib
from vidjax import config_io
from vidjax.run import results as results_lib


def write(
    folder: Path,
    averages: Mapping[str, float],
    *overrides: str,
    positives: int = 3,
    num_clips: int = 50,
    split: str = "val",
    suffix: str = "",
    truth: bool = True,
    results: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes configuration, identities, results and analysis; returns the folder.

    Args:
      folder: of the run.
      averages: identity -> average precision.
      overrides: words as `--config.seed=1`.
      positives: clips of every identity.
      num_clips: how many were ranked.
      split: what `metrics{suffix}.json` is of.
      suffix: `_SPLIT` of a split that training did not watch.
      truth: False where the split has no ground truth.
      results: more of `metrics.json`.
      arrays: more of `analysis.npz`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = [] if suffix else [f"--config.eval.split={split}"]
    if not suffix or not (folder / "config.json").exists():
        config = config_io.override(config_lib.default(), [*own, *overrides])
        (folder / "config.json").write_text(config_io.to_json(config))
    (folder / "identities.json").write_text(json.dumps(list(averages)))
    ap = np.array(list(averages.values()))
    facts: dict[str, Any] = {"num_clips": num_clips, "num_identities": len(ap), "step": 7}
    if truth:
        facts |= {"map": float(ap.mean()), "map_kind": "val", "top1": 0.5}
    facts |= results or {}
    (folder / f"metrics{suffix}.json").write_text(json.dumps(facts))
    parts = {"ap": ap, "positives": np.full(len(ap), positives)} if truth else {}
    told = {"split": split, "num_others": 0, "vectors": ["face", "head"], "runs": []}
    results_lib.save_analysis(folder / f"analysis{suffix}.npz", told, parts | dict(arrays or {}))
    return folder


def load_analysis(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the values of an `analysis.npz` as they were written, and its arrays."""
    _, arrays = results_lib.load_analysis(path)
    with np.load(path) as file:
        return json.loads(file["facts"].tobytes()), arrays
