"""Trains every shipped system on odd numbers: each result is finite, or one clear error.

The cases are odd features (equal, zero, huge, tiny, not finite), odd sizes (one frame, one clip,
one identity) and odd values of fields. All run in this process on a few small clips, so that
programs of the same shape are compiled once.
"""

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
    "mma": "configs/mma.py:iqiyi_vid",
    "mma-published": "configs/mma.py:iqiyi_vid,published,face,head",
    "cosine": "configs/cosine.py:iqiyi_vid",
    "knn": "configs/knn.py:iqiyi_vid",
    "plda": "configs/plda.py:iqiyi_vid,face,head,audio",
    "quality_fusion": "configs/quality_fusion.py:iqiyi_vid",
    "voting": "configs/quality_fusion.py:iqiyi_vid,voting",
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
      frames: number of frames of every clip.
      fields: (number of frames) -> other fields of the frames, such as `quality`.
      clips: split -> number of clips.
      identities: number of identities; every fourth clip is a distractor.
      distractors: False for none.
      odd: the splits with odd features.
      words: overrides of the configuration.
    """

    features: Callable[[np.ndarray], np.ndarray] = lambda x: x
    frames: int = FRAMES
    fields: Callable[[int], Mapping[str, Any]] = lambda count: {}
    clips: Mapping[str, int] = SPLITS
    identities: int = IDENTITIES
    distractors: bool = True
    odd: Sequence[str] = ("train", "val")
    words: Sequence[str] = ()


def _full(value: float, dtype: str = "float32") -> Case:
    return Case(features=lambda x: np.full(x.shape, value, dtype))


def _scaled(factor: float, dtype: str = "float32") -> Case:
    return Case(features=lambda x: (x.astype(np.float64) * factor).astype(dtype))


def _some(value: float, dtype: str = "float32") -> Case:
    """Replaces the first frame of every clip."""

    def replaced(x: np.ndarray) -> np.ndarray:
        x = x.astype(dtype)
        x[0] = value
        return x

    return Case(features=replaced)


def _quality(value: float) -> Case:
    full = {name: value for name in ("quality", "detection")}
    return Case(fields=lambda count: {name: np.full(count, x) for name, x in full.items()})


def _field(*words: str) -> Case:
    return Case(words=[f"--config.{word}" for word in words])


CASES = {
    "equal": _full(0.5),
    "equal-negative": _full(-3.0),
    "zero": _full(0.0),
    "nan": _full(math.nan),
    "inf": _full(math.inf),
    "huge-1e19": _scaled(1e19),
    "huge-1e30": _scaled(1e30),
    "equal-1e30": _full(1e30),
    "largest": _full(3.4e38),
    "beyond-1e39": _scaled(1e39, "float64"),
    "beyond-1e300": _scaled(1e300, "float64"),
    "tiny-1e-20": _scaled(1e-20),
    "denormal-1e-40": _scaled(1e-40),
    "half-largest": _full(65504.0, "float16"),
    "half-denormal": _full(6e-8, "float16"),
    "int8": Case(features=lambda x: np.where(x > 0, 127, -128).astype(np.int8)),
    "some-zero": _some(0.0),
    "some-nan": _some(math.nan),
    "some-1e30": _some(1e30),
    "some-1e300": _some(1e300, "float64"),
    "val-zero": _full(0.0)._replace(odd=("val",)),
    "val-nan": _full(math.nan)._replace(odd=("val",)),
    "val-1e30": _scaled(1e30)._replace(odd=("val",)),
    "val-largest": _full(3.4e38)._replace(odd=("val",)),
    "val-denormal": _scaled(1e-40)._replace(odd=("val",)),
    "quality-0": _quality(0.0),
    "quality-negative": _quality(-1e30),
    "quality-nan": _quality(math.nan),
    "quality-inf": _quality(math.inf),
    "quality-1e300": _quality(1e300),
    "one-frame": Case(frames=1),
    "600-frames": Case(frames=600, clips={"train": 8, "val": 4}),
    "no-frame": Case(features=lambda x: x[:0]),
    "one-clip": Case(clips={"train": 1, "val": 1}, identities=1, distractors=False),
    "one-identity": Case(identities=1),
    "one-identity-alone": Case(identities=1, distractors=False),
    "no-distractor": Case(distractors=False),
    "width-1": Case(features=lambda x: x[:, :1]),
    "batch-1": _field("batch_size=1", "num_epochs=1"),
    "batch-1e8": _field("batch_size=100000000"),
    "block-1": _field("eval.block_size=1")._replace(clips={"train": 12, "val": 6}),
    "block-1e9": _field("eval.block_size=1000000000"),
    "every-epochs-inf": _field("eval.every_epochs=inf"),
    "every-epochs-tiny": _field("eval.every_epochs=1e-300", "num_epochs=1"),
    "epochs-tiny": _field("num_epochs=1e-300"),
    "rate-0": _field("optim.learning_rate=0"),
    "rate-1e30": _field("optim.learning_rate=1e30"),
    "rate-inf": _field("optim.learning_rate=inf"),
    "frames-1": _field("data.max_frames=1"),
    "log-1e9": _field("log_every_steps=1000000000"),
    "model-width-0": _field("model.{width}"),
}
ZERO_WIDTH = {
    "mma": "embed_dim=0",
    "cosine": "embed_dim=0",
    "knn": "logit_scale=0",
    "plda": "scale=0",
    "deepmef": "main.hidden_dim=0",
    "residual_dense": "main.width=0",
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
                noise = rng.normal(size=(case.frames, dim))
                features = (centres[name][identity] + noise).astype(np.float32)
                features = case.features(features) if split in case.odd else features
                fields = case.fields(len(features)) if len(features) else {}
                splits[split][clip][name] = {"features": features, **fields}
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
    width = ZERO_WIDTH.get(system.partition("-")[0], "layers=((0,'linear',False,0.0),)")
    words = [word.replace("{width}", width) for word in case.words]
    spec = SYSTEMS[system]
    try:
        config = small_runs.shrunk(
            "--config.num_epochs=3", "--config.batch_size=12", *words, spec=spec
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
