"""Blends trained runs (`vidjax evaluate --runs`), by the weighted mean of their probabilities."""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices
from vidjax.data.clips import ClipSource, TrainingData
from vidjax.evaluation import analysis, calibration, pseudo_labels, trained_runs
from vidjax.evaluation.scoring import TrainedModel, score, score_clips
from vidjax.runs import results as results_lib
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, IDENTITIES, RunFolder
from vidjax.runs.versions import collect_versions
from vidjax.utils import files
from vidjax.utils.errors import UserError

MIN_WEIGHT, MAX_WEIGHT = 1e-30, 1e30  # of a run that counts; weights are float32


def blend_runs(
    config: Config,
    folder: RunFolder,
    load: Callable[[Config], TrainingData],
    *,
    num_devices: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Ranks a split by the blended scores of several trained runs and returns the metrics.

    The score of a clip is the weighted mean of the probabilities of the runs in `config.join.runs`.
    If `config.join.learned` is True, learned numbers join the scores, see `calibration`. `load`
    loads the dataset of a run, given the configuration of the run. The ranking, the metrics and, if
    `config.eval.report` is set, a report are written to `folder`.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    weights = _parse_weights(config)
    spec = config.eval
    names = [str(folder.path / name) for name in choose_runs(config)]
    configs = [run_config(config, name) for name in names]
    datasets: dict[str, TrainingData] = {}  # runs with equal `config.data` share a dataset
    models, least = [], config.join.learned and config.join.pseudo_labels
    for own, name, weight in zip(configs, names, weights, strict=True):
        run = trained_runs.find_run(own, RunFolder(name))
        if (key := repr(own.data)) not in datasets:
            datasets[key] = load(own)
        model = trained_runs.make_model(own, run, datasets[key], mesh, keep_sums=bool(least))
        models.append(model._replace(weight=weight))
    report = next(iter(datasets.values())).report
    kept = copy.deepcopy(config)
    kept.join.weights = weights
    if folder.has(CONFIG):  # `eval.split` stays the split of the first evaluation
        kept.eval.split = folder.config.eval.split
    join = None
    if config.join.learned:
        is_first = spec.split == kept.eval.split
        sets = _find_numbers(config, models, mesh, learns=is_first)
        kept.join.calibration = calibration.to_values(sets)
        make_join = functools.partial(_make_join, models[0].data, config, sets)
        if least:
            splits = tuple(report["splits"])
            models = pseudo_labels.enrol(models, splits, make_join, least, mesh, spec.block_size)
        join = make_join(spec.split)
    each = spec.members and not least  # parts of an ensemble say little
    evaluation = score(
        models, spec.split, mesh, block_size=spec.block_size, each_member=each, join=join
    )
    folder.write_config(kept)
    results = evaluation.results | {
        "data": report["data"],
        "eval_seconds": time.monotonic() - began,
        "date": results_lib.now(),
        "versions": collect_versions(),
        **({"command": command} if command else {}),
    }
    files.write_json(folder.path / IDENTITIES, list(models[0].data.identities))
    analysis.write_results(
        folder, configs[0], models, evaluation, results, mesh, report=spec.report
    )
    return results


def choose_runs(config: Config) -> tuple[str, ...]:
    """Returns the folders of the runs that score `config.eval.split`, as `config` names them."""
    trained = config.eval.split in config.data.train_splits
    return tuple(config.join.runs if trained else config.join.finals or config.join.runs)


def _find_numbers(
    config: Config, models: Sequence[TrainedModel], mesh: Mesh, *, learns: bool
) -> calibration.Calibration:
    """Learns the numbers that join the scores of runs.

    If `learns` is False, the numbers in the configuration are used, if there are any.
    """
    if config.join.calibration and not learns:
        return calibration.from_values(config.join.calibration)
    splits = config.data.train_splits if config.join.systems else (config.eval.split,)
    return _learn(models, splits, mesh, config.eval.block_size)


def _make_join(
    data: ClipSource, config: Config, sets: calibration.Calibration, split: str
) -> calibration.Joined:
    """Returns how the scores of the clips of `split` are joined.

    A clip from which numbers are learned has numbers of its part. Other clips have the last ones.
    """
    clips = data.split(split)
    learned = config.data.train_splits if config.join.systems else (config.eval.split,)
    if split in learned and len(sets.stranger) > 1:
        return calibration.Joined(sets, calibration.split_clips(clips.labels))
    return calibration.Joined(sets, np.full(len(clips.clips), -1, np.int32))


def _learn(
    models: Sequence[TrainedModel], splits: Sequence[str], mesh: Mesh, block_size: int
) -> calibration.Calibration:
    """Learns how to join the scores of runs from clips that the runs were not trained on."""
    examples = []
    most = calibration.MAX_CLIPS // len(splits)
    for name in splits:
        split, before = models[0].data.split(name), len(examples)
        part = calibration.split_clips(split.labels)
        for blocks, scores in score_clips(models, name, mesh, block_size, most):
            index, mask, each = devices.fetch((blocks[0].clip_index, blocks[0].batch_mask, scores))
            clips, values = index[mask], [np.asarray(x)[mask] for x in each]
            labels = split.labels[clips]
            examples.append(calibration.choose_candidates(values, labels, part[clips]))
        if not split.labelled or len(examples) == before:
            raise UserError(
                f"config.join.learned: {name} has no labelled clip that no run was trained on\n"
                "train the runs in folds: --config.ensemble.folds=5"
            )
    return calibration.learn(examples)


def _parse_weights(config: Config) -> tuple[float, ...]:
    """Returns the weight of each run of a blend. If `config.join.weights` is empty, all are 1."""
    runs, weights = config.join.runs, config.join.weights
    if not weights:
        return (1.0,) * len(runs)
    is_usable = all(isinstance(x, int | float) and 0 <= x <= MAX_WEIGHT for x in weights)
    if len(weights) != len(runs) or not is_usable or max(weights) < MIN_WEIGHT:
        raise UserError(
            f"config.join.weights={weights}: give {len(runs)} numbers, one for each run\n"
            f"each must be from 0 to {MAX_WEIGHT:g}, and the largest at least {MIN_WEIGHT:g}"
        )
    return tuple(map(float, weights))


def run_config(config: Config, name: str) -> Config:
    """Returns the configuration of the run in the folder `name`, adapted to a blend.

    The split and the block size come from `config`, the configuration of the blend. If `config`
    names a folder of the data or of the cache, this folder replaces the folder of the run. Scores
    of the type `logits` become `log_softmax`.
    """
    run = RunFolder(name)
    own = run.config
    if own.join.runs:
        raise UserError(
            f"--runs: '{name}' is a blend of runs, not a trained run\n"
            f"name the runs that it blends: {','.join(run.blended_runs())}"
        )
    if own.eval.scores == "logits":  # only probabilities can be averaged
        own.eval.scores = "log_softmax"
    for field in ("split", "block_size"):
        own.eval[field] = config.eval[field]
    for field in ("dir", "cache_dir"):
        if config.data[field] is not None:
            own.data[field] = config.data[field]
    return own
