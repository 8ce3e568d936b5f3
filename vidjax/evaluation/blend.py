"""Joins the scores of several runs. The joined runs are called a blend.

There are two ways to make a blend. `vidjax evaluate --runs` joins finished runs, which become
`config.join.runs`. `vidjax train` trains the systems `config.join.systems` in the folder of the
blend, and joins these runs.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh

from vidjax.data.dataset import Dataset
from vidjax.evaluation import calibration, diffusion, scores as scores_lib, topk, trained_runs
from vidjax.evaluation.calibration import Calibration
from vidjax.evaluation.scores import Evaluation, Scores
from vidjax.evaluation.scoring import TrainedModel
from vidjax.evaluation.topk import TopK
from vidjax.models.plda import PLDAIdentifier
from vidjax.runs import config as config_lib, schemas
from vidjax.runs.config import Config
from vidjax.runs.run_folder import JOIN, RunFolder
from vidjax.utils import distributed, files, json_files
from vidjax.utils.errors import UserError

MIN_WEIGHT, MAX_WEIGHT = 1e-30, 1e30  # of a run that counts; weights are float32
REMEDY = "delete the file, and evaluate a training split: vidjax evaluate --config.eval.split=val"
Load = Callable[[Config], Dataset]  # configuration of a run -> its dataset


class Blend:
    """The scores of R models on a split, and methods that join these scores.

    Attributes:
      models: the R models.
      runs: the `Scores` of each model on the split.
      split: the split, with the names and labels of its clips.
    """

    def __init__(
        self,
        models: Iterable[TrainedModel],
        split_name: str,
        folder: Path | None = None,
        num_drawn: int | None = None,
    ):
        """Scores a split with all models, one after the other.

        Files of scores are in `folder` as long as they are needed, see `scores.allocate`. If
        `num_drawn` is given, only this number of clips is drawn from the split and scored. Raises
        UserError if the models differ in clips or identities, or if their scores are not logarithms
        of probabilities.
        """
        self.models, self.runs, self._folder = list[TrainedModel](), list[Scores](), folder
        for model in models:
            pool = scores_lib.describe(model, split_name).pool
            only = calibration.draw_clips(pool, num_drawn) if num_drawn else None
            self.runs.append(scores_lib.write_scores(model, split_name, folder, only))
            self.models.append(model)
            self._check_last(split_name)
        self.split = self.models[0].data.split(split_name)

    def _check_last(self, split_name: str) -> None:
        """Raises UserError if the run that was scored last cannot be joined with the first run."""
        first, other = self.runs[0], self.runs[-1]
        name, last = self.models[0].name, self.models[-1].name
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

    def check_folds(self) -> None:
        """Raises UserError if the runs divide the clips into different folds (cross-validation)."""
        uses = [run.use for run in self.runs]
        if len(group_clips(np.concatenate(uses))) > max(len(group_clips(use)) for use in uses):
            names = ", ".join(model.name for model in self.models)
            raise UserError(
                f"--runs: these runs have different folds, so parameters that join the scores "
                f"cannot be learned: {names}\n"
                "train them with the same --config.ensemble.folds, or omit --config.join.learned"
            )

    def make_examples(self, most: int) -> calibration.Examples:
        """Returns the scores of clips, to learn from them how to join the scores of the runs.

        At most `most` clips are drawn. Raises UserError if the split has no labels, or if all nets
        of a run were trained on the clips of the split.
        """
        pool = np.all([run.pool for run in self.runs], axis=0)
        in_sample = any(run.kind == "in_sample" for run in self.runs)
        if not self.split.labelled or in_sample or not pool.any():
            raise UserError(
                "config.join.learned needs labelled clips that some net of each run has not seen"
                f"\n{self.split.name} has none: add labels, or train with --config.ensemble.folds=5"
            )
        drawn = calibration.draw_clips(pool, most)
        return calibration.make_examples(self.runs, self.split.labels, drawn)

    def join(self, numbers: schemas.Join | None, weights: Sequence[float]) -> Scores:
        """Joins the scores of R runs to one score for each clip and identity.

        `numbers` are the learned parameters of `calibration.join_scores`, or None. With None, the
        joint scores are the means of the probabilities of the runs, with `weights` [R].
        """
        part, shares = np.full(len(self.split.clips), -1), np.asarray(weights, np.float32)
        rows = [getattr(numbers, name) for name in Calibration._fields] if numbers else []
        sets = [np.array(row, np.float32) for row in rows]
        if numbers and self.split.name in numbers.splits:  # numbers are not learned on the clip
            part = calibration.split_clips(self.split.labels)

        def join_block(logs: np.ndarray, index: np.ndarray) -> jax.Array:
            if numbers is None:
                return scores_lib.mean_logs(logs, shares)
            return calibration.join_scores(logs, Calibration(*(x[part[index]] for x in sets)))

        return scores_lib.combine(self.runs, join_block, self._folder)

    def rank(self, joined: Scores, numbers: schemas.Join | None) -> TopK:
        """Returns the best clips of each identity by `joined`, the joint scores.

        `numbers` are the learned parameters of the blend. If they are given, and a run is a PLDA
        model, the order also depends on the scores of similar clips, see `diffusion`.
        """
        if not numbers:
            return rank_array(joined)
        groups, factors = group_clips(joined.use), np.exp(numbers.scale[-1]).tolist()
        views = [
            diffusion.view_groups(model, self.split.name, run.use, groups, factor)
            for model, run, factor in zip(self.models, self.runs, factors, strict=True)
            if isinstance(model.system.model, PLDAIdentifier)
        ]
        if not views:
            return rank_array(joined)
        seen = [
            (joined.row[clips], [*itertools.chain(*own)])
            for clips, *own in zip(groups, *views, strict=True)
        ]
        return diffusion.rank(joined, diffusion.weigh_neighbours(joined, seen))


def rank_array(scores: Scores) -> TopK:
    """Returns the best 100 clips of each identity by their scores."""
    return topk.rank(scores_lib.read_blocks(scores), len(scores.identities))


def group_clips(use: np.ndarray) -> list[np.ndarray]:
    """Groups clips so that the same members score all clips of a group.

    `use` [E, N] bool is True where one of E members scores one of N clips. Returns a list with the
    clip indices [n] of each group. Clips that no member scores are in no group.
    """
    clips = np.flatnonzero(use.any(axis=0))
    packed = np.packbits(use[:, clips], axis=0)
    group = np.unique(packed, axis=1, return_inverse=True)[1].ravel()
    return [clips[group == number] for number in range(group.max(initial=-1) + 1)]


def evaluate(config: Config, folder: RunFolder, load: Load, mesh: Mesh) -> Evaluation:
    """Scores `config.eval.split` with several runs, joins their scores, and computes the metrics.

    If `config.join.learned` is False, a joint score is the weighted mean of the probabilities of
    the runs. If it is True, learned parameters join the scores, see `calibration`. The first
    evaluation learns the parameters, and writes them to `folder`.
    """
    weights = parse_weights(config, folder)
    blend, numbers = open_blend(config, folder, load, mesh), read_numbers(folder, config)
    if config.join.learned:
        blend.check_folds()
        numbers = numbers or _learn(blend, config, folder, load, mesh)
    joined = blend.join(numbers, weights)
    blocks = scores_lib.read_blocks(joined)
    top = blend.rank(joined, numbers if config.join.diffusion else None)
    evaluation = scores_lib.evaluate(blocks, joined, blend.models[0], blend.split.name, top=top)
    maps = [scores_lib.compute_map(rank_array(run), blend.split, run.pool) for run in blend.runs]
    rows = [
        {"name": model.name, "weight": weight, "map": value}
        for model, weight, value in zip(blend.models, weights, maps, strict=True)
    ]
    del evaluation.results["eval_clips_per_second"]  # the time of the runs is not in it
    return evaluation._replace(results={**evaluation.results, "runs": rows}, joined=joined)


def open_blend(
    config: Config, folder: RunFolder, load: Load, mesh: Mesh, num_drawn: int | None = None
) -> Blend:
    """Restores the runs of a blend, and scores the split `config.eval.split` with each run.

    `load` loads the dataset of a run, given its configuration. For `num_drawn`, see `Blend`. Raises
    UserError if a dataset lacks the labels of a split in `eval.splits`.
    """
    name = config.eval.split
    paths = folder.list_runs(config, final=name not in config.data.train_splits)

    def restore(path: Path) -> TrainedModel:
        own = run_config(config, path)
        run = trained_runs.find_run(own, RunFolder(path))
        return trained_runs.make_model(own, run, load(own), mesh)

    return Blend(map(restore, paths), name, folder.path, num_drawn)


def _learn(blend: Blend, config: Config, folder: RunFolder, load: Load, mesh: Mesh) -> schemas.Join:
    """Learns parameters to join the scores of the runs of a blend, and writes them to a file.

    If `vidjax train` has made the blend, the parameters are learned from the clips of all training
    splits, otherwise from the clips of `blend.split`. In both cases, each clip is scored only by
    nets that were not trained on the clip.
    """
    name = blend.split.name
    names = config.data.train_splits if config.join.systems else (name,)
    if name not in names:
        raise make_missing_error(folder, names[-1])
    most, one = calibration.MAX_CLIPS // len(names), config.copy_and_resolve_references()
    examples = []
    for one.eval.split in names:
        own = blend if one.eval.split == name else open_blend(one, folder, load, mesh, most)
        examples.append(own.make_examples(most))
    sets = {name: x.tolist() for name, x in calibration.learn(examples)._asdict().items()}
    numbers = schemas.Join(**sets, splits=[*names])
    if distributed.is_first():
        files.write_json(folder.path / JOIN, msgspec.to_builtins(numbers))
    return numbers


def make_missing_error(folder: RunFolder, split: str) -> UserError:
    """Returns the error for a blend that lacks the learned parameters that join scores.

    The message says how to learn the parameters from `split`.
    """
    return UserError(
        f"the blend has no learned parameters: '{folder.path / JOIN}' is missing\n"
        f"to write it: vidjax evaluate --workdir={folder.path} --config.eval.split={split}"
    )


def read_numbers(folder: RunFolder, config: Config) -> schemas.Join | None:
    """Reads a file of learned parameters, by which a blend joins the scores of its runs.

    Returns None if `config.join.learned` is False, or if no parameters were learned yet. If they
    were learned for another number of runs, raises UserError.
    """
    if not config.join.learned or not folder.has(JOIN):
        return None
    path, count = folder.path / JOIN, len(folder.list_runs(config))
    found = json_files.read(path, schemas.Join, REMEDY)
    rows = (found.scale, found.offset, found.trust, [[0.0] * count for _ in found.stranger])
    if any([len(row) for row in one] != [count] * (calibration.PARTS + 1) for one in rows):
        raise UserError(f"'{path}' has no parameters for a blend of {count} runs\n{REMEDY}")
    return found


def parse_weights(config: Config, folder: RunFolder) -> tuple[float, ...]:
    """Returns the weight of each run of a blend. If `config.join.weights` is empty, all are 1.

    All weights are 1, too, if learned parameters join the scores. Raises UserError if the number of
    weights is not the number of runs, or a weight is not usable.
    """
    count, weights = len(folder.list_runs(config)), config.join.weights
    if not weights or config.join.learned:
        return (1.0,) * count
    is_usable = all(isinstance(x, int | float) and 0 <= x <= MAX_WEIGHT for x in weights)
    if len(weights) != count or not is_usable or max(weights) < MIN_WEIGHT:
        raise UserError(
            f"config.join.weights={weights}: give {count} numbers, one for each run\n"
            f"each must be from 0 to {MAX_WEIGHT:g}, and the largest at least {MIN_WEIGHT:g}"
        )
    return tuple(map(float, weights))


def run_config(config: Config, path: Path) -> Config:
    """Returns the configuration with which a blend scores the run in the folder `path`.

    The configuration of the run is changed in three ways:
    - `eval.split`, `eval.splits` and `eval.block_size` come from `config`, the configuration of the
      blend.
    - `data.dir` and `data.cache_dir` come from `config` if they are not None there.
    - If `eval.scores` is `logits`, it becomes `log_softmax`.
    """
    run = RunFolder(path)
    own = run.config
    if config_lib.is_blend(own):
        raise run.make_blend_error()
    if own.eval.scores == "logits":  # only probabilities can be averaged
        own.eval.scores = "log_softmax"
    own.eval.update({name: config.eval[name] for name in ("split", "splits", "block_size")})
    folders = {name: config.data[name] for name in ("dir", "cache_dir")}
    own.data.update({name: folder for name, folder in folders.items() if folder is not None})
    return own
