"""What evaluation finds beside MAP, as numbers without features: `analysis.npz`.

What covers the whole split is read off the ranking, or summed up in the pass that ranks. What needs
the scores of changed clips is measured on a sample that depends on the split alone.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, metrics, ranking, selection
from vidjax.batch import Array, Batch, LazyFeatures
from vidjax.data.clips import Split, make_eval_plan
from vidjax.steps import eval_step as eval_step_lib
from vidjax.steps.scoring import ClipScores, Evaluation, ModelScorer, TrainedModel

SAMPLE = 2000  # clips, divided by the number of members
LEAST_SAMPLE = 200
NUM_WORST = 20
NUM_CLIPS = 6  # whose frames are hidden one by one
MOST_FRAMES = 32  # of such a clip
MOST_MEMBERS = 10  # of an ensemble that is scored without each in turn
MOST_GROUPS = 8  # of clips by the modalities that they have
QUANTILES = 5  # groups of clips by quality
SCORE_BINS, CONFIDENCE_BINS = 40, 10
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # upper edges of groups by a count
SHARES = {"half of the frames": 0.5, "a quarter of the frames": 0.25, "one frame": 0.0}
NOISE = (0.5, 1.0)  # norm of what is added to a frame, relative to its own
PLAIN = "nothing changed"


class Observer:
    """Looks on while systems are scored (`observe` of `scoring.score`), then measures the rest.

    Several systems that are joined have no sample and no attention here: their own folders do.
    """

    def __init__(self, models: Sequence[TrainedModel], split_name: str, mesh: Mesh):
        """Begins with nothing seen; arguments as of `scoring.score`."""
        self._run, self._alone = models[0], len(models) == 1
        self._split_name, self._mesh = split_name, mesh
        self._lead = self._run.scorer.modalities[0]
        self._quality: list[tuple[Array, ...]] = []
        self._sown: list[Mapping[str, Array]] = []
        self._look = None
        self._rows = 0

    def __call__(self, blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        """Notes what some blocks of clips show; their scores are ranked elsewhere."""
        del scores
        run = self._run
        if not self._rows:
            self._rows = len(blocks[0].clip_index)
            if self._alone and not run.scorer.system.examples:
                self._params = ensemble.take((run.params, run.model_state), 0)
                self._view = jnp.int32(run.training_sets.members[0].view)
                look = functools.partial(eval_step_lib.attention_step, run.scorer.system)
                if jax.eval_shape(look, *self._params, self._view, blocks[0]):
                    self._look = jax.jit(look)
        for block in blocks:
            one = block.frames[self._lead]
            quality = _mean_quality(one.quality, one.mask)
            self._quality.append((quality, block.clip_index, block.batch_mask))
            if self._look:
                self._sown.append(self._look(*self._params, self._view, block))

    def finish(
        self, evaluation: Evaluation, train_splits: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns facts, fit for JSON, and arrays: what `run.results.save_analysis` writes.

        Args:
          evaluation: what `scoring.score` returned.
          train_splits: whose ground truth says how many clips an identity was trained on; those
            that the data does not hold count for nothing.
        """
        run, results = self._run, evaluation.results
        split = run.data.split(self._split_name)
        facts: dict[str, Any] = {
            "split": self._split_name,
            "lead": self._lead,
            "modalities": list(run.scorer.modalities),
            "logs": run.scorer.logs,
            "results": {
                name: results.get(name)
                for name in ("map", "map_kind", "num_clips", "num_distractors")
            },
            "members": results.get("members", []),
            "runs": results.get("runs", []),
        }
        arrays: dict[str, np.ndarray] = {}
        facts |= self._attention(arrays)
        if results.get("map") is None:
            return facts, arrays
        trained = _count_trained(run, train_splits)
        found = _found(evaluation.top, split.labels)  # [C, k]
        average = metrics.average_precision(_hits(found), evaluation.positives)
        arrays |= {"ap": average, "positives": np.asarray(evaluation.positives, np.int64)}
        facts["num_others"] = split.num_others if evaluation.clips.pool.all() else 0
        if trained is not None:
            arrays["train_clips"] = trained
        facts["worst"] = _worst(evaluation, found, average, split.labels)
        facts["strata"] = self._strata(evaluation, found, average, trained, split)
        facts |= _open_set(evaluation.clips, split.labels, run.scorer.logs, arrays)
        if self._alone:
            facts |= self._sampled(evaluation, split)
        return facts, arrays

    def _attention(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns what the models attended to, over the whole split, by the first member."""
        sums: dict[str, np.ndarray] = {}
        for of_block in jax.device_get(self._sown):
            for name, value in of_block.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
        facts: dict[str, Any] = {"assignment": {}}
        for name, total in sums.items():
            if name == "attention":
                weight = total.sum(axis=0)  # of column j: the clips that have vector j
                arrays["attention"] = total / np.where(weight > 0, weight, 1.0)
                names = self._run.scorer.system.model.vector_names
                numbers = [str(i + 1) for i in range(len(total))]
                facts["vectors"] = list(names) if len(names) == len(total) else numbers
            else:
                share = total / max(total.sum(), 1e-12)
                facts["assignment"][name.removeprefix("assignment/")] = share.tolist()
        return facts

    def _strata(
        self,
        evaluation: Evaluation,
        found: np.ndarray,
        average: np.ndarray,
        trained: np.ndarray | None,
        split: Split,
    ) -> list[dict[str, Any]]:
        """Returns MAP by kinds of identities and of clips."""
        pool, labels = evaluation.clips.pool, split.labels
        tables = []
        if trained is not None:
            rows, positives = [], evaluation.positives
            for label, chosen in _by_count(trained):
                chosen = chosen & (positives > 0)
                if chosen.any():
                    clips = int(positives[chosen].sum())
                    rows.append(_row(label, float(average[chosen].mean()), chosen.sum(), clips))
            tables.append({"by": "training clips of the identity", "rows": rows})

        def add(by: str, groups: Sequence[tuple[str, np.ndarray]]) -> None:
            rows = []
            for label, chosen in groups:
                value, identities, clips = _map_among(
                    evaluation.top, found, labels, chosen & pool & (labels > 0)
                )
                if value is not None:
                    rows.append(_row(label, value, identities, clips))
            tables.append({"by": by, "rows": rows})

        quality, index, mask = (
            np.concatenate([np.asarray(x) for x in part])
            for part in zip(*self._quality, strict=True)
        )
        by_clip = np.zeros(len(labels))
        by_clip[index[mask]] = quality[mask]
        lengths = split.lengths[self._lead]
        groups = _by_quantile(by_clip, lengths > 0)
        if groups:
            add(f"mean quality of {self._lead}", [*groups, (f"no {self._lead}", lengths == 0)])
        add(f"frames of {self._lead}", _by_count(lengths))
        names = self._run.scorer.modalities
        if len(names) > 1:
            has = np.stack([split.lengths[name] > 0 for name in names])  # [M, N]
            code = np.sum(has << np.arange(len(names))[:, None], axis=0)
            common = [value for value, _ in Counter(code[pool].tolist()).most_common(MOST_GROUPS)]
            sets = []
            for value in sorted(common, reverse=True):
                present = [name for i, name in enumerate(names) if value >> i & 1]
                label = "all" if len(present) == len(names) else ", ".join(present) or "none"
                sets.append((label, code == value))
            add("modalities that the clip has", [*sets, ("others", ~np.isin(code, common))])
        return tables

    def _sampled(self, evaluation: Evaluation, split: Split) -> dict[str, Any]:
        """Returns what becomes of MAP on a sample whose clips are changed, or a member missing."""
        run, labels = self._run, split.labels
        entry = ModelScorer(run, split.clips, self._mesh)
        num_members = len(run.training_sets.members)
        pool = np.flatnonzero(evaluation.clips.pool)
        rng = np.random.default_rng(0)
        size = min(max(SAMPLE // num_members, LEAST_SAMPLE), len(pool))
        sample = np.zeros(len(labels), bool)
        sample[rng.choice(pool, size, replace=False)] = True
        positives = np.bincount(labels[sample], minlength=len(split.positives) + 1)[1:]
        facts: dict[str, Any] = {"num_sampled": size}
        if not positives.any():
            return facts

        tallies: dict[str, ranking.Ranking] = {}
        without = [ranking.Ranking(len(positives), rows=self._rows) for _ in entry.use]
        alone = entry.use[:, sample].sum(axis=0).min(initial=num_members) < 2
        if alone or num_members > MOST_MEMBERS:
            without = []
        lead, chosen = self._choose(evaluation.clips, split, sample, rng)
        frames = []
        for block in self._blocks(sample):
            for name, changed in _changes(block, run.scorer.modalities):
                tally = tallies.setdefault(name, ranking.Ranking(len(positives), rows=self._rows))
                self._rank(tally, entry, changed)
            for number, tally in enumerate(without):
                self._rank(tally, entry, block, number)
            for row in np.flatnonzero(block.batch_mask & chosen[block.clip_index]):
                frames.append(self._hide(entry, split, evaluation.clips, lead, block, int(row)))

        def value_of(tally: ranking.Ranking) -> float:
            return metrics.mean_average_precision(tally.finish().index, labels, positives)

        values = {name: value_of(tally) for name, tally in tallies.items()}
        facts["robustness"] = [{"change": name, "map": value} for name, value in values.items()]
        if without:
            facts["gains"] = [values[PLAIN] - value_of(tally) for tally in without]
        found = [one for one in frames if one is not None]
        facts["frames"] = sorted(found, key=lambda one: (not one["right"], one["clip"]))
        return facts

    def _blocks(self, only: np.ndarray) -> Any:
        """Yields blocks of some clips, shaped as those of the split, on the host."""
        data, names = self._run.data, self._run.scorer.modalities
        plan = make_eval_plan(data.split(self._split_name), names, only=only)
        return map(_on_host, data.eval_batches(plan, rows=self._rows))

    def _rank(
        self, tally: ranking.Ranking, entry: ModelScorer, block: Batch, without: int | None = None
    ) -> None:
        block = devices.shard_batch(self._mesh, block)
        (scores,) = entry.score([block], without)
        tally.add((scores, block.clip_index, block.batch_mask))

    def _choose(
        self, clips: ClipScores, split: Split, sample: np.ndarray, rng: np.random.Generator
    ) -> tuple[str, np.ndarray]:
        """Returns a modality with several frames, and [N] bool, some clips of which to hide them.

        Half of the clips are named rightly, half are not.
        """
        names = self._run.scorer.modalities
        lead = next((name for name in names if (split.lengths[name] > 1).any()), names[0])
        lengths = split.lengths[lead]
        most = min(MOST_FRAMES, self._rows - 1)
        fit = sample & (split.labels > 0) & (lengths > 1) & (lengths <= most)
        chosen = np.zeros_like(sample)
        for kind in (fit & clips.right, fit & ~clips.right):
            at = np.flatnonzero(kind)
            chosen[rng.choice(at, min(NUM_CLIPS // 2, len(at)), replace=False)] = True
        return lead, chosen

    def _hide(
        self, entry: ModelScorer, split: Split, clips: ClipScores, lead: str, block: Batch, row: int
    ) -> dict[str, Any] | None:
        """Returns by how much the score of a clip's identity falls when a frame is hidden.

        None where the clip cannot be scored without one of them.
        """
        rows = jax.tree.map(lambda x: np.repeat(x[row : row + 1], self._rows, axis=0), block)
        one = rows.frames[lead]
        places = np.flatnonzero(one.mask[0])
        mask = one.mask.copy()
        mask[np.arange(len(places)) + 1, places] = False  # row 0 hides nothing
        frames = {**rows.frames, lead: one._replace(mask=mask)}
        hidden = devices.shard_batch(self._mesh, rows._replace(frames=frames))
        clip = int(rows.clip_index[0])
        column = int(split.labels[clip]) - 1
        (scores,) = entry.score([hidden])
        scores = np.asarray(scores[:, column], np.float64)[: len(places) + 1]
        falls = scores[0] - scores[1:]
        if not np.isfinite(falls).all():
            return None
        return {
            "clip": split.clips[clip],
            "identity": column,
            "right": bool(clips.right[clip]),
            "modality": lead,
            "numbers": one.number[0, places].tolist(),
            "quality": np.nan_to_num(one.quality[0, places]).astype(float).tolist(),
            "falls": falls.tolist(),
        }


@jax.jit
def _mean_quality(quality: Array, mask: Array) -> Array:
    """Returns [B] the mean quality of a clip's frames, 0 without any."""
    finite = jnp.where(jnp.isfinite(quality), quality, 0.0)
    return jnp.sum(finite, axis=1, where=mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _on_host(block: Batch) -> Batch:
    """Returns a block as numpy arrays with features [B, T, D], wherever they lie."""
    frames = {
        name: one._replace(features=_read(one.features))
        if isinstance(one.features, LazyFeatures)
        else one
        for name, one in block.frames.items()
    }
    return jax.tree.map(np.asarray, block._replace(frames=frames))


_read = jax.jit(selection.read)


def _changes(block: Batch, names: Sequence[str]) -> Any:
    """Yields (what was done to it, a changed block), the same for a clip in whatever block."""
    yield PLAIN, block
    for name in names if len(names) > 1 else ():
        one = block.frames[name]
        gone = one._replace(mask=np.zeros_like(one.mask))
        yield f"no {name}", block._replace(frames={**block.frames, name: gone})
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

    def change(fn: Callable[[str, Any], Any]) -> Batch:
        frames = {name: fn(name, block.frames[name]) for name in names}
        return block._replace(frames={**block.frames, **frames})

    for what, share in SHARES.items():

        def keep(name: str, one: Any, share: float = share) -> Any:
            count = np.maximum(np.ceil(share * one.mask.sum(axis=1)), 1)
            place = np.argsort(np.argsort(order[name], axis=1), axis=1)
            return one._replace(mask=one.mask & (place < count[:, None]))

        yield what, change(keep)
    for level in NOISE:

        def add(name: str, one: Any, level: float = level) -> Any:
            noisy = one.features + level * noise[name]
            return one._replace(features=noisy.astype(one.features.dtype))

        yield f"noise of {level:g} of a frame's norm", change(add)


def _found(top: ranking.TopK, labels: np.ndarray) -> np.ndarray:
    """Returns [C, k] int, the class column of every listed clip; -1 at an empty place."""
    index = np.asarray(top.index)
    filled = index < len(labels)
    return np.where(filled, labels[np.where(filled, index, 0)], -1)


def _hits(found: np.ndarray) -> np.ndarray:
    return found == np.arange(1, len(found) + 1)[:, None]


def _map_among(
    top: ranking.TopK, found: np.ndarray, labels: np.ndarray, chosen: np.ndarray
) -> tuple[float | None, int, int]:
    """Returns MAP where an identity's clips that are not chosen are passed over, and counts.

    Args:
      top: the ranking.
      found: [C, k], of `_found`.
      labels: [N] class columns.
      chosen: [N] bool, labelled clips.

    Returns:
      MAP over the identities that have a chosen clip (None without any), how many these are, and
      how many chosen clips there are.
    """
    positives = np.bincount(labels[chosen], minlength=len(found) + 1)[1:]
    if not positives.any():
        return None, 0, 0
    index = np.asarray(top.index)
    hits = _hits(found)
    wanted = hits & chosen[np.where(found >= 0, index, 0)]
    ranks = np.cumsum(wanted | ~hits, axis=1)
    precision = np.where(wanted, np.cumsum(wanted, axis=1) / np.maximum(ranks, 1), 0.0)
    average = precision.sum(axis=1)[positives > 0] / positives[positives > 0]
    return float(average.mean()), len(average), int(positives.sum())


def _row(label: str, value: float, identities: int, clips: int) -> dict[str, Any]:
    return {"label": label, "map": value, "identities": int(identities), "clips": int(clips)}


def _by_count(counts: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns (label, which) of groups by a count."""
    groups, low = [], 0
    for high in (*COUNTS, np.inf):
        if high == np.inf:
            label = f"over {low - 1}"
        else:
            label = str(high) if low == high else f"{low} to {high}"
        groups.append((label, (counts >= low) & (counts <= high)))
        low = high + 1
    return groups


def _by_quantile(values: np.ndarray, chosen: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns (label, which) of equally large groups of chosen values; none where all are equal."""
    if not chosen.any():
        return []
    edges = np.unique(np.quantile(values[chosen], np.linspace(0, 1, QUANTILES + 1)))
    groups = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        below = values <= high if i == len(edges) - 2 else values < high
        groups.append((f"{low:.4g} to {high:.4g}", chosen & (values >= low) & below))
    return groups


def _count_trained(run: TrainedModel, train_splits: Sequence[str]) -> np.ndarray | None:
    """Returns [C] int, the clips that every identity was trained on; None where none is known."""
    total = np.zeros(run.scorer.num_identities + 1, np.int64)
    for name in train_splits:
        try:
            split = run.data.split(name)
        except ValueError:  # the data that is evaluated need not be what was trained on
            continue
        seen = np.isin(split.clips, run.training_sets.clips)
        total += np.bincount(split.labels[seen], minlength=len(total))
    return total[1:] if total.any() else None


def _worst(
    evaluation: Evaluation, found: np.ndarray, average: np.ndarray, labels: np.ndarray
) -> list[dict[str, Any]]:
    """Returns the identities of least average precision, and whom they are confused with.

    `lost_to`: in whose list a clip of the identity stands best, where not in its own; -1: in none.
    `mixed_with`: whose clips take the first places of its list, as many as it has clips itself; -1:
    distractors. Both are pairs of an identity and a count, the most frequent first.
    """
    positives = np.asarray(evaluation.positives)
    known = np.flatnonzero(positives > 0)
    order = known[np.lexsort((known, -positives[known], average[known]))][:NUM_WORST]
    home = _homes(evaluation.top, len(labels))
    rows = []
    for identity in map(int, order):
        own = np.flatnonzero((labels == identity + 1) & evaluation.clips.pool)
        lost = Counter(home[own[home[own] != identity]].tolist())
        places = found[identity, : positives[identity]]
        wrong = Counter((places[(places >= 0) & (places != identity + 1)] - 1).tolist())
        rows.append(
            {
                "identity": identity,
                "ap": float(average[identity]),
                "clips": int(positives[identity]),
                "lost_to": lost.most_common(3),
                "mixed_with": wrong.most_common(3),
            }
        )
    return rows


def _homes(top: ranking.TopK, num_clips: int) -> np.ndarray:
    """Returns [N] int, the identity in whose list a clip has its highest score; -1: in no list."""
    index, scores = np.asarray(top.index), np.asarray(top.scores)
    identity = np.repeat(np.arange(len(index)), index.shape[1])
    index, scores = index.reshape(-1), scores.reshape(-1)
    real = (index < num_clips) & (scores > -np.inf)
    index, scores, identity = index[real], scores[real], identity[real]
    order = np.lexsort((identity, -scores))
    clips, first = np.unique(index[order], return_index=True)
    homes = np.full(num_clips, -1)
    homes[clips] = identity[order][first]
    return homes


def _open_set(
    clips: ClipScores, labels: np.ndarray, logs: bool, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Adds histograms of best scores, errors at thresholds, and how far scores can be trusted."""
    seen = clips.pool & (clips.best > -np.inf)
    known = labels > 0
    values = clips.best.astype(np.float64)
    if seen.any():
        low, high = np.quantile(values[seen], [0.005, 1.0])
        edges = np.linspace(low, max(high, low + 1e-6), SCORE_BINS + 1)
        inside = np.clip(values, low, edges[-1])
        arrays["score_edges"] = edges
        arrays["score_known"] = np.histogram(inside[seen & known], edges)[0]
        arrays["score_strange"] = np.histogram(inside[seen & ~known], edges)[0]
    shares = np.unique([*np.geomspace(1e-3, 1, 40), 0.01, 0.1])
    pool = clips.pool
    errors = [
        metrics.identification_errors(clips.best[pool], clips.right[pool], known[pool], fpir=share)
        for share in shares
    ]
    if errors[0] is not None:
        arrays["fpir"] = np.array([one.fpir for one in errors if one])
        arrays["fnir"] = np.array([one.fnir for one in errors if one])
    if not logs or not seen.any():
        return {}
    confidence = np.minimum(np.exp(values[seen]), 1.0)
    right = clips.right[seen]
    place = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    count = np.bincount(place, minlength=CONFIDENCE_BINS)
    means = [
        np.bincount(place, weight, CONFIDENCE_BINS) / np.maximum(count, 1)
        for weight in (confidence, right)
    ]
    arrays["calibration"] = np.stack([count, *means], axis=1)  # [bins, 3]
    gap = np.sum(count * np.abs(means[0] - means[1])) / max(count.sum(), 1)
    return {"calibration_error": float(gap)}
