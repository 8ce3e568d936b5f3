"""Counts the used and skipped frames and clips of a dataset, and formats the data report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.packed_clips import PackedClips, fingerprint_frames, map_again
from vidjax.data.packing import compute_feature_norms
from vidjax.utils import messages

HISTOGRAM_BINS = 20
FRAMES_PER_MAP = 1 << 16  # frames that are read before the file is mapped again, to free memory


def report_modality(
    split: PackedClips, modality: str, path: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the entry of a modality in the data report, and a fingerprint of each of N clips.

    The entry counts the clips and frames of `split` in this modality. `path` is the file of the
    features. The fingerprints are [N] uint64. Clips with the same frames, in any order, have the
    same fingerprint. A clip without frames, or with frames of zeros, has the fingerprint 0.
    """
    frames, counts = split.frames[modality], split.counts[modality]
    lengths = np.asarray(frames.length)
    # The report names clips by their places, so that the folder of a run does not contain names.
    values = split.find_bad_values(modality)
    bad = [{**x._asdict(), "clip": split.names.index(x.clip)} for x in values]
    blocks = range(0, max(1, len(frames.quality)), FRAMES_PER_MAP)
    norms, prints = [], [np.zeros(1, np.uint64)]
    for at in blocks:
        features = np.asarray(map_again(frames).features[at : at + FRAMES_PER_MAP])
        norms.append(compute_feature_norms(features))
        prints.append(fingerprint_frames(features))
    sums = np.cumsum(np.concatenate(prints), dtype=np.uint64)
    start = np.asarray(frames.start)
    report = {
        "file": path.name,
        "clips_seen": counts.clips,
        "clips": int((lengths > 0).sum()),
        "frames_seen": counts.frames,
        "frames": int(lengths.sum()),
        "frames_skipped": counts.skipped,
        "clips_skipped": counts.skipped_clips,
        "values_replaced": dict(sorted(counts.warnings.items())),
        "bad_values": bad,
        "clips_without": int((lengths == 0).sum()),
        "missing_rate": float((lengths == 0).mean()),
        "frames_per_clip": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "quality": _make_histogram(np.asarray(frames.quality)),
        "norm": _make_histogram(np.concatenate(norms)),
    }
    return report, sums[start + lengths] - sums[start]


def _make_histogram(values: np.ndarray) -> dict[str, Any]:
    """Returns a histogram of the finite values, in 20 bins of equal width, as a dict for JSON."""
    finite = values[np.isfinite(values)].astype(np.float64)
    counts, edges = [], []
    if finite.size:
        low, high = float(finite.min()), float(finite.max())
        largest = max(abs(low), abs(high))
        if high - low <= 1e-9 * largest:  # too narrow: rounding would make bins of width 0
            half = max(0.5, 1e-6 * largest)
            low, high = low - half, high + half
        counts, edges = np.histogram(finite, bins=HISTOGRAM_BINS, range=(low, high))
    return {
        "counts": np.asarray(counts).tolist(),
        "edges": np.asarray(edges).tolist(),
        "mean": float(finite.mean()) if finite.size else None,
        "not_finite": int(values.size - finite.size),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Returns the data report as lines of text for a terminal."""
    lines = [messages.count(report["identities"], "identity")]
    for name, split in report["splits"].items():
        labels = "no ground truth"
        if split["labelled"]:
            labels = (
                f"{messages.count(split['identities'], 'identity')}, "
                f"{messages.count(split['distractors'], 'distractor')}, "
                f"{messages.count(split['unknown_clips'], 'unknown clip')} in the ground truth"
            )
        lines.append(f"{name}: {messages.count(split['clips'], 'clip')}, {labels}")
        for name, modality in split["modalities"].items():
            skipped = {**modality["frames_skipped"], **modality["clips_skipped"]}
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count)
            line = (
                f"  {name:6} {modality['frames']:>9,} frames, "
                f"{modality['frames_per_clip']['mean']:.1f} per clip, "
                f"missing in {100 * modality['missing_rate']:.1f} % of clips, "
                f"skipped: {reasons or 'nothing'}"
            )
            replaced = modality["values_replaced"].items()
            if replaced:
                line += f", set to 0: {', '.join(f'{n:,} {reason}' for reason, n in replaced)}"
            bad = [x for x in modality.get("bad_values", ()) if x["problem"] == "negative"]
            if negative := ", ".join(f"{x['frames']:,} {x['field']}" for x in bad):
                line += f", negative: {negative}"
            lines.append(line)
    return "\n".join(lines)
