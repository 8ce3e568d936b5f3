"""Known clips against distractors: scores of both, errors at thresholds, and calibration."""

import numpy as np

from vidjax import metrics
from vidjax.steps.sinks import ClipScores

SCORE_BINS, CONFIDENCE_BINS = 40, 10


def score_histograms(clips: ClipScores, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns histograms of the clips' best scores; none where no clip has a score.

    Args:
      clips: the best score of every clip.
      labels: [N] int, class columns.

    Returns:
      `score_edges` [bins + 1]; `score_known` and `score_strange` [bins], the counts of labelled
      clips and of distractors. Scores below the 0.5 % quantile are counted in the first bin.
    """
    scored = clips.pool & (clips.best > -np.inf)
    if not scored.any():
        return {}
    values = clips.best.astype(np.float64)
    low, high = np.quantile(values[scored], [0.005, 1.0])
    edges = np.linspace(low, max(high, low + 1e-6), SCORE_BINS + 1)
    inside = np.clip(values, low, edges[-1])
    return {
        "score_edges": edges,
        "score_known": np.histogram(inside[scored & (labels > 0)], edges)[0],
        "score_strange": np.histogram(inside[scored & (labels == 0)], edges)[0],
    }


def error_curve(clips: ClipScores, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `fpir` and `fnir` [n] at n thresholds; nothing without distractors or known clips.

    The arguments are those of `score_histograms`.
    """
    pool = clips.pool
    known = labels[pool] > 0
    shares = np.unique([*np.geomspace(1e-3, 1, 40), 0.01, 0.1])
    errors = [
        metrics.identification_errors(clips.best[pool], clips.right[pool], known, fpir=share)
        for share in shares
    ]
    if errors[0] is None:
        return {}
    return {
        "fpir": np.array([error.fpir for error in errors if error]),
        "fnir": np.array([error.fnir for error in errors if error]),
    }


def calibration(clips: ClipScores) -> tuple[np.ndarray, float] | None:
    """Compares the confidence of the best scores with the share of clips that are right.

    Args:
      clips: the best score of every clip, logarithms of probabilities.

    Returns:
      [bins, 3] float: clips, mean confidence, and share that is right, per bin of confidence; and
      the expected calibration error, 0..1. None where no clip has a score.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    scored = clips.pool & (clips.best > -np.inf)
    if not scored.any():
        return None
    confidence = np.minimum(np.exp(clips.best.astype(np.float64)[scored]), 1.0)
    place = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    count = np.bincount(place, minlength=CONFIDENCE_BINS)
    means = [
        np.bincount(place, weight, CONFIDENCE_BINS) / np.maximum(count, 1)
        for weight in (confidence, clips.right[scored])
    ]
    error = np.sum(count * np.abs(means[0] - means[1])) / max(count.sum(), 1)
    return np.stack([count, *means], axis=1), float(error)
