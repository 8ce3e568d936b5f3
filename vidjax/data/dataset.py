"""Reads the clips of a dataset, with labels, for training and evaluation.

TensorFlow is imported only if training batches are read from disk while the training runs.
"""

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidjax.core.batch import Batch, Packed
from vidjax.data.checks import (
    find_equal_quality,
    find_misspelt,
    find_transposed,
    warn_of_bad_values,
)
from vidjax.data.clips import (
    BatchPlan,
    DrawnClips,
    EvalPlan,
    Modality,
    Origin,
    Split,
    check_modalities,
    draw_clips,
    eval_batches,
    pad,
)
from vidjax.data.labels import Truth, sort_identities
from vidjax.data.packed_clips import BadValues, Reader, pack_arrays
from vidjax.data.store import VERSION, Store, StoredSplit
from vidjax.utils import messages
from vidjax.utils.errors import UserError, require_packages, suggest, warn
from vidjax.utils.files import sha256_json

MAX_PACKED_CLIPS = 256  # clips that `Dataset.packed` reads from the disk at once
CLIPS_PER_IDENTITY_EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, np.inf)


class Dataset:
    """The clips of a dataset with their labels.

    Attributes:
      identities: the names of the classes. Label c of a clip means `identities[c - 1]`.
      modalities: modality -> width and dtype of its features.
      report: the data report, which counts frames, clips and labels. Its entry `data` names the
        dataset, its folder and its digest.
    """

    def __init__(
        self,
        store: Store,
        truth: Truth,
        *,
        identities: Sequence[str] | None = None,
        origin: Origin | None = None,
    ):
        """Adds labels to the clips of `store`.

        Args:
          store: the clips, in files or in memory.
          truth: split -> clip -> identity.
          identities: the names of the classes, see `label_clips`.
          origin: the name and the folder of the dataset, which result files contain.
        """
        self._store = store
        self._truth = truth
        self._origin = origin or Origin("files")
        self.modalities: dict[str, Modality] = store.modalities
        self.identities, self._splits, self.report = label_clips(store, truth, identities)
        digests = sorted((name, split["sha256"]) for name, split in self.report["splits"].items())
        self.report["data"] = self._origin._asdict() | {"digest": sha256_json(digests)}
        for name, split in store.splits.items():
            self._warn_of_gaps(name, split)
        lengths = {name: split.lengths for name, split in store.splits.items()}
        widths = {name: modality.dim for name, modality in self.modalities.items()}
        for first, second in itertools.combinations(self._splits.values(), 2):
            _warn_of_copies(first, second)
        for problem in (
            *find_misspelt(lengths),
            *find_transposed(lengths, widths),
            *find_equal_quality(self.report, list(self.modalities)),
        ):
            warn(problem)

    def _warn_of_gaps(self, name: str, split: StoredSplit) -> None:
        """Warns if a split lacks modalities of other splits, or has unusable or unusual frames."""
        if absent := [modality for modality in self.modalities if modality not in split.lengths]:
            warn(
                f"{name}: the split has no features of {', '.join(absent)}, unlike other splits\n"
                "add them, or leave these modalities out of config.modalities"
            )
        for modality, counts in self.report["splits"][name]["modalities"].items():
            place, frames = f"{name}, {modality}", counts["frames_seen"]
            if dropped := counts["frames_skipped"].get("non_finite"):
                warn(
                    f"{counts['file']}: {dropped} of {frames} frames are left out, because their "
                    f"{modality} features have a NaN, an Inf or a value beyond float32\n"
                    "to use these frames, compute their features again"
                )
            values = (
                BadValues(**x | {"clip": split.clips[x["clip"]]})
                for x in counts.get("bad_values", ())  # data of an older version have none
            )
            warn_of_bad_values(place, values, frames, official=self._origin.name != "arrays")

    def __repr__(self) -> str:
        splits = self._splits.items()
        clips = ", ".join(f"{name} {len(split.clips):,} clips" for name, split in splits)
        widths = ", ".join(f"{name} {kind.dim}" for name, kind in self.modalities.items())
        place = self._origin.dir or self._origin.name
        return f"<data '{place}': {clips}; {widths}; {len(self.identities):,} identities>"

    def split(self, name: str) -> Split:
        """Returns the clips and labels of a split."""
        if name not in self._splits:
            known = ", ".join(self._splits)
            remedy = suggest(name, self._splits)
            if known == "train":
                remedy = "train a run that evaluates left-out clips of train: vidjax train ... "
                remedy += "--config.eval.split=train --config.ensemble.folds=5"
            raise UserError(f"the data have no split {name!r}, only {known}\n{remedy}")
        return self._splits[name]

    def with_identities(self, identities: Sequence[str]) -> "Dataset":
        """Returns the same clips with other classes, `identities`.

        The label of a clip becomes the position of its identity in `identities`, from 1 on. A clip
        of another identity gets the label 0.
        """
        if tuple(identities) == self.identities:
            return self
        return Dataset(self._store, self._truth, identities=identities, origin=self._origin)

    def _read(self, splits: Sequence[str]) -> Reader:
        return Reader([self._store.splits[name].packed for name in splits])

    def train_batches(self, plan: BatchPlan, *, step: int = 0) -> Iterator[Batch]:
        """Yields the training batches of `plan` without end, beginning with the batch of `step`.

        If the clips are in files, TensorFlow makes the batches.
        """
        reader = self._read(plan.splits)
        drawn = (draw_clips(plan, number) for number in itertools.count(step))
        if not self._store.folder:
            return self._train_batches(reader, plan, drawn)
        resident = "choose --config.data.mode=resident if the clips fit into the memory"
        require_packages(
            "config.data.mode=streaming", "tensorflow", extra="tensorflow", instead=resident
        )
        from vidjax.data.tfds import streaming

        return streaming.train_batches(reader, self.modalities, plan, drawn)

    def _train_batches(
        self, reader: Reader, plan: BatchPlan, drawn: Iterator[DrawnClips]
    ) -> Iterator[Batch]:
        """Yields the training batches of `plan`, for clips in memory, without end.

        `drawn` has the clips of each training step.
        """
        for clips, batch_mask, first in drawn:
            arrays = reader.read(clips[batch_mask], plan.modalities)
            frames = {
                name: pad(
                    arrays[name], (plan.batch_size, size), self.modalities[name], first.get(name)
                )
                for name, size in plan.padded_lengths.items()
            }
            yield Batch(frames, clips, batch_mask)

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields batches of `rows` clips, each clip of `plan` once. See `ClipSource`."""
        return eval_batches(self._read([plan.split]), self.modalities, plan, rows)

    def packed(
        self, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, Mapping[str, Packed]]]:
        """Yields the clips of a split in groups, in the order of storage.

        For n clips, an item is a pair: their indices [n] int32, and modality -> their frames,
        joined without padding.
        """
        check_modalities(self.split(split), modalities)
        reader, whole = self._read([split]), self._store.splits[split].packed
        if not self._store.folder:
            yield np.arange(len(whole.names)), {name: whole.frames[name] for name in modalities}
            return
        for first in range(0, len(reader.order), MAX_PACKED_CLIPS):
            clips, packed = reader.order[first : first + MAX_PACKED_CLIPS], {}
            for name, arrays in reader.read(clips, modalities).items():
                fields = {field: np.concatenate(parts) for field, parts in arrays.items()}
                packed[name] = pack_arrays(fields, [len(part) for part in arrays["quality"]])
            yield clips, packed


def _warn_of_copies(first: Split, second: Split) -> None:
    """Warns if clips of the split `second` have the same frames as clips of the split `first`."""
    copies = second.find_copies(first)
    for clip, original in itertools.islice(copies.items(), 1):
        labels = first.labels[[*copies.values()]] != second.labels[[*copies]]
        labels &= first.labelled and second.labelled
        others = f", {int(labels.sum()):,} of them with another label" * bool(labels.any())
        warn(
            f"{len(copies):,} of {len(second.clips):,} clips of {second.name} have the frames of "
            f"clips of {first.name}{others}: '{second.clips[clip]}' equals "
            f"'{first.clips[original]}'\n"
            "remove these clips from one split: a score on them says nothing about new clips"
        )


def label_clips(
    store: Store, truth: Truth, identities: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, Split], dict[str, Any]]:
    """Adds labels to the clips of a dataset.

    Args:
      store: the clips.
      truth: split -> clip -> identity.
      identities: by default, all identities in the ground truth of train and val. A clip of
        `identities[i]` gets the label i + 1. Any other clip gets the label 0.

    Returns three results: the identities; split -> its clips and labels; and the data report, which
    counts clips, frames and labels.
    """
    if identities is None:
        identities = sort_identities(
            identity for split in ("train", "val") for identity in truth.get(split, {}).values()
        )
    column = {identity: position for position, identity in enumerate(identities, 1)}
    report = copy.deepcopy(store.report)
    report["identities"] = len(identities)
    splits = {}
    for name, split in store.splits.items():
        clips, pairs = split.clips, truth.get(name)
        columns = {clip: column.get(identity, 0) for clip, identity in (pairs or {}).items()}
        positives = np.bincount(list(columns.values()), minlength=len(identities) + 1)
        splits[name] = Split(
            name=name,
            clips=clips,
            labels=np.array([columns.get(clip, 0) for clip in clips], np.int32),
            labelled=pairs is not None,
            positives=positives[1:].astype(np.int64),
            num_others=len(set((pairs or {}).values()) - column.keys()),
            lengths=split.lengths,
            quality=split.quality,
            fingerprints=split.fingerprints,
        )
        if positives[0]:
            warn(
                f"{name} has {messages.count(positives[0], 'clip')} of identities that are not in "
                "the training data\n"
                "these clips count as distractors, and the AP of these identities is 0\n"
                "to rank these identities, add clips of them to train, and train again"
            )
        report["splits"][name] |= _report_labels(pairs, clips, identities)
        report["splits"][name]["sha256"] = _digest_split(store, truth, name)
    return tuple(identities), splits, report


def _digest_split(store: Store, truth: Truth, split: str) -> dict[str, Any]:
    """Returns the number of clips of a split, and digests of its names, features and labels."""
    clips, digests = store.splits[split].clips, store.splits[split].digests
    return {
        "clips": len(clips),
        "names": sha256_json(clips),
        "modalities": sorted(store.modalities),
        "records": VERSION,
        "features": sha256_json([sorted(store.modalities.items()), sorted(digests.items())]),
        "labels": sha256_json(sorted(truth[split].items())) if split in truth else None,
    }


def _report_labels(
    truth: Mapping[str, str] | None, clips: Collection[str], identities: Collection[str]
) -> dict[str, Any]:
    if truth is None:
        return {"labelled": False}
    known = len(truth.keys() & set(clips))
    names, positives = np.unique(list(truth.values()), return_counts=True)
    ranges = [
        f"{low + 1}-{high}" if high != np.inf else f"over {low}"
        for low, high in itertools.pairwise(CLIPS_PER_IDENTITY_EDGES)
    ]
    counts, _ = np.histogram(positives, np.add(CLIPS_PER_IDENTITY_EDGES, 0.5))
    return {
        "labelled": True,
        "ground_truth_clips": len(truth),
        "identities": len(names),
        "unlisted_identities": len(set(names.tolist()) - set(identities)),
        "labelled_clips": known,
        "distractors": len(clips) - known,
        "unknown_clips": len(truth) - known,
        "clips_per_identity": dict(zip(ranges, counts.tolist(), strict=True)),
    }
