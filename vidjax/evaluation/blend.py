"""Joins the scores of several runs.

A blend joins the runs `config.join.runs` (`vidjax evaluate --runs`), or the runs of the systems
`config.join.systems`, which `vidjax train` trains in the folder of the blend.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, distributed
from vidjax.data.clips import Split, TrainingData
from vidjax.evaluation import calibration, diffusion, scores as scores_lib, topk, trained_runs
from vidjax.evaluation.calibration import Calibration
from vidjax.evaluation.diffusion import View
from vidjax.evaluation.eval_step import embed_step
from vidjax.evaluation.scores import Scored, Scores
from vidjax.evaluation.scoring import TrainedModel, iterate_windows
from vidjax.evaluation.topk import TopK
from vidjax.models.plda import PLDAIdentifier
from vidjax.runs import config as config_lib, schemas
from vidjax.runs.config import Config
from vidjax.runs.run_folder import JOIN, RunFolder
from vidjax.runs.terminal import say
from vidjax.utils import files
from vidjax.utils.errors import UserError

MIN_WEIGHT, MAX_WEIGHT = 1e-30, 1e30  # of a run that counts; weights are float32
REMEDY = "delete the file, and evaluate a training split: vidjax evaluate --config.eval.split=val"
Load = Callable[[Config], TrainingData]  # configuration of a run -> its dataset


class Numbers(NamedTuple):
    """The learned numbers of a blend, the content of `join.json`."""

    sets: Calibration  # arrays [PARTS + 1, R]; the last numbers are learned on all clips
    splits: tuple[str, ...]  # the splits on whose clips the numbers are learned
    diffusion: bool  # True if diffusion decides the order of a ranking

    def choose(self, split: Split) -> np.ndarray:
        """Returns the set for each clip of a split, [N] int32. It is not learned on the clip."""
        if split.name in self.splits:
            return calibration.split_clips(split.labels)
        return np.full(len(split.clips), -1, np.int32)


class ClipVectors(NamedTuple):
    """What a PLDA run with E members sees of the N clips of a split in a modality."""

    vectors: np.ndarray  # [N, D] float32, coordinates of `two_covariance.Space`; 0 without frames
    ratio: np.ndarray  # [E, D] float32, see `two_covariance.Space`
    scale: np.ndarray  # [E], `Settings.scale`
    member: np.ndarray  # [N] int, the member whose coordinates the clip has
    run: int  # the position of the run


class RunScores(NamedTuple):
    """The scores of R runs on a split."""

    names: list[str]  # the folders of the runs
    runs: list[Scores]
    vectors: list[ClipVectors]  # of the PLDA runs


def score_models(
    models: Iterable[TrainedModel],
    split_name: str,
    mesh: Mesh,
    block_size: int,
    *,
    folder: Path | None = None,
    num_drawn: int | None = None,
    vectors: bool = False,
) -> RunScores:
    """Scores a split with several models, one after the other.

    Args:
      folder: see `scores.allocate`.
      num_drawn: the number of clips that are drawn from the split, by default all.
      vectors: also computes the vectors of clips in PLDA runs.

    Raises UserError if the models differ in clips or identities, or if their scores are not
    logarithms of probabilities.
    """
    result = RunScores([], [], [])
    for number, model in enumerate(models):
        scores = scores_lib.describe(model, split_name)
        only = calibration.draw_clips(scores.pool, num_drawn) if num_drawn else None
        options = {"block_size": block_size, "folder": folder, "only": only}
        result.runs.append(scores_lib.write_scores(model, split_name, mesh, **options))
        result.names.append(model.name)
        _check_same_clips(result, split_name)
        if vectors and isinstance(model.system.model, PLDAIdentifier):
            use = result.runs[-1].use
            result.vectors.extend(_project(model, split_name, mesh, block_size, use, number))
    return result


def _check_same_clips(scored: RunScores, split_name: str) -> None:
    """Raises UserError if the last run cannot be joined with the first."""
    first, other = scored.runs[0], scored.runs[-1]
    name, last = scored.names[0], scored.names[-1]
    if first.clips != other.clips:
        examples = sorted({*first.clips} ^ {*other.clips})[:3]
        raise UserError(
            f"--runs: {name} and {last} have different clips in {split_name}, "
            f"such as {', '.join(examples)}\nblend runs of the same dataset"
        )
    if first.identities != other.identities:
        raise UserError(
            f"--runs: {name} and {last} were trained on different lists of identities\n"
            "blend runs that were trained on the same ground truth"
        )
    if not other.logs:
        raise UserError(
            f"--runs: {last} cannot be blended, because its scores are not logarithms of "
            "probabilities\ntrain it with --config.eval.scores=log_softmax"
        )


def _project(
    model: TrainedModel, split_name: str, mesh: Mesh, block_size: int, use: np.ndarray, run: int
) -> Iterator[ClipVectors]:
    """Yields the vectors of clips in each modality of a PLDA run."""
    solved = devices.fetch(model.model_state["solved"])
    member, widths = np.argmax(use, axis=0), model.system.task.modalities
    found = {name: np.zeros((len(member), width), np.float32) for name, width in widths.items()}
    embed = jax.jit(functools.partial(embed_step, model.system))
    for window in iterate_windows(model, split_name, block_size, mesh, use):
        for block in window:
            index, mask = devices.fetch((block.clip_index, block.batch_mask))
            for number in np.unique(member[index[mask]]).tolist():
                rows = mask & (member[index] == number)
                joined = devices.fetch(embed(*model.member(number), block))[rows]
                parts = np.split(joined, np.cumsum([*widths.values()])[:-1], axis=1)
                for name, x in zip(widths, parts, strict=True):
                    space = jax.tree.map(lambda leaf, e=number: leaf[e], solved[name]["space"])
                    norm = np.linalg.norm(x, axis=1, keepdims=True)
                    z = (x / np.where(norm > 0, norm, 1) - space.mean) @ space.transform
                    found[name][index[rows]] = np.where(norm > 0, z, 0)
    for name, vectors in found.items():
        ratio, scale = solved[name]["space"].ratio, solved["settings"].scale
        yield ClipVectors(vectors, ratio, scale, member, run)


def join(
    scored: RunScores,
    split: Split,
    numbers: Numbers | None,
    weights: Sequence[float],
    folder: Path | None = None,
) -> Scores:
    """Joins the scores of R runs by learned numbers or, without numbers, by weights [R]."""
    if numbers is None:
        return scores_lib.mean(scored.runs, weights, folder)
    part = numbers.choose(split)

    def join_block(logs: np.ndarray, index: np.ndarray) -> jax.Array:
        own = Calibration(*(x[part[index]] for x in numbers.sets))
        return calibration.join_scores(logs, own)

    return scores_lib.combine(scored.runs, join_block, folder)


def rank(joined: Scores, vectors: Sequence[ClipVectors], numbers: Numbers | None) -> TopK:
    """Ranks clips by their joint scores or, if `numbers` say so, after diffusion."""
    if not (numbers and numbers.diffusion and vectors):
        blocks = ((x.scores, x.clip_index, x.mask) for x in scores_lib.read_blocks(joined))
        return topk.rank(blocks, len(joined.identities))
    factors = np.exp(numbers.sets.scale[-1])

    def view(one: ClipVectors, clips: np.ndarray) -> View:
        x, member = one.vectors[clips], one.member[clips[0]]
        scale = float(one.scale[member] * factors[one.run])
        return View(x, np.any(x != 0, axis=1), one.ratio[member], scale)

    group = number_groups(joined.use)
    members = [np.flatnonzero(group == number) for number in range(group.max() + 1)]
    weights = diffusion.weigh_neighbours(
        [(joined.row[clips], [view(one, clips) for one in vectors]) for clips in members],
        len(joined.array),
    )
    return diffusion.rank(joined, weights)


def number_groups(use: np.ndarray) -> np.ndarray:
    """Numbers the groups of clips that the same members score, [N] int. Unscored clips have -1.

    `use` [E, N] bool is True where one of E members scores one of N clips. A clip in another group
    has scores of members that may know the label of this clip.
    """
    pool = use.any(axis=0)
    number = np.full(use.shape[1], -1)
    packed = np.packbits(use[:, pool], axis=0)
    number[pool] = np.unique(packed, axis=1, return_inverse=True)[1].ravel()
    return number


def evaluate(
    config: Config, folder: RunFolder, load: Load, mesh: Mesh, keep: Path | None = None
) -> Scored:
    """Scores `config.eval.split` with a blend, and computes the metrics.

    If `config.join.learned` is True, learned numbers join the scores, see `calibration`. The first
    evaluation learns the numbers, and writes them to the folder of the blend. Otherwise, the score
    of a clip is the weighted mean of probabilities. For `keep`, see `scores.score`.
    """
    began, name = time.monotonic(), config.eval.split
    weights = parse_weights(config, folder)
    with devices.compile_seconds() as compiling:
        own, first, scored = _score_split(config, folder, name, load, mesh)
        split, numbers = first.data.split(name), read_numbers(folder, config)
        learns = config.join.learned and numbers is None
        if config.join.learned:
            _check_folds(scored)
        if learns:
            numbers = _learn(config, folder, scored, split, load, mesh)
        joined = join(scored, split, numbers, weights, folder.path)
        top = rank(joined, scored.vectors, numbers)
        if learns and numbers and numbers.diffusion:
            before = rank(joined, (), None)
            if not _is_better(top, before, split, joined.pool):
                numbers, top = numbers._replace(diffusion=False), before
        if learns and numbers:
            _write_numbers(folder, numbers)
        blocks = scores_lib.read_blocks(joined)
        if keep and distributed.is_first():
            blocks = scores_lib.keep_blocks(blocks, joined, keep)
        evaluation = scores_lib.evaluate(blocks, joined, split, top=top)
    seconds = time.monotonic() - began
    maps = [scores_lib.compute_map(rank(run, (), None), split, run.pool) for run in scored.runs]
    rows = [
        {"name": path, "weight": weight, "map": value}
        for path, weight, value in zip(scored.names, weights, maps, strict=True)
    ]
    rate = len(joined.array) / max(seconds - sum(compiling), 1e-9)
    results = evaluation.results | {"eval_clips_per_second": rate, "runs": rows}
    values = {"data": load(own).report["data"], "eval_seconds": seconds}
    return Scored(own, first, evaluation._replace(results=results), values)


def _is_better(top: TopK, before: TopK, split: Split, pool: np.ndarray) -> bool:
    """Returns True if the MAP of `top` is not lower than that of the ranking `before`."""
    after, old = (scores_lib.compute_map(x, split, pool) or 0.0 for x in (top, before))
    say(f"similar clips change MAP on {split.name} from {old:.4f} to {after:.4f}")
    return after >= old


def _score_split(
    config: Config,
    folder: RunFolder,
    split_name: str,
    load: Load,
    mesh: Mesh,
    num_drawn: int | None = None,
) -> tuple[Config, TrainedModel, RunScores]:
    """Scores a split with the runs of a blend. Returns the first run and its configuration, too."""
    paths = folder.list_runs(config, final=split_name not in config.data.train_splits)

    def open_runs() -> Iterator[tuple[Config, TrainedModel]]:
        for path in paths:
            own = run_config(config, path)
            own.eval.split = split_name
            run = trained_runs.find_run(own, RunFolder(path))
            yield own, trained_runs.make_model(own, run, load(own), mesh)

    runs = open_runs()
    own, first = next(runs)
    models = itertools.chain([first], (model for _, model in runs))
    scored = score_models(
        models, split_name, mesh, config.eval.block_size,
        folder=folder.path, num_drawn=num_drawn, vectors=config.join.diffusion and not num_drawn,
    )  # fmt: skip
    return own, first, scored


def _check_folds(scored: RunScores) -> None:
    """Raises UserError if runs leave out different clips in their folds."""
    groups = [number_groups(run.use).max() for run in scored.runs]
    most = int(np.argmax(groups))
    for path, run in zip(scored.names, scored.runs, strict=True):
        if number_groups(np.concatenate([scored.runs[most].use, run.use])).max() > groups[most]:
            raise UserError(
                f"--runs: the folds of {scored.names[most]} and {path} are not the same clips, so "
                "learned numbers cannot join them\n"
                "train both with the same --config.ensemble.folds, or leave out config.join.learned"
            )


def _learn(
    config: Config, folder: RunFolder, scored: RunScores, split: Split, load: Load, mesh: Mesh
) -> Numbers:
    """Learns how to join the scores of runs from clips that the runs were not trained on.

    `scored` are the scores of `split`. Of other splits to learn from, clips are drawn and scored.
    """
    names = config.data.train_splits if config.join.systems else (split.name,)
    if split.name not in names:
        raise UserError(
            f"'{folder.path / JOIN}' is missing, which contains the numbers of the blend\n"
            f"to learn them, evaluate a training split: --config.eval.split={names[-1]}"
        )
    examples = []
    most = calibration.MAX_CLIPS // len(names)
    for name in names:
        own, own_split = scored, split
        if name != split.name:
            _, first, own = _score_split(config, folder, name, load, mesh, most)
            own_split = first.data.split(name)
        pool = np.all([run.pool for run in own.runs], axis=0)
        in_sample = any(run.kind == "in_sample" for run in own.runs)
        if not own_split.labelled or in_sample or not pool.any():
            raise UserError(
                f"config.join.learned: {name} has no labelled clip that no run was trained on\n"
                "train the runs in folds: --config.ensemble.folds=5"
            )
        drawn = calibration.draw_clips(pool, most)
        examples.append(calibration.make_examples(own.runs, own_split.labels, drawn))
    return Numbers(calibration.learn(examples), tuple(names), bool(config.join.diffusion))


def read_numbers(folder: RunFolder, config: Config) -> Numbers | None:
    """Reads the learned numbers of a blend, for the evaluation with `config`.

    Returns None if `config.join.learned` is False, or if no numbers were learned yet.
    """
    if not config.join.learned or not folder.has(JOIN):
        return None
    values = schemas.read(folder.path / JOIN, schemas.Join, REMEDY)
    rows = (values.scale, values.offset, values.trust, values.stranger)
    sets = Calibration(*(np.array(row, np.float32) for row in rows))
    return Numbers(sets, tuple(values.splits), values.diffusion and config.join.diffusion)


def _write_numbers(folder: RunFolder, numbers: Numbers) -> None:
    if distributed.is_first():
        values = {name: x.tolist() for name, x in numbers.sets._asdict().items()}
        values |= {"splits": numbers.splits, "diffusion": numbers.diffusion}
        files.write_json(folder.path / JOIN, values)


def parse_weights(config: Config, folder: RunFolder) -> tuple[float, ...]:
    """Returns the weight of each run of a blend. If `config.join.weights` is empty, all are 1."""
    count, weights = len(folder.list_runs(config, final=False)), config.join.weights
    if not weights:
        return (1.0,) * count
    is_usable = all(isinstance(x, int | float) and 0 <= x <= MAX_WEIGHT for x in weights)
    if len(weights) != count or not is_usable or max(weights) < MIN_WEIGHT:
        raise UserError(
            f"config.join.weights={weights}: give {count} numbers, one for each run\n"
            f"each must be from 0 to {MAX_WEIGHT:g}, and the largest at least {MIN_WEIGHT:g}"
        )
    return tuple(map(float, weights))


def run_config(config: Config, path: Path) -> Config:
    """Returns the configuration of the run in the folder `path`, adapted to a blend.

    The split and the block size come from `config`, the configuration of the blend. If `config`
    names a folder of the data or of the cache, this folder replaces the folder of the run. Scores
    of the type `logits` become `log_softmax`.
    """
    run = RunFolder(path)
    own = run.config
    if config_lib.is_blend(own):
        raise UserError(
            f"--runs: '{path}' is a blend of runs, not a trained run\n"
            f"name the runs that it blends: {','.join(map(str, run.list_runs(own, final=True)))}"
        )
    if own.eval.scores == "logits":  # only probabilities can be averaged
        own.eval.scores = "log_softmax"
    for field in ("split", "block_size"):
        own.eval[field] = config.eval[field]
    for field in ("dir", "cache_dir"):
        if config.data[field] is not None:
            own.data[field] = config.data[field]
    return own
