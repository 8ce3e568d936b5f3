"""MAP of a sample of clips with changed frames, or without one member; effect of hidden frames.

The sample depends on the split alone. Each change of a clip depends on the clip alone, not on the
block that it is scored in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, metrics
from vidjax.batch import Array, Batch, Frames
from vidjax.data.clips import Split, make_eval_plan
from vidjax.evaluation.scoring import ClipScores, ModelScorer, TrainedModel
from vidjax.steps.topk import RunningTopK

SAMPLE = 2000  # clips, divided by the number of members
LEAST_SAMPLE = 200
NUM_CLIPS = 6  # clips whose frames are hidden one by one
MOST_FRAMES = 32  # of such a clip
MOST_MEMBERS = 10  # in larger ensembles the gain of a member is not measured
SHARES = {"half of the frames": 0.5, "a quarter of the frames": 0.25, "one frame": 0.0}
NOISE = (0.5, 1.0)  # norm of the noise that is added to a frame, relative to the frame's norm
PLAIN = "nothing changed"


# The variants of a block: for each a key, the changed block, and the member to leave out or None.
Variants = Callable[[Batch], Iterable[tuple[Any, Batch, int | None]]]


class SampleScorer:
    """Scores blocks of `rows` clips of a split; callers may change a block before it is scored."""

    def __init__(self, model: TrainedModel, split: Split, mesh: Mesh, rows: int):
        self.model, self.split, self.rows = model, split, rows
        self.scorer = ModelScorer(model, split.clips, mesh)
        self._mesh = mesh

    def blocks(self, only: np.ndarray) -> Iterator[Batch]:
        """Yields blocks of the clips `only` [N] bool as numpy arrays, padded as in the split."""
        join = not self.model.system.frame_is_example
        plan = make_eval_plan(self.split, self.model.modalities, only=only, join=join)
        return map(devices.fetch, self.model.data.eval_batches(plan, rows=self.rows))

    def score(self, block: Batch, without: int | None = None) -> tuple[Array, Batch]:
        """Returns the scores [B, C] of a block, without a member, and the block on the devices."""
        block = devices.shard_batch(self._mesh, block)
        (scores,) = self.scorer.score([block], without=without)
        return scores, block

    def maps(self, sample: np.ndarray, variants: Variants) -> dict[Any, float]:
        """Returns the MAP of a sample [N] bool for every variant of its blocks, in their order."""
        rankings = dict[Any, RunningTopK]()
        for block in self.blocks(sample):
            for key, changed, without in variants(block):
                scores, placed = self.score(changed, without)
                if key not in rankings:
                    rankings[key] = RunningTopK(scores.shape[1], rows=self.rows, mesh=self._mesh)
                rankings[key].add((scores, placed.clip_index, placed.batch_mask))
        truth = self.split.labels, count_positives(self.split, sample)
        return {
            key: metrics.mean_average_precision(ranking.finish().index, *truth)
            for key, ranking in rankings.items()
        }


def choose_sample(pool: np.ndarray, num_members: int, rng: np.random.Generator) -> np.ndarray:
    """Draws [N] bool, a sample of the clips in `pool` [N] bool; smaller for more members."""
    clips = np.flatnonzero(pool)
    size = min(max(SAMPLE // num_members, LEAST_SAMPLE), len(clips))
    sample = np.zeros(len(pool), bool)
    sample[rng.choice(clips, size, replace=False)] = True
    return sample


def count_positives(split: Split, sample: np.ndarray) -> np.ndarray:
    """Returns [C] int, the clips of every identity in a sample [N] bool."""
    return np.bincount(split.labels[sample], minlength=len(split.positives) + 1)[1:]


def robustness(scorer: SampleScorer, sample: np.ndarray) -> list[dict[str, Any]]:
    """Returns the MAP of a sample [N] bool under every change of its clips; PLAIN comes first."""
    names = scorer.model.modalities
    maps = scorer.maps(
        sample, lambda block: ((change, changed, None) for change, changed in changes(block, names))
    )
    return [{"change": change, "map": value} for change, value in maps.items()]


def member_gains(scorer: SampleScorer, sample: np.ndarray, plain: float) -> list[float]:
    """Returns the fall of MAP from `plain` when an ensemble leaves out each member in turn.

    Empty for more than `MOST_MEMBERS`, and where one member alone scores some clip of the sample.
    """
    members = range(scorer.scorer.num_members)
    fewest = scorer.scorer.use[:, sample].sum(axis=0).min(initial=len(members))
    if fewest < 2 or len(members) > MOST_MEMBERS:
        return []
    maps = scorer.maps(sample, lambda block: ((number, block, number) for number in members))
    return [plain - value for value in maps.values()]


def changes(block: Batch, names: Sequence[str]) -> Iterator[tuple[str, Batch]]:
    """Yields (name of a change, the changed block); the first one is `PLAIN`."""
    yield PLAIN, block
    for name in names if len(names) > 1 else ():
        frames = block.frames[name]
        absent = frames._replace(mask=np.zeros_like(frames.mask))
        yield f"no {name}", block._replace(frames={**block.frames, name: absent})
    order, noise = _draw(block, names)
    for change, share in SHARES.items():
        kept = {name: _keep(block.frames[name], order[name], share) for name in names}
        yield change, block._replace(frames={**block.frames, **kept})
    for level in NOISE:
        noisy = {name: _add_noise(block.frames[name], noise[name], level) for name in names}
        change = f"noise of {level:g} of a frame's norm"
        yield change, block._replace(frames={**block.frames, **noisy})


def _draw(
    block: Batch, names: Sequence[str]
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Draws sort keys of frames, [B, T], and noise [B, T, D] with about the norm of its frame."""
    order = {name: np.ones(block.frames[name].mask.shape) for name in names}
    noise = {name: np.zeros(block.frames[name].features.shape, np.float32) for name in names}
    for row in np.flatnonzero(block.batch_mask):
        for number, name in enumerate(names):
            mask = block.frames[name].mask[row]
            rng = np.random.default_rng((int(block.clip_index[row]), number))
            order[name][row] = np.where(mask, rng.random(len(mask)), 2.0)
            x = block.frames[name].features[row, mask].astype(np.float32)
            norm = np.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5
            noise[name][row, mask] = norm * rng.standard_normal(x.shape, np.float32)
    return order, noise


def _keep(frames: Frames, order: np.ndarray, share: float) -> Frames:
    """Keeps a share of each clip's frames, at least one: those of least `order` [B, T]."""
    count = np.maximum(np.ceil(share * frames.mask.sum(axis=1)), 1)
    place = np.argsort(np.argsort(order, axis=1), axis=1)
    return frames._replace(mask=frames.mask & (place < count[:, None]))


def _add_noise(frames: Frames, noise: np.ndarray, level: float) -> Frames:
    noisy = frames.features + level * noise
    return frames._replace(features=noisy.astype(frames.features.dtype))


def choose_clips(
    scorer: SampleScorer, clips: ClipScores, sample: np.ndarray, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """Draws labelled clips of a sample [N] bool, half of them identified correctly.

    Returns the first modality with several frames per clip, and the clips [N] bool.
    """
    split, names = scorer.split, scorer.model.modalities
    modality = next((name for name in names if (split.lengths[name] > 1).any()), names[0])
    lengths = split.lengths[modality]
    # One row of a block hides nothing, every other row hides one frame.
    most = min(MOST_FRAMES, scorer.rows - 1)
    eligible = sample & (split.labels > 0) & (lengths > 1) & (lengths <= most)
    chosen = np.zeros_like(sample)
    for group in (eligible & clips.right, eligible & ~clips.right):
        index = np.flatnonzero(group)
        chosen[rng.choice(index, min(NUM_CLIPS // 2, len(index)), replace=False)] = True
    return modality, chosen


def occlusion(
    scorer: SampleScorer, clips: ClipScores, modality: str, chosen: np.ndarray
) -> list[dict[str, Any]]:
    """Measures how far the score of a clip's own identity falls when one frame is hidden.

    `chosen` are clips, [N] bool; those that cannot be scored without some frame are left out.

    Source: occlusion sensitivity of Zeiler and Fergus 2014, Visualizing and Understanding
    Convolutional Networks. Ours: a frame is hidden, not a patch of an image.
    """
    rows = []
    for block in scorer.blocks(chosen):
        for row in np.flatnonzero(block.batch_mask):
            falls = _hide_frames(scorer, modality, block, int(row))
            if not np.isfinite(falls).all():
                continue
            clip = int(block.clip_index[row])
            frames: Frames = jax.tree.map(lambda x, row=row: x[row], block.frames[modality])
            rows.append(
                {
                    "clip": scorer.split.clips[clip],
                    "identity": int(scorer.split.labels[clip]) - 1,
                    "right": bool(clips.right[clip]),
                    "modality": modality,
                    "numbers": frames.number[frames.mask].tolist(),
                    "quality": np.nan_to_num(frames.quality[frames.mask]).astype(float).tolist(),
                    "falls": falls.tolist(),
                }
            )
    return sorted(rows, key=lambda row: (not row["right"], row["clip"]))


def _hide_frames(scorer: SampleScorer, modality: str, block: Batch, row: int) -> np.ndarray:
    """Returns [T] float, the fall of the score of a clip's own identity for each hidden frame."""
    copies: Batch = jax.tree.map(lambda x: np.repeat(x[row : row + 1], scorer.rows, axis=0), block)
    frames = copies.frames[modality]
    places = np.flatnonzero(frames.mask[0])
    mask = frames.mask.copy()
    mask[np.arange(len(places)) + 1, places] = False  # row 0 hides nothing
    hidden = {**copies.frames, modality: frames._replace(mask=mask)}
    scores, _ = scorer.score(copies._replace(frames=hidden))
    column = int(scorer.split.labels[copies.clip_index[0]]) - 1
    values = np.asarray(devices.fetch(scores), np.float64)[: len(places) + 1, column]
    return values[0] - values[1:]
