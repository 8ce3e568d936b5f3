"""Trains systems on odd numbers: each result is finite, or one clear error."""

import contextlib
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.helpers import small_runs
from vidjax.data import sources
from vidjax.runs.checkpoint import CheckpointError

SYSTEMS = {
    "knn": "configs/knn.py:iqiyi_vid",
    "quality_fusion": "configs/quality_fusion.py:iqiyi_vid",
    "mma": "configs/mma.py:iqiyi_vid",
    "cosine": "configs/cosine.py:iqiyi_vid",
    "plda": "configs/plda.py:iqiyi_vid,face,head,audio",
    "residual_dense": "configs/residual_dense.py:iqiyi_vid,one,face,head",
    "noise_classes": "configs/noise_classes.py:iqiyi_vid",
    "deepmef": "configs/deepmef.py:iqiyi_vid,face,head",
}
WIDTHS = {"face": 24, "head": 16, "audio": 8}
SPLITS = {"train": 36, "val": 18}
FRAMES, IDENTITIES, MOST_LINES = 3, 4, 3

Clips = dict[str, dict[str, dict[str, dict[str, Any]]]]  # split -> clip -> modality -> fields


class Case(NamedTuple):
    """An odd input.

    Attributes:
      features: features [T, D] of a frame -> the odd features.
      clips: split -> number of clips.
      identities: number of identities; every fourth clip is a distractor.
      distractors: False for none.
      odd: the splits with odd features.
      words: overrides of the configuration.
    """

    features: Callable[[np.ndarray], np.ndarray] = lambda x: x
    clips: Mapping[str, int] = SPLITS
    identities: int = IDENTITIES
    distractors: bool = True
    odd: Sequence[str] = ("train", "val")
    words: Sequence[str] = ()


def _full(value: float) -> Case:
    return Case(features=lambda x: np.full(x.shape, value, np.float32))


def _scaled(factor: float) -> Case:
    return Case(features=lambda x: (x * factor).astype(np.float32))


def _first(x: np.ndarray) -> np.ndarray:
    """Replaces the first frame of a clip by numbers beyond float32."""
    x = x.astype(np.float64)
    x[0] = 1e300
    return x


CASES = {
    "equal": _full(0.5),
    "zero": _full(0.0),
    "huge": _scaled(1e30),
    "tiny": _scaled(1e-20),
    "missing": Case(features=lambda x: x[:0]),
    "some-1e300": Case(features=_first),
    "val-largest": _full(3.4e38)._replace(odd=("val",)),
    "one-clip": Case(clips={"train": 1, "val": 1}, identities=1, distractors=False),
    "batch-1e8": Case(words=["--config.batch_size=100000000"]),
}


def make_data(case: Case, cache: Path) -> Any:
    """Returns the dataset of a case; ValueError where it is refused."""
    rng = np.random.default_rng(0)
    centres = {name: rng.normal(size=(case.identities + 1, dim)) for name, dim in WIDTHS.items()}
    splits: Clips = {}
    labels = {}
    for split, count in case.clips.items():
        splits[split] = {}
        for number in range(count):
            stranger = case.distractors and number % 4 == 3
            identity = case.identities if stranger else number % case.identities
            clip = f"{split}{number}"
            if not stranger:
                labels[clip] = f"{identity + 1}"
            splits[split][clip] = {}
            for name, dim in WIDTHS.items():
                noise = rng.normal(size=(FRAMES, dim))
                features = (centres[name][identity] + noise).astype(np.float32)
                features = case.features(features) if split in case.odd else features
                splits[split][clip][name] = {"features": features}
    return sources.load(splits, labels, cache_dir=cache)


def run(name: str, system: str, folder: Path, cache: Path) -> str:
    """Runs one case on one system.

    Returns:
      `ok` with the MAP, or `refused: ` with the error.

    Raises:
      AssertionError: a result that is not finite, or a warning of numpy.
      Exception: whatever else the case raises, which is wrong.
    """
    case = CASES[name]
    spec = SYSTEMS[system]
    try:
        config = small_runs.shrunk(
            "--config.num_epochs=3", "--config.batch_size=12", *case.words, spec=spec
        )
        results = small_runs.run(config, folder, make_data(case, cache))
    except (ValueError, CheckpointError) as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= MOST_LINES, f"{len(lines)} lines: {error}"
        return f"refused: {lines[0]}"
    check_finite(results)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        check_finite(json.loads(line))
    return f"ok {results['map']:.3f}" if "map" in results else "ok"


def check_finite(value: Any, place: str = "") -> None:
    """Raises AssertionError for a number that is not finite, at any depth."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_finite(part, f"{place}.{key}")
    elif isinstance(value, list):
        for part in value:
            check_finite(part, place)
    elif isinstance(value, float):
        assert math.isfinite(value), f"{place} is {value}"


def run_all(names: Sequence[str], systems: Sequence[str], root: Path) -> Iterator[tuple[str, ...]]:
    """Yields (case, system, outcome) of every case on every system."""
    for system in systems:
        for name in names:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)
                try:
                    outcome = run(name, system, root / f"{system}-{name}", root / "cache")
                except Exception as error:  # everything else is a finding
                    outcome = f"WRONG: {type(error).__name__}: {str(error)[:300]}"
            yield name, system, outcome
