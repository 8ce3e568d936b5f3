"""Feature files with chosen content: official pickles, `.npz` files and Parquet tables."""

import csv
import pickle
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidjax.data.clip_files import read_clips

# The T frames of one clip in one modality. Fields that a modality lacks are not written. Features
# are [T, D], boxes [T, 4], and other fields [T].
Clip = namedtuple("Clip", "features quality detection number box")


def random_clip(rng, num_frames, dim, dtype="float16"):
    return Clip(
        features=rng.normal(0, 20, (num_frames, dim)).astype(dtype),
        quality=rng.normal(80, 20, num_frames).astype(np.float32),
        detection=rng.uniform(0.8, 1, num_frames).astype(np.float32),
        number=np.sort(rng.integers(0, 1000, num_frames)).astype(np.int32),
        box=rng.uniform(0, 500, (num_frames, 4)).astype(np.float32),
    )


def as_read(modality, clip):
    """Returns a clip as it is read from a file of `write_pickle`, which lacks some fields."""
    if modality != "face":
        clip = clip._replace(quality=np.zeros_like(clip.quality))
    if modality not in ("face", "head"):
        clip = clip._replace(detection=np.ones_like(clip.detection))
    if modality == "audio":
        clip = clip._replace(number=0 * clip.number, box=0 * clip.box)
    return clip


def as_arrays(modalities):
    """Returns clip -> modality -> field -> array, as read from files of `write_pickle`."""
    clips: dict[str, dict[str, Any]] = {}
    for modality, frames_of in modalities.items():
        for name, frames in frames_of.items():
            clips.setdefault(name, {})[modality] = as_read(modality, frames)._asdict()
    return clips


def write_pickle(directory, modality, split, clips):
    """Writes `{modality}_{split}.pickle`, with one feature per clip for audio; returns the path."""
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


def write_truth(directory, split, labels):
    """Writes `{split}_gt.txt`: a line per clip for train, and a line per identity for others."""
    if split == "train":
        lines = [f"{name}.mp4 {identity}" for name, identity in labels.items()]
    else:
        clips: dict[str, list[str]] = {}
        for name, identity in labels.items():
            clips.setdefault(identity, []).append(f"{name}.mp4")
        lines = [" ".join([identity, *names]) for identity, names in clips.items()]
    (directory / f"{split}_gt.txt").write_text("\n".join(lines) + "\n")


def read_arrays(folder):
    """Returns clip -> name -> array of the `.npz` files of a folder. Empty arrays are left out."""
    return {
        clip.name: {name: x for name, x in npz_arrays(clip.modalities).items() if len(x)}
        for clip in read_clips(sorted(folder.glob("*.npz")))
    }


def fields_of(modality):
    """Returns field -> array. `modality` is such a dict, or only the array of the features."""
    return modality if isinstance(modality, Mapping) else {"features": modality}


def npz_arrays(modalities):
    """Returns name -> array, as a `.npz` file of a clip stores them: `face`, `face_quality`, ..."""
    return {
        modality if field == "features" else f"{modality}_{field}": x
        for modality, given in modalities.items()
        for field, x in fields_of(given).items()
    }


def write_npz(folder, splits):
    """Writes split -> clip -> modality -> features or fields as `SPLIT/CLIP.npz` in `folder`."""
    for split, clips in splits.items():
        (folder / split).mkdir(parents=True)
        for clip, modalities in clips.items():
            path = folder / split / f"{clip}.npz"
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **npz_arrays(modalities))
    return folder


def write_labels(path, labels):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "identity"), *labels.items()])
    return path


def write_parquet(path, clips, *, fields=(), width=-1, **options):
    """Writes clip -> modality -> features or fields as a table; returns its path.

    The table has a row per frame: the first frames of all clips, the second frames, and so on. Its
    columns are features and `fields`. `width` is the number of features of a row; -1 allows any.
    """
    import pyarrow
    from pyarrow import parquet

    every = [
        (clip, modality, fields_of(given))
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


def ragged_clips(split, count):
    """Returns modality -> clip -> frames of clips of very different lengths: 0 to 10,000 frames.

    Every third clip lacks audio, every second clip lacks a body, and some qualities are equal.
    """
    rng = np.random.default_rng(count)
    clips: dict[str, dict[str, Clip]] = {name: {} for name in RAGGED}
    for number in range(count):
        name = f"{split}_{number:03d}"
        # Records keep at most 512 frames. Batches have room for 32, 128 or 512 frames.
        length = {1: 10_000, 2: 100, 3: 513, 4: 32, 5: 33}.get(number, number % 11)
        clips["face"][name] = random_clip(rng, length, RAGGED["face"])
        if number in (1, 2):  # frames of equal quality; the earlier frame counts as better
            quality = clips["face"][name].quality
            quality[:] = np.round(quality / 20)
        if number % 3:
            clips["audio"][name] = random_clip(rng, 1, RAGGED["audio"])
        if number % 2:
            clips["body"][name] = random_clip(rng, 600 if number == 7 else 2, RAGGED["body"])
    return clips


def write_ragged(folder, counts, lacks=()):
    """Writes official files of `counts[split]` clips, but not of (modality, split) in `lacks`."""
    for split, count in counts.items():
        clips = ragged_clips(split, count)
        for modality, some in clips.items():
            if (modality, split) not in lacks:
                write_pickle(folder, modality, split, some)
        write_truth(folder, split, {x: str(i % 5 + 1) for i, x in enumerate(clips["face"])})
    return folder


WIDTHS = {"face": 24, "head": 16, "audio": 8}
CLIPS = {"train": 96, "val": 60, "test": 40}


def learnable_clips(num_identities=12, num_clips=CLIPS):
    """Yields for each split its name, modality -> clip -> frames, and clip -> identity.

    A net can learn the identities. A third of the val and test clips are distractors. A tenth of
    the clips lack a modality, independently for each modality.
    """
    rng = np.random.default_rng(0)
    centres = {name: rng.normal(size=(num_identities + 1, dim)) for name, dim in WIDTHS.items()}
    for split, count in num_clips.items():
        names = [f"IQIYI_VID_{split.upper()}_{i:07d}" for i in range(count)]
        labels = np.arange(count) % num_identities + 1
        if split != "train":
            labels[rng.permutation(count)[: count // 3]] = 0
        clips: dict[str, dict[str, Clip]] = {modality: {} for modality in WIDTHS}
        for modality, dim in WIDTHS.items():
            for name, label in zip(names, labels, strict=True):
                length = 0 if rng.random() < 0.1 else int(rng.integers(1, 12))
                point = centres[modality][label] if label else rng.normal(size=dim)
                noise = 0.7 * rng.normal(size=(length, dim))
                clip = random_clip(rng, length, dim)
                clip = clip._replace(features=(3 * (point + noise)).astype(np.float16))
                most = 1 if modality == "audio" else length
                clips[modality][name] = Clip(*(field[:most] for field in clip))
        yield split, clips, {n: str(i) for n, i in zip(names, labels, strict=True) if i}


def write_learnable(directory, **options):
    """Writes the official files of `learnable_clips`, without the ground truth of test."""
    for split, clips, truth in learnable_clips(**options):
        for modality, some in clips.items():
            write_pickle(directory, modality, split, some)
        if split != "test":
            write_truth(directory, split, truth)
