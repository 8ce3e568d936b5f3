"""Feature files with chosen content: official pickles, `.npz` files and Parquet tables."""

import csv
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data.clip_files import read_npz


class Clip(NamedTuple):
    """The frames of one clip in one modality. Fields that a modality lacks are not written."""

    features: np.ndarray  # [T, D]
    quality: np.ndarray  # [T]
    detection: np.ndarray  # [T]
    number: np.ndarray  # [T]
    box: np.ndarray  # [T, 4]


def random_clip(rng: np.random.Generator, num_frames: int, dim: int, dtype="float16") -> Clip:
    return Clip(
        features=rng.normal(0, 20, (num_frames, dim)).astype(dtype),
        quality=rng.normal(80, 20, num_frames).astype(np.float32),
        detection=rng.uniform(0.8, 1, num_frames).astype(np.float32),
        number=np.sort(rng.integers(0, 1000, num_frames)).astype(np.int32),
        box=rng.uniform(0, 500, (num_frames, 4)).astype(np.float32),
    )


def write_pickle(directory: Path, modality: str, split: str, clips: Mapping[str, Clip]) -> Path:
    """Writes `{modality}_{split}.pickle` and returns its path; audio has only the first frame."""
    content: dict[bytes, Any] = {}
    for name, clip in clips.items():
        frames = []
        for feature, quality, detection, number, box in zip(*clip, strict=True):
            scores = {"face": [float(detection), float(quality)], "head": [float(detection)]}
            frames.append([str(number), box.tolist(), *scores.get(modality, []), feature])
        if modality != "audio":
            content[name.encode()] = frames
        elif frames:
            content[name.encode()] = clip.features[0]
    path = directory / f"{modality}_{split}.pickle"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def write_truth(directory: Path, split: str, labels: Mapping[str, str]) -> None:
    """Writes `{split}_gt.txt`, with a line per clip for train, else with a line per identity."""
    if split == "train":
        lines = [f"{name}.mp4 {identity}" for name, identity in labels.items()]
    else:
        clips: dict[str, list[str]] = {}
        for name, identity in labels.items():
            clips.setdefault(identity, []).append(f"{name}.mp4")
        lines = [" ".join([identity, *names]) for identity, names in clips.items()]
    (directory / f"{split}_gt.txt").write_text("\n".join(lines) + "\n")


def read_arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns clip -> name -> array of all `.npz` files of a folder, without empty arrays."""
    return {
        clip.name: {
            part if field == "features" else f"{part}_{field}": array
            for part, fields in clip.modalities.items()
            for field, array in fields.items()
            if len(array)
        }
        for clip in read_npz(sorted(folder.glob("*.npz")))
    }


def write_npz(folder: Path, splits: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """Writes `SPLIT/CLIP.npz`. A modality is an array of features, or a dict of fields."""
    for split, clips in splits.items():
        (folder / split).mkdir(parents=True)
        for clip, modalities in clips.items():
            content: dict[str, Any] = {}
            for name, given in modalities.items():
                fields = given if isinstance(given, Mapping) else {"features": given}
                for field, x in fields.items():
                    content[name if field == "features" else f"{name}_{field}"] = x
            np.savez(folder / split / f"{clip}.npz", **content)
    return folder


def write_labels(path: Path, labels: Mapping[str, object]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "identity"), *labels.items()])
    return path


def write_parquet(
    path: Path, clips: Mapping[str, Mapping[str, Any]], *, fields: Collection[str] = (),
    width: int = -1, **options: Any,
) -> Path:  # fmt: skip
    """Writes a table with a row per frame, in which clips alternate; returns its path.

    `clips` are clip -> modality -> features, or a dict of fields. In addition to features, `fields`
    are written. Lists of features have a `width`; -1 allows any length.
    """
    import pyarrow
    from pyarrow import parquet

    every = [
        (clip, modality, given if isinstance(given, Mapping) else {"features": given})
        for clip, modalities in clips.items()
        for modality, given in modalities.items()
    ]
    longest = max((len(given["features"]) for _, _, given in every), default=0)
    rows = [(*one, t) for t in range(longest) for one in every if t < len(one[2]["features"])]
    features = [np.asarray(given["features"][t], np.float32) for _, _, given, t in rows]
    columns = {
        "clip": pyarrow.array([clip for clip, *_ in rows], pyarrow.string()),
        "modality": pyarrow.array([name for _, name, *_ in rows], pyarrow.string()),
        "features": pyarrow.array(features, pyarrow.list_(pyarrow.float32(), width)),
        **{field: [given[field][t] for _, _, given, t in rows] for field in fields},
    }
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


RAGGED = {"audio": 4, "body": 3, "face": 6}  # widths


def ragged_clips(split: str, count: int) -> dict[str, dict[str, Clip]]:
    """Returns modality -> clip -> frames: 0 to 700 frames, some of equal quality."""
    rng = np.random.default_rng(count)
    clips: dict[str, dict[str, Clip]] = {name: {} for name in RAGGED}
    for number in range(count):
        name = f"{split}_{number:03d}"
        length = {1: 700, 2: 100, 3: 513, 4: 32, 5: 33}.get(number, number % 11)
        clips["face"][name] = random_clip(rng, length, RAGGED["face"])
        if number in (1, 2):  # frames of equal quality; the earlier frame counts as better
            quality = clips["face"][name].quality
            quality[:] = np.round(quality / 20)
        if number % 3:
            clips["audio"][name] = random_clip(rng, 1, RAGGED["audio"])
        if number % 2:
            clips["body"][name] = random_clip(rng, 600 if number == 7 else 2, RAGGED["body"])
    return clips


def write_ragged(folder: Path, counts: Mapping[str, int], lacks: Collection[Any] = ()) -> Path:
    """Writes splits of `ragged_clips` with ground truth, without (modality, split) in `lacks`."""
    for split, count in counts.items():
        clips = ragged_clips(split, count)
        for modality, some in clips.items():
            if (modality, split) not in lacks:
                write_pickle(folder, modality, split, some)
        write_truth(folder, split, {x: str(i % 5 + 1) for i, x in enumerate(clips["face"])})
    return folder


WIDTHS = {"face": 24, "head": 16, "audio": 8}
CLIPS = {"train": 96, "val": 60, "test": 40}


def write_learnable(
    directory: Path, *, num_identities: int = 12, num_clips: Mapping[str, int] = CLIPS
) -> None:
    """Writes splits that a net learns in a few steps. Test has no ground truth.

    A third of the val and test clips are distractors. Each modality lacks a tenth of the clips.
    """
    rng = np.random.default_rng(0)
    centres = {name: rng.normal(size=(num_identities + 1, dim)) for name, dim in WIDTHS.items()}
    for split, count in num_clips.items():
        names = [f"IQIYI_VID_{split.upper()}_{i:07d}" for i in range(count)]
        labels = np.arange(count) % num_identities + 1
        if split != "train":
            labels[rng.permutation(count)[: count // 3]] = 0
        for modality, dim in WIDTHS.items():
            clips = {}
            for name, label in zip(names, labels, strict=True):
                length = 0 if rng.random() < 0.1 else int(rng.integers(1, 12))
                point = centres[modality][label] if label else rng.normal(size=dim)
                noise = 0.7 * rng.normal(size=(length, dim))
                clip = random_clip(rng, length, dim)
                clips[name] = clip._replace(features=(3 * (point + noise)).astype(np.float16))
            write_pickle(directory, modality, split, clips)
        if split != "test":
            truth = {n: str(i) for n, i in zip(names, labels, strict=True) if i}
            write_truth(directory, split, truth)
