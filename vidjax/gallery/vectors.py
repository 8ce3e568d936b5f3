"""Turns clips into vectors with a trained run; the same clip always gives the same bits.

The vector of a clip does not depend on the clips read with it: all blocks have the same number of
rows, and the length to which a clip is padded depends on the clip alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.data.clips import (
    BUCKETS,
    MAX_EVAL_FRAMES,
    PAD_LENGTHS,
    EvalPlan,
    TrainingData,
    longest,
)
from vidjax.data.memory import MemoryClips
from vidjax.data.packing import Clips
from vidjax.errors import UserError
from vidjax.gallery.store import Origin
from vidjax.predict import Predictor
from vidjax.run.terminal import uncounted

ROWS = 32  # clips of a block
EMBEDDING = "embedding"  # the one part of a run that is no PLDA

AnyClips = Clips | TrainingData | MemoryClips


class Vectors(NamedTuple):
    """The unit vectors of N clips: `parts` are name -> [N, D] float32, 0 for a clip that lacks one.

    `labels` are the names of the people; None where the ground truth names nobody.
    """

    names: tuple[str, ...]
    parts: dict[str, np.ndarray]
    labels: tuple[str | None, ...]


def origin_of(run: Predictor) -> Origin:
    """Returns what a gallery keeps of its run, to find it again and to know its weights."""
    digest = files.sha256_json(sorted(run.manifest["files"].items()))
    return Origin(str(run.workdir), digest, run.system.model.gallery_settings() is not None)


def embed(
    run: Predictor,
    clips: AnyClips,
    split: str | None = None,
    advance: Callable[[int], None] = uncounted,
) -> Vectors:
    """Returns the vectors of clips; in an ensemble of PLDA the first member makes them.

    `clips` are a dataset, then with the name of a `split`, or clips in memory as `Predictor.embed`
    takes them. `advance` is called with the number of clips of each finished block.
    """
    if split is None and hasattr(clips, "train_batches"):
        raise UserError("name the split of the dataset: --split=S, or split=S")
    source, split, places, names, _ = run.request(clips, split)
    values: np.ndarray | None = None
    lengths = longest(source.split(split), tuple(run.modalities))
    pad = np.searchsorted(PAD_LENGTHS, np.minimum(lengths, MAX_EVAL_FRAMES))
    for number in np.unique(pad).tolist():
        bucket = np.where(pad == number, 0, -1)
        padded = dict.fromkeys(run.modalities, (PAD_LENGTHS[number],) * len(BUCKETS))
        plan = EvalPlan(split, tuple(run.modalities), bucket, padded)
        for batch in source.eval_batches(plan, rows=ROWS):
            (block,) = run.embed_blocks([batch])
            if values is None:
                values = np.zeros((len(lengths), block.shape[1]), np.float32)
            real = np.asarray(batch.batch_mask)
            values[np.asarray(batch.clip_index)[real]] = block[real]
            advance(int(real.sum()))
    assert values is not None  # there is at least one clip
    found = source.split(split)
    known = (None, *source.identities) if found.labelled else (None,)
    labels = tuple(known[label] for label in found.labels[places].tolist())
    return Vectors(names, _parts(run, values[places]), labels)


def _parts(run: Predictor, values: np.ndarray) -> dict[str, np.ndarray]:
    """Splits embeddings [N, sum of D] into unit vectors: a part per modality for PLDA, else one."""
    parts, at, model = {}, 0, run.system.model
    plda = model.gallery_settings()
    for name, width in (model.modalities if plda else {EMBEDDING: values.shape[1]}).items():
        x = values[:, at : at + width].astype(np.float64)
        norm = np.sqrt(np.vecdot(x, x))[:, None]
        parts[name] = (x / np.where(norm > 0, norm, 1.0)).astype(np.float32)
        at += width
    return parts
