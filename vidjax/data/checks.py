"""Refuses misspelt names of files; finds features from which no system can learn."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.clips import SPLITS
from vidjax.utils.errors import NoFileError, UserError, closest


def list_entries(directory: str | os.PathLike[str]) -> list[Path]:
    """Returns all paths in a directory but hidden ones, sorted; OSError if it does not exist."""
    directory = Path(directory)
    if not directory.exists():
        raise NoFileError(f"{directory}: no such directory; is the path (config.data.dir) right?")
    if not directory.is_dir():
        raise NoFileError(f"{directory}: not a directory; name the folder that holds the files")
    return sorted(path for path in directory.iterdir() if path.name[0] != ".")


def check_file(path: Path) -> None:
    """Raises ValueError if a path is a folder, a broken link or a device; it may also be absent."""
    if path.is_file() or not os.path.lexists(path):
        return
    kind = "a folder" if path.is_dir() else "not a regular file"
    if not path.exists():
        kind = f"a link to '{path.readlink()}', which is not there"
    raise UserError(f"{path}: {kind}, where a file is wanted: put the file there, or rename it")


def refuse_split(path: Path, word: str, present: Collection[str]) -> None:
    """Raises ValueError if `word`, a part of the path's name, misspells a split, such as `valid`.

    Not for a correct word, nor for a split in `present`, the splits with files of their own.
    """
    lower = word.lower() if word not in SPLITS else ""
    longer = [split for split in SPLITS if lower.startswith(split)]
    split = next(iter(longer), None) or closest(lower, SPLITS, cutoff=0.75)
    if split and split not in present:
        head, _, tail = path.name.rpartition(word)
        raise UserError(
            f"{path}: '{word}' is no split and would not be read\n"
            f"rename it to {head}{split}{tail}, or move it away; splits are {', '.join(SPLITS)}"
        )


FEATURES = (".npz", ".npy", ".parquet")  # endings of files of features


def refuse_unread(entries: Iterable[Path], wanted: str) -> None:
    """Refuses features that lie beside `wanted` ones, such as CLIP.npz, and would not be read."""
    for path in entries:
        holds = path.is_dir() and any(x for end in FEATURES for x in path.glob(f"*{end}"))
        if holds or path.suffix.lower() in FEATURES:
            raise UserError(
                f"{path}: would not be read beside {wanted}\nmove it away, or name it by itself"
            )


# Norms of features. Beyond them a sum of squares in float32 overflows, or counts as 0.
LONGEST, SHORTEST = 1e18, 1e-12
NARROW = 4  # features look transposed if T is at least so many times D
EQUAL = 0.01  # norms within this relative range count as all the same


def misspelt(splits: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[str]:
    """Yields a message for every two modalities with similar names that never share a clip.

    `splits` is split -> modality -> [N] int, number of frames of each clip.
    """
    names = sorted({name for lengths in splits.values() for name in lengths})
    for number, name in enumerate(names):
        others = names[number + 1 :]
        if other := closest(name, others, cutoff=0.7):
            together = any(
                np.any((lengths[name] > 0) & (lengths[other] > 0))
                for lengths in splits.values()
                if name in lengths and other in lengths
            )
            if not together:
                yield f"no clip has both '{name}' and '{other}': is one of the two misspelt?"


def transposed(
    splits: Mapping[str, Mapping[str, np.ndarray]], widths: Mapping[str, int]
) -> Iterator[str]:
    """Yields a message for every modality whose features look like [D, T] instead of [T, D].

    All its clips then have the same T >= NARROW * D. `splits` is as in `misspelt`.
    """
    for name, width in widths.items():
        found = [lengths[name] for lengths in splits.values() if name in lengths]
        counts = np.unique(np.concatenate([*found, [0]]))[1:]
        if (
            len(counts) == 1
            and counts[0] >= NARROW * width
            and sum(map(np.count_nonzero, found)) > 1
        ):
            yield (
                f"{name}: every clip has {counts[0]} frames of {width} numbers: is it the other "
                f"way round?\nfeatures are [frames, width]: features.T turns them"
            )


def equal_quality(report: Mapping[str, Any], modalities: Sequence[str]) -> Iterator[str]:
    """Yields a message where quality is the norm of features and the norm is always the same.

    A clip of one frame has no best one, so modalities with one frame a clip are left out.
    """
    for modality in modalities:
        facts = [
            split["modalities"][modality]
            for split in report["splits"].values()
            if modality in split["modalities"]
        ]
        if any(_is_one_norm(one) for one in facts if one["frames_per_clip"]["max"] > 1):
            yield (
                f"{modality}: frames without a quality get the length of their feature, and all "
                f"are equally long:\nall frames count alike, and the best are the first; give "
                f"{modality}_quality, or features before they are scaled to one length"
            )


def _is_one_norm(facts: Mapping[str, Any]) -> bool:
    """Returns True if the quality of frames is the norm of their features, and nearly constant."""
    norm = facts["norm"]
    if facts["quality"] != norm or not norm["counts"] or not SHORTEST < norm["mean"] < LONGEST:
        return False
    # Bins of a constant norm reach beyond it on both sides, so that the first bin is empty.
    return not norm["counts"][0] or norm["edges"][-1] - norm["edges"][0] < EQUAL * norm["mean"]


def unusable(
    report: Mapping[str, Any], splits: Sequence[str], modalities: Sequence[str]
) -> Iterator[str]:
    """Yields a message for modalities whose features are absent, not finite, 0 or out of range."""
    place = ", ".join(splits)
    for modality in modalities:
        counts = [
            report["splits"][split]["modalities"][modality]
            for split in splits
            if modality in report["splits"][split]["modalities"]
        ]
        seen = sum(count["frames_seen"] for count in counts)
        files = ", ".join(dict.fromkeys(count["file"] for count in counts))
        remedy = f"\ncheck {files or place}, or leave '{modality}' out of config.modalities"
        if not seen:
            yield f"{modality}: no clip of {place} has a frame{remedy}"
        elif not any(count["frames"] for count in counts):
            yield f"{modality}: all {seen} frames of {place} have a NaN or an Inf{remedy}"
        else:
            yield from _odd_norms(modality, place, [c["norm"] for c in counts if c["frames"]])


def _odd_norms(modality: str, place: str, norms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a message where float32 cannot hold the squares of features."""
    longest, mean = max(norm["edges"][-1] for norm in norms), max(norm["mean"] for norm in norms)
    if longest > LONGEST:
        yield (
            f"{modality}: features of {place} are up to {longest:.2g} long, and their squares "
            "overflow float32\ndivide them by a constant, or leave out the clips that are wrong"
        )
    elif not mean:
        yield (
            f"{modality}: all features of {place} are 0\n"
            f"write others, or leave '{modality}' out of config.modalities"
        )
    elif mean < SHORTEST:
        yield (
            f"{modality}: features of {place} are {mean:.2g} long on average, and their squares "
            "vanish in float32\nmultiply them by a constant"
        )
