"""Folders that look like evaluated runs, with scores that a test chooses."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import inspect

from vidjax.evaluation import ranking
from vidjax.runs import config as config_lib, config_io, results as results_lib
from vidjax.utils.names import unescape


def write(
    folder: Path, averages: Mapping[str, float], *overrides: str, positives: int = 3,
    num_clips: int = 50, split: str = "val", suffix: str = "", truth: bool = True,
    results: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None,
    analysis: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes configuration, identities, results and analysis of a run; returns its folder.

    `averages` are identity -> average precision. Each identity has `positives` clips. If the
    training did not evaluate the split, `suffix` must be `_SPLIT`. If `truth` is False, the
    run has no MAP. `metrics.json` also has `results`; `analysis.npz` has `arrays` and `analysis`.
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
    values = {"split": split, "num_others": 0, "vectors": ["face", "head"], "runs": []}
    values, parts = values | dict(analysis or {}), parts | dict(arrays or {})
    results_lib.save_analysis(folder / f"analysis{suffix}.npz", values, parts)
    return folder


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Returns path -> (content, time of the last change) of a folder and everything in it."""
    return {
        path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def write_pair(folder: Path, truth: str, submission: str) -> tuple[Path, Path]:
    """Writes a ground truth and a submission; returns their paths."""
    (folder / "gt.txt").write_bytes(truth.encode("utf-8", "surrogateescape"))
    (folder / "ranking.txt").write_bytes(submission.encode("utf-8", "surrogateescape"))
    return folder / "gt.txt", folder / "ranking.txt"


def lists(path: Path) -> dict[str, list[str]]:
    """Returns identity -> clips of a ranking file, best first. Asserts that it has no faults."""
    found = ranking.read_submission(path)
    assert not found.complaints
    return {unescape(name): list(map(unescape, clips)) for name, clips in found.ranking.items()}


def load_analysis(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the JSON values of an `analysis.npz`, and its arrays."""
    _, arrays = results_lib.load_analysis(path)
    with np.load(path) as file:
        return json.loads(file["facts"].tobytes()), arrays


def example(kind: Any, texts: Mapping[str, str], key="", counter: Any = None) -> Any:
    """Returns an example of a JSON value of a type of `vidjax.runs.schemas`.

    `texts` are key -> text, in which {} becomes a number that `counter` increases for each value.
    """
    counter = counter or itertools.count()
    kind = kind if isinstance(kind, inspect.Type) else inspect.type_info(kind)
    number = next(counter)
    match kind:
        case inspect.StructType():
            fields = ((one.encode_name, one.type) for one in kind.fields)
            return {name: example(one, texts, name, counter) for name, one in fields}
        case inspect.UnionType():
            return example(kind.types[0], texts, key, counter)
        case inspect.DictType():
            return {n: example(kind.value_type, texts, key, counter) for n in ("face", "head")}
        case inspect.ListType():
            return [example(kind.item_type, texts, key, counter) for _ in range(3)]
        case inspect.TupleType():
            return [example(one, texts, key, counter) for one in kind.item_types]
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 1 + number % 3
        case inspect.FloatType():
            return (1 + number % 63) / 64
    return texts.get(key, f"{key} {{}}").format(number)
