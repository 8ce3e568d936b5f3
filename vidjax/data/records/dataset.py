"""Reads the clips of a dataset, with labels, for training and evaluation.

TensorFlow is imported only if training batches are read from disk while the training runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidjax.core.batch import Batch, Packed
from vidjax.data import order
from vidjax.data.checks import (
    find_equal_quality,
    find_misspelt,
    find_transposed,
    warn_of_bad_values,
)
from vidjax.data.clips import (
    BatchPlan,
    ClipReader,
    EvalPlan,
    Modality,
    Origin,
    Split,
    check_modalities,
    eval_batches,
    pad,
)
from vidjax.data.labels import Truth
from vidjax.data.packed_clips import BadValues, PackedReader, pack_arrays
from vidjax.data.records.data_report import label_records
from vidjax.data.records.shards import Reader, Records, SplitRecords
from vidjax.utils.errors import UserError, require_packages, warn
from vidjax.utils.files import sha256_json

MAX_PACKED_CLIPS = 256  # clips that `Dataset.packed` reads from the disk at once


class Dataset:
    """The clips of a dataset with their labels.

    Attributes:
      identities: the names of the classes. Label c of a clip means `identities[c - 1]`.
      modalities: modality -> width and dtype of its features.
      report: the data report, which counts frames, clips and labels. Its entry `data` has the name,
        the folder and the digest of the dataset.
    """

    def __init__(
        self,
        records: Records,
        truth: Truth,
        *,
        identities: Sequence[str] | None = None,
        origin: Origin | None = None,
    ):
        """Adds labels to clips. See `label_records`. Result files show `origin`."""
        self._records = records
        self._truth = truth
        self._origin = origin or Origin("records")
        self.modalities: dict[str, Modality] = records.modalities
        self.identities, self._splits, self.report = label_records(records, truth, identities)
        digests = sorted((name, split["sha256"]) for name, split in self.report["splits"].items())
        self.report["data"] = self._origin._asdict() | {"digest": sha256_json(digests)}
        for name, split in records.splits.items():
            counts = self.report["splits"][name]["modalities"]
            official = self._origin.name != "arrays"
            _warn_of_gaps(name, split, self.modalities, counts, official=official)
        lengths = {name: split.lengths for name, split in records.splits.items()}
        widths = {name: modality.dim for name, modality in self.modalities.items()}
        for problem in (
            *find_misspelt(lengths),
            *find_transposed(lengths, widths),
            *find_equal_quality(self.report, list(self.modalities)),
        ):
            warn(problem)

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
            remedy = "choose one of them"
            if "train" in self._splits:
                remedy += ", or evaluate on left-out clips of train:\n"
                remedy += "--config.eval.split=train --config.ensemble.folds=5"
            raise UserError(f"the data have no split {name!r}, only {known}\n{remedy}")
        return self._splits[name]

    def with_identities(self, identities: Sequence[str]) -> "Dataset":
        """Returns the same clips, labelled with other classes. See `TrainingData`."""
        if tuple(identities) == self.identities:
            return self
        return Dataset(self._records, self._truth, identities=identities, origin=self._origin)

    def _read(self, splits: Sequence[str]) -> ClipReader:
        """Returns the reader of the clips of several splits, which are in memory or on the disk."""
        packed = [split.packed for name in splits if (split := self._records.splits[name]).packed]
        return PackedReader(packed) if packed else Reader(self._records, splits)

    def train_batches(self, plan: BatchPlan, *, step: int = 0) -> Iterator[Batch]:
        """Yields the training batches of `plan`. See `TrainingData`.

        TensorFlow makes the batches of clips on the disk.
        """
        reader = self._read(plan.splits)
        parts = [self.split(name).lengths for name in plan.splits]
        lengths = {name: np.concatenate([x[name] for x in parts]) for name in plan.windowed}
        drawn = order.draw_on_host(plan, lengths, step)
        if not isinstance(reader, Reader):
            return self._train_batches(reader, plan, drawn)
        resident = "choose --config.data.mode=resident if the clips fit into the memory"
        require_packages(
            "config.data.mode=streaming", "tensorflow", extra="tensorflow", instead=resident
        )
        from vidjax.data.records import streaming

        return streaming.train_batches(reader, self.modalities, plan, drawn)

    def _train_batches(
        self, reader: ClipReader, plan: BatchPlan, drawn: Iterator[order.HostClips]
    ) -> Iterator[Batch]:
        """Yields the training batches of clips in memory. `drawn` are the clips of each step."""
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
        """Yields every clip of `plan` once. See `ClipSource`."""
        return eval_batches(self._read([plan.split]), self.modalities, plan, rows)

    def packed(
        self, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, Mapping[str, Packed]]]:
        """Yields all clips, in the order of storage. See `TrainingData`."""
        check_modalities(self.split(split), modalities)
        reader, whole = self._read([split]), self._records.splits[split].packed
        if whole:
            yield reader.clip_index, {name: whole.frames[name] for name in modalities}
            return
        for first in range(0, len(reader.clip_index), MAX_PACKED_CLIPS):
            places = np.arange(first, min(first + MAX_PACKED_CLIPS, len(reader.clip_index)))
            packed = {}
            for name, arrays in reader.read(places, modalities).items():
                fields = {field: np.concatenate(parts) for field, parts in arrays.items()}
                packed[name] = pack_arrays(fields, [len(part) for part in arrays["quality"]])
            yield reader.clip_index[places], packed


def _warn_of_gaps(
    name: str,
    split: SplitRecords,
    modalities: Mapping[str, Modality],
    report: Mapping[str, Mapping[str, Any]],
    *,
    official: bool,
) -> None:
    """Warns if a split lacks modalities of other splits, or if frames are left out or unusual.

    For `official`, see `warn_of_bad_values`.
    """
    absent = [modality for modality in modalities if modality not in split.lengths]
    if absent:
        warn(
            f"{name}: the split has no features of {', '.join(absent)}, unlike other splits\n"
            "add them, or leave these modalities out of config.modalities"
        )
    for modality, counts in report.items():
        if dropped := counts["frames_skipped"].get("non_finite"):
            warn(
                f"{counts['file']}: {dropped} of {counts['frames_seen']} frames are left out, "
                f"because their {modality} features have a NaN, an Inf or a value beyond float32\n"
                "to use these frames, compute their features again"
            )
        values = (
            BadValues(**x | {"clip": split.clips[x["clip"]]})
            for x in counts.get("bad_values", ())  # data of an older version have none
        )
        place, frames = f"{name}, {modality}", counts["frames_seen"]
        warn_of_bad_values(place, values, frames, official=official)
