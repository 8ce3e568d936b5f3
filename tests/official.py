"""Writes small folders of official files, easy enough that a few steps of training learn them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"face": 24, "head": 16, "audio": 8}
CLIPS = {"train": 96, "val": 60, "test": 40}


def frame(modality: str, rng: np.random.Generator, number: int, feature: np.ndarray) -> list[Any]:
    """Returns one frame in the order of its modality."""
    head = [str(number).encode(), [1.0, 2.0, 30.0, 40.0]]
    scores = {"face": [float(rng.uniform(0.8, 1)), float(rng.normal(80, 30))], "head": [0.9]}
    return [*head, *scores.get(modality, []), feature]


def write(folder: Path, *, num_identities: int = 12, seed: int = 0) -> None:
    """Writes pickles and ground truths of three splits; a third of val and test are distractors."""
    rng = np.random.default_rng(seed)
    centres = {m: rng.normal(size=(num_identities + 1, d)) for m, d in WIDTHS.items()}
    for split, count in CLIPS.items():
        names = [f"IQIYI_VID_{split.upper()}_{i:07d}" for i in range(count)]
        labels = np.arange(count) % num_identities + 1
        if split != "train":
            labels[rng.permutation(count)[: count // 3]] = 0
        for modality, centre in centres.items():
            value: dict[bytes, Any] = {}
            for name, label in zip(names, labels, strict=True):
                point = centre[label] if label else rng.normal(size=centre.shape[1])
                if modality == "audio":
                    if rng.random() > 0.2:
                        value[name.encode()] = (point + rng.normal(size=len(point))).astype("f2")
                    continue
                length = 0 if rng.random() < 0.1 else int(rng.integers(1, 12))
                noise = 0.7 * rng.normal(size=(length, centre.shape[1]))
                features = (3 * (point + noise)).astype(np.float16)
                value[name.encode()] = [frame(modality, rng, t, features[t]) for t in range(length)]
            (folder / f"{modality}_{split}.pickle").write_bytes(pickle.dumps(value, protocol=2))
        write_ground_truth(folder, split, names, labels)


def write_ground_truth(folder: Path, split: str, names: list[str], labels: np.ndarray) -> None:
    """Writes the direct form for train, the inverted one for val, nothing for test."""
    if split == "train":
        lines = [f"{name}.mp4 {label}" for name, label in zip(names, labels, strict=True)]
    elif split == "val":
        lines = [
            " ".join([str(i), *(f"{n}.mp4" for n, x in zip(names, labels, strict=True) if x == i)])
            for i in sorted(set(labels) - {0})
        ]
    else:
        return
    (folder / f"{split}_gt.txt").write_text("".join(line + "\n" for line in lines))
