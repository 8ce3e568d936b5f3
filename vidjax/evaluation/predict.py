"""Scores, ranks and embeds clips with a trained run, from Python.

    run = predict.restore("runs/mma")
    run.rank({"clip_1": {"face": features}})  # identity -> [(clip, score), ...], best first

Scores of the evaluated split equal the scores of `vidjax evaluate` to the bit. If a request has at
most 4 clips, given as arrays, a faster program scores them in milliseconds. Its scores differ by
less than 1e-4 from the scores in a larger request, and do not depend on the other clips.
"""

import dataclasses
import functools
import math
import numbers as number_types
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np

from vidjax.core import devices, metrics
from vidjax.core.batch import Batch
from vidjax.data.clips import ClipSource
from vidjax.data.dataset import Dataset
from vidjax.data.memory import FrameClips, MemoryClips, load_clips
from vidjax.data.packing import Clips
from vidjax.evaluation import blend, eval_step as eval_step_lib, topk, trained_runs
from vidjax.evaluation.scores import Scores, describe, read_blocks
from vidjax.evaluation.scoring import ScoreBlock, TrainedModel, iterate_windows, score_blocks
from vidjax.evaluation.topk import TopK
from vidjax.runs import config as config_lib, config_io, programs, schemas
from vidjax.runs.config import Config
from vidjax.runs.run_folder import RunFolder
from vidjax.utils import files
from vidjax.utils.errors import UserError, check_argument, check_choice, warn
from vidjax.utils.terminal import ignore_count

SMALL_REQUEST = 4  # most clips of a small request, which is scored in a block of this size
THRESHOLD = "threshold_at_fpir_0.01"  # key in `metrics.json`
Advance = Callable[[int], None]  # receives the number of rows of a finished block


class Request(NamedTuple):
    """N clips to score: where they are, their names, and how many are scored at a time."""

    data: ClipSource
    split: str  # the split of `data` that contains the clips
    clip_index: np.ndarray  # [N] int, the index of each clip in the split
    names: tuple[str, ...]  # of the N clips
    block_size: int  # the number of clips that a device scores at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Ranker:
    """Scores and ranks clips with a run (`Predictor`) or a blend of runs (`JointPredictor`).

    The methods take `clips` in any of these forms:

    - a dict, clip -> modality -> features [T, D]. A clip may also have a number for each frame,
      such as `face_quality` [T], as in `vidjax.load_data`.
    - `MemoryClips`, which the method `load` returns.
    - a dataset of `vidjax.load_data` and the name of a `split`. If `split` is None, the methods use
      the split that the run evaluates.

    A clip may lack modalities. A clip without a usable frame scores -inf. If clips do not fit the
    run, the methods raise ValueError, which names the clip, the modality and the field.

    A new clip is scored by all members (nets) of an ensemble, and gets the mean of their scores. A
    training clip is scored only by members that were not trained on it. If all members were trained
    on all training clips, all members score it.

    Attributes:
      results: the results of the checkpoint, as in `metrics.json`, or {} if it was not evaluated.
      identities: names of the C identities, in the order of the scores.
      modalities: name -> feature width.
    """

    workdir: Path
    results: Mapping[str, Any]
    config: Config
    identities: tuple[str, ...]
    modalities: Mapping[str, int]

    def embed(
        self, clips: FrameClips, *, split: str | None = None, advance: Advance = ignore_count
    ) -> np.ndarray:
        """Raises UserError: a blend of runs has no vectors. `Predictor` overrides this method."""
        raise RunFolder(self.workdir).make_blend_error()

    def _score_blocks(self, request: Request) -> Iterator[ScoreBlock]:
        """Yields the scores of the clips of a request, in blocks of clips."""
        raise NotImplementedError

    def _rank(self, request: Request, advance: Advance) -> TopK:
        """Returns the best clips of each identity. For `advance`, see `rank`."""
        k = SMALL_REQUEST if len(request.clip_index) <= SMALL_REQUEST else topk.MAX_NAMES

        def blocks() -> Iterator[topk.ScoreBlock]:
            for block in self._score_blocks(request):
                yield block
                advance(len(block.mask))

        return topk.rank(blocks(), len(self.identities), k)

    @property
    def threshold(self) -> float | None:
        """The score that on average at most 1 % of new strangers reach, or None if it is unknown.

        The score is unknown in three cases:

        - The checkpoint was not evaluated.
        - Fewer than 99 clips of strangers were evaluated.
        - An ensemble was evaluated out of fold, so not all members scored each clip.
        """
        value = None if self._explain_no_threshold() else self.results.get(THRESHOLD)
        return float(value) if isinstance(value, (int, float)) else None

    def _explain_no_threshold(self) -> str:
        """Returns the reason why `threshold` is unknown, as the end of an error message.

        If the threshold is known, returns "". If the run was evaluated without strangers, returns
        "", too, because `identify` then uses no threshold.
        """
        if not self.results:
            words = f"vidjax evaluate --workdir={shlex.quote(str(self.workdir))}"
            words += " --config.eval.checkpoint=best" * (self.config.eval.checkpoint == "best")
            return f"evaluate the checkpoint first, {words}"
        count = self.results.get("num_distractors") or 0
        if count and metrics.count_allowed(count, 0.01) < 0:
            return f"{count} clips of strangers are too few for a rate of 1 %, which needs 99"
        of_few_members = self.results.get("map_kind") == "out_of_fold"
        is_known = self.results.get(THRESHOLD) is not None
        if is_known and of_few_members and (self.results.get("num_members") or 1) > 1:
            return (
                "the threshold in metrics.json is too strict for new clips, because all members "
                "score a new clip, but only a few members scored each evaluated clip"
            )
        return ""

    def identify(
        self,
        clips: FrameClips,
        k: int = 1,
        threshold: float | None = None,
        *,
        split: str | None = None,
    ) -> dict[str, list[tuple[str, float]]]:
        """Returns clip -> its best identities as (identity, score), best first.

        The list of a clip is empty if no score reaches the threshold: the clip shows a stranger.

        Args:
          clips, split: N clips, see `Ranker`.
          k: largest number of identities per clip.
          threshold: lowest score of an answer. `float("-inf")` sets no limit. None means the
            property `threshold`. If the run was evaluated without strangers, None means no limit.
            If the property is unknown for another reason, None is an error.

        Raises:
          ValueError: clips do not fit the run, k is below 1, or `threshold` is NaN, None (see
            above), or above 0 although scores are logarithms.
        """
        check_argument("identify: k", k, number_types.Integral, "a number of identities")
        if k < 1:
            raise UserError(f"k={k}: give 1 or more, the number of identities per clip")
        if threshold is not None:
            check_argument("identify: threshold", threshold, number_types.Real, "a score, or None")
            if math.isnan(threshold):
                raise UserError("threshold=nan is not a score: give a number, or None")
            if threshold > 0 and self.config.eval.scores.startswith("log_"):
                raise UserError(
                    f"threshold={threshold:g}: no clip would get a name, because the scores of "
                    "this run are logarithms, at most 0\n"
                    "for a probability p, give threshold=math.log(p)"
                )
        elif reason := self._explain_no_threshold():
            raise UserError(
                f"'{self.workdir}': the threshold is unknown: {reason}\n"
                "give a threshold, or float('-inf') for none"
            )
        request = self.request(clips, split)
        limit = self.threshold if threshold is None else threshold
        best_of: dict[int, list[tuple[str, float]]] = {}
        for block in self._score_blocks(request):
            scores, clip_index = block.without_padding()
            for clip, row in zip(clip_index.tolist(), scores, strict=True):
                best = np.argsort(-row, kind="stable")[:k]
                best_of[clip] = [
                    (self.identities[column], float(row[column]))
                    for column in best.tolist()
                    if row[column] > -np.inf and (limit is None or row[column] >= limit)
                ]
        places = zip(request.names, request.clip_index.tolist(), strict=True)
        return {name: best_of.get(clip, []) for name, clip in places}

    def scores(self, clips: FrameClips, *, split: str | None = None) -> np.ndarray:
        """Returns the scores of N clips (see `Ranker`) for each identity, [N, C] float32.

        The scores are logarithms of probabilities, or logits with `config.eval.scores=logits`. Row
        n is clip n of the given dict, or clip n of the split.
        """
        request = self.request(clips, split)
        scores = np.full((len(request.clip_index), len(self.identities)), -np.inf, np.float32)
        for block in self._score_blocks(request):
            values, index = block.without_padding()
            scores[index] = values
        return scores[request.clip_index]

    def rank(
        self, clips: FrameClips, *, split: str | None = None, advance: Advance = ignore_count
    ) -> dict[str, list[tuple[str, float]]]:
        """Returns identity -> its best 100 clips as (name, score), best first.

        Clips with equal scores are in the order of their names. For `clips` and `split`, see
        `Ranker`. `advance` is called after each block of clips, with the number of rows of the
        block, including padding. A blend with `config.join.diffusion` ranks by scores averaged over
        similar clips, but returns the scores before averaging, so a score can exceed the one above.
        """
        request = self.request(clips, split)
        top = self._rank(request, advance)
        names = {int(place): n for place, n in zip(request.clip_index, request.names, strict=True)}
        return topk.convert_to_lists(self.identities, names, top)

    def load(self, path: str | Path, split: str | None = None) -> MemoryClips:
        """Reads the clips of a folder or a parquet table, see `memory.load_clips`."""
        quality = self.config.data.quality
        return load_clips(path, self.modalities, self.identities, split=split, quality=quality)

    def request(self, clips: FrameClips, split: str | None) -> Request:
        """Makes a `Request` to score `clips`. For the arguments, see `Ranker`."""
        size = self.config.eval.block_size
        if hasattr(clips, "train_batches"):
            data, split = cast(Dataset, clips), split or str(self.config.eval.split)
            trained_runs.check_widths(data, self.modalities)
            names = data.split(split).clips
            return Request(data, split, np.arange(len(names)), names, size)
        if split is not None:
            raise UserError(f"split={split!r} has no effect on clips in memory: leave it out")
        if not isinstance(clips, MemoryClips):
            wanted = "a dict {clip: {modality: features}}, or a dataset of vidjax.load_data"
            check_argument("clips", clips, Mapping, wanted)
            arrays, quality = cast(Clips, clips), self.config.data.quality
            clips = MemoryClips.pack(arrays, self.modalities, self.identities, quality)
        if len(clips.names) <= SMALL_REQUEST:
            size = min(size, SMALL_REQUEST)
        return Request(clips, "clips", clips.places, clips.names, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor(Ranker):
    """A trained run with its weights. For the argument `clips` of its methods, see `Ranker`.

    Attributes:
      step: number of optimiser steps before the checkpoint was saved.
      manifest: manifest of the checkpoint, with the checked sha256 of every file.
      model: the model with its weights, without clips to score.
      embed_fn: a function that computes the embeddings [B, D] of B clips by one net of an ensemble.
    """

    step: int
    manifest: Mapping[str, Any]
    model: TrainedModel
    embed_fn: eval_step_lib.EvalStep

    def __repr__(self) -> str:
        value = self.results.get("map")
        reached = f", MAP@100 {value:.4f}" if isinstance(value, float) else ""
        return (
            f"<run '{self.workdir}': {self.config.model.name}, {len(self.identities)} identities, "
            f"{', '.join(self.modalities)}, step {self.step}{reached}>"
        )

    @property
    def digest(self) -> str:
        """A sha256 (hexadecimal) of the weights and all settings that the scores depend on."""
        weights = {"files": self.manifest["files"]}
        return files.sha256_json([weights, config_io.to_json(self.config)])

    def embed(
        self, clips: FrameClips, *, split: str | None = None, advance: Advance = ignore_count
    ) -> np.ndarray:
        """Returns a unit vector per clip, [N, D] float32. A dot product of two vectors is a cosine.

        Row n is clip n of `clips`. If `clips` is a dataset, row n is clip n of the split. Without a
        usable frame, the row is 0. For `clips` and `split`, see `Ranker`; for `advance`, `rank`.

        The vector is the input of the classifier, scaled to length 1. For the model `knn`, it is
        the mean frame. For `plda`, it consists of the centred unit vectors of all modalities. If
        the model takes each frame as an example, the vector is the mean over the frames.

        An ensemble concatenates the vectors of all members. The model `fallback` concatenates the
        vectors of its two classifiers, with zeros for the classifier that does not score the clip.
        """
        request = self.request(clips, split)
        model = self.model._replace(data=request.data, block_size=request.block_size)
        trained_runs.warn_of_missing_modalities(request.data.split(request.split), self.modalities)
        vectors: np.ndarray | None = None
        for blocks in iterate_windows(model, request.split):
            for block, block_vectors in zip(blocks, self.embed_blocks(blocks), strict=True):
                if vectors is None:
                    shape = (len(request.clip_index), block_vectors.shape[1])
                    vectors = np.zeros(shape, np.float32)
                rows = np.asarray(block.batch_mask)
                norms = np.linalg.norm(block_vectors[rows], axis=1, keepdims=True)
                unit = block_vectors[rows] / np.where(norms > 0, norms, 1.0)
                vectors[np.asarray(block.clip_index)[rows]] = unit
                advance(len(rows))
        assert vectors is not None  # there are clips
        return vectors[request.clip_index]

    def model_of(self, request: Request) -> TrainedModel:
        """Returns the model, prepared to score the clips of a request.

        Members of an ensemble will not score the clips that they were trained on.
        """
        data, own = request.data, self.manifest["data"]
        sets = trained_runs.select_sets(self.model.training_sets, own, data, request.split)
        return self.model._replace(training_sets=sets, data=data, block_size=request.block_size)

    def _score_blocks(self, request: Request) -> Iterator[ScoreBlock]:
        model = self.model_of(request)
        trained_runs.warn_of_missing_modalities(request.data.split(request.split), self.modalities)
        return score_blocks(model, request.split, describe(model, request.split).use)

    def embed_blocks(self, blocks: Sequence[Batch]) -> list[np.ndarray]:
        """Returns an array [B, D] per block. A row concatenates the embeddings of all members."""
        parts: list[list[np.ndarray]] = [[] for _ in blocks]
        for number in range(len(self.model.training_sets.members)):
            own = self.model.member(number)
            for part, block in zip(parts, blocks, strict=True):
                part.append(np.asarray(self.embed_fn(*own, block)))
        return [np.concatenate(part, axis=1) for part in parts]


@dataclasses.dataclass(frozen=True, eq=False)
class JointPredictor(Ranker):
    """A blend, which joins the scores of R runs. `Ranker` describes the methods.

    Attributes:
      runs: the runs whose scores are joined, see `RunFolder.list_runs`.
      numbers: the learned parameters that join the scores, or None.
      weights: the weights [R] of the runs, which are used only if `numbers` is None.
    """

    runs: tuple[Predictor, ...]
    numbers: schemas.Join | None
    weights: tuple[float, ...]

    def __repr__(self) -> str:
        return f"<blend '{self.workdir}' of {len(self.runs)} runs>"

    def _join(self, request: Request) -> tuple[blend.Blend, Scores]:
        models = (run.model_of(request) for run in self.runs)
        joint = blend.Blend(models, request.split)
        return joint, joint.join(self.numbers, self.weights)

    def _score_blocks(self, request: Request) -> Iterator[ScoreBlock]:
        return read_blocks(self._join(request)[1])

    def _rank(self, request: Request, advance: Advance) -> TopK:
        joint, joined = self._join(request)
        advance(len(joined.array))
        return joint.rank(joined, self.numbers if self.config.join.diffusion else None)


def restore(
    workdir: str | Path,
    *,
    step: Literal["latest", "best"] = "latest",
    num_devices: int | None = None,
) -> Predictor | JointPredictor:
    """Restores a run or a blend of runs. See `vidjax.restore` and `restore_run`."""
    folder = RunFolder(workdir)
    config = folder.config
    if not config_lib.is_blend(config):
        return restore_run(workdir, step=step, num_devices=num_devices)
    numbers, paths = blend.read_numbers(folder, config), folder.list_runs()
    if config.join.learned and not numbers:
        raise blend.make_missing_error(folder, (*config.data.train_splits, config.eval.split)[-1])
    runs = tuple(_restore(x, blend.run_config(config, x), step, num_devices) for x in paths)
    return JointPredictor(
        workdir=folder.path,
        results=_read_results(folder, None),
        config=config,
        identities=runs[0].identities,
        modalities={name: width for run in runs for name, width in run.modalities.items()},
        runs=runs,
        numbers=numbers,
        weights=blend.parse_weights(config, folder),
    )


def restore_run(
    workdir: str | Path,
    *,
    step: Literal["latest", "best"] = "latest",
    num_devices: int | None = None,
) -> Predictor:
    """Restores a trained run and checks its weights against their sha256. See `vidjax.restore`.

    If the checkpoint of the requested step is damaged, an intact checkpoint is used, with a
    warning. The folder of the run is not changed. Compiled programs are cached on the disk. Raises
    UserError for a blend of runs.
    """
    folder = RunFolder(workdir)
    if folder.list_runs():
        raise folder.make_blend_error()
    return _restore(folder.path, folder.config, step, num_devices)


def _restore(path: Path, config: Config, step: str, num_devices: int | None) -> Predictor:
    """Restores the run in the folder `path`. `config` is its configuration, maybe for a blend."""
    check_choice("step", step, ("latest", "best"))
    config.eval.checkpoint = step
    programs.cache_programs(files.cache_root())
    folder, mesh = RunFolder(path), devices.make_mesh(num_devices)
    run = trained_runs.find_run(config, folder)
    model = trained_runs.load_model(config, run, mesh)
    return Predictor(
        workdir=folder.path,
        step=run.manifest["step"],
        manifest=run.manifest,
        results=_read_results(folder, run.manifest["step"]),
        config=config,
        identities=run.identities,
        modalities=dict(run.task.modalities),
        model=model,
        embed_fn=jax.jit(functools.partial(eval_step_lib.embed_step, model.system)),
    )


def _read_results(folder: RunFolder, step: int | None) -> Mapping[str, Any]:
    """Returns the results of the checkpoint of `step`, or {} if it was not evaluated.

    If `metrics.json` has the results of another checkpoint, reads the file of `config.eval.split`,
    such as `metrics_val.json`. An evaluation with changed settings does not count, because its
    threshold may differ. For a blend of runs, `step` is None.
    """
    for apart in (False, True):
        try:
            results = folder.metrics(folder.paths(apart=apart))
        except ValueError as error:
            warn(f"{error}\nthe score threshold of the run is unknown: pass `threshold`")
            return {}
        overrides = results.get("overrides") or {}
        if results.get("step") == step and overrides.keys() <= {"eval.checkpoint"}:
            return results
    return {}
