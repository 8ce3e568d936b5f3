"""Several runs as one ranking: joined from their folders by clip name, with chosen weights."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import config as config_lib
from vidjax import devices, metrics, ranking
from vidjax.batch import Array, Batch
from vidjax.config import Config
from vidjax.modes import analysis, evaluate
from vidjax.modes.outputs import write_results
from vidjax.run import workdir as workdir_lib
from vidjax.run.logs import say
from vidjax.steps import scoring

ROUNDS = 30  # of the greedy choice: weights are multiples of 1 / ROUNDS at the finest


def join(
    config: Config,
    workdir: Path,
    load: Callable[[Config], Any],
    *,
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Ranks a split by several trained runs together; returns the metrics.

    The score of a clip is the weighted mean of the probabilities that the runs give it; within a
    run, of those of its members. Greedy weights are fitted on `config.join.split`, by members that
    were not trained on its clips; they are then written into the folder's `config.json`, from where
    later evaluations of the same folder take them.

    Args:
      config: with `join.runs`; `data.dir` and `data.cache_dir`, where set, stand for every run's.
      workdir: the folder of the joined results.
      load: configuration -> `Dataset`.
      num_devices: how many devices to use; None for all.

    Raises:
      ValueError: runs of different clips or identities, or weights that do not fit them.
      CheckpointError: a run has no usable checkpoint.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    spec, split = config.join, config.eval.split
    if len(spec.runs) < 2:
        raise ValueError(f"--runs={','.join(spec.runs)}: name two runs or more")
    datasets: dict[str, Any] = {}

    def models(split: str, weights: Sequence[float]) -> list[scoring.TrainedModel]:
        found = []
        for name, weight in zip(spec.runs, weights, strict=True):
            run_config = _run_config(config, name, split)
            key = repr(run_config.data)
            data = datasets[key] = datasets.get(key) or load(run_config)
            _, one = evaluate.restore(run_config, Path(name), data, mesh)
            found.append(one._replace(weight=float(weight)))
        return found

    weights = list(spec.weights) or [1.0] * len(spec.runs)
    if len(weights) != len(spec.runs) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"config.join.weights={spec.weights}: want {len(spec.runs)} numbers of 0 or more"
        )
    if spec.greedy:
        weights = _fit(models(spec.split, weights), config, mesh)
    joined = models(split, weights)
    observer = analysis.Observer(joined, split, mesh) if config.eval.report else None
    evaluation = scoring.score(
        joined,
        split,
        mesh,
        block_size=config.eval.block_size,
        each_member=config.eval.members,
        observe=observer,
    )
    results = evaluation.results | {"eval_seconds": time.monotonic() - began}

    kept = _keep_config(config, workdir, weights)
    trained = config_lib.load_workdir(Path(config.join.runs[0])).data.train_splits
    write_results(
        workdir, joined[0].data, evaluation, results, split=split, own_split=kept.eval.split,
        observer=observer, train_splits=trained,
    )  # fmt: skip
    return results


def _run_config(config: Config, name: str, split: str) -> Config:
    """Returns the configuration of a run, as it is to be evaluated here."""
    run_config = config_lib.load_workdir(Path(name))
    if run_config.join.runs:
        raise ValueError(f"--runs: '{name}' joins other runs itself; name those")
    scores = run_config.eval.scores
    with run_config.unlocked():
        run_config.eval.update(config.eval)
        run_config.eval.split = split
        # Cosines of one run and probabilities of another cannot be added.
        run_config.eval.scores = "log_softmax" if scores == "logits" else scores
        for field in ("dir", "cache_dir"):
            if config.data[field] is not None:
                run_config.data[field] = config.data[field]
    return run_config


def _keep_config(config: Config, workdir: Path, weights: Sequence[float]) -> Config:
    """Returns the configuration of the folder, written there with the weights in use."""
    config = config_lib.from_json(config_lib.to_json(config))
    path = workdir / "config.json"
    if path.exists():
        config.eval.split = config_lib.load_workdir(workdir).eval.split
    config.join.weights = tuple(float(weight) for weight in weights)
    config.join.greedy = False
    workdir_lib.write_text(path, config_lib.to_json(config))
    return config


def _fit(models: Sequence[scoring.TrainedModel], config: Config, mesh: Any) -> list[float]:
    """Returns weights chosen greedily, one run after another, by MAP on clips not trained on."""
    split_name = config.join.split
    split = models[0].data.split(split_name)
    if not split.labelled:
        raise ValueError(
            f"config.join.split={split_name}: it has no ground truth to fit weights on"
        )
    run = functools.partial(
        scoring.score,
        models,
        split_name,
        mesh,
        block_size=config.eval.block_size,
        each_member=False,
    )
    first = run()
    if first.results["map_kind"] == "in_sample":
        raise ValueError(
            f"config.join.split={split_name}: a run was trained on it without folds\n"
            "train with --config.ensemble.folds=5, or choose a split that no run was trained on"
        )
    # What no run ranks among its best 100 is taken to be out of reach of their mean, too. That only
    # serves to choose the weights: the ranking itself is exact.
    clips = np.concatenate([top.index for top in first.each], axis=1)  # [C, R k]
    clips = np.sort(clips, axis=1)
    clips[:, 1:][clips[:, 1:] == clips[:, :-1]] = ranking.NO_CLIP
    candidates = jnp.asarray(clips)
    gathered = [jnp.full(clips.shape, -jnp.inf, jnp.float32) for _ in models]

    def observe(blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        for number, of_run in enumerate(scores):
            for block, of_block in zip(blocks, of_run, strict=True):
                gathered[number] = _gather(
                    gathered[number], candidates, of_block, block.clip_index, block.batch_mask
                )

    run(observe=observe)
    found = np.stack([np.asarray(one, np.float64) for one in gathered])  # [R, C, R k]
    value_of = functools.partial(_map_of, found, clips, split.labels, first.positives)
    counts = np.zeros(len(models))
    best, best_value = counts, -1.0
    for _ in range(ROUNDS):
        choices = counts + np.eye(len(models))
        values = [value_of(choice) for choice in choices]
        counts = choices[int(np.argmax(values))]
        if max(values) > best_value:
            best, best_value = counts, max(values)
    weights = (best / best.sum()).tolist()
    shown = ", ".join(f"{w:.2f} {c.name}" for w, c in zip(weights, models, strict=True))
    say(f"weights on {split_name} ({first.results['map_kind']} MAP {best_value:.4f}): {shown}")
    return weights


def _map_of(
    found: np.ndarray,
    clips: np.ndarray,
    labels: np.ndarray,
    positives: np.ndarray,
    weights: np.ndarray,
) -> float:
    """Returns MAP of the weighted mean of log scores `found` [R, C, n] of the clips [C, n]."""
    used = weights > 0
    logs = found[used] + np.log(weights[used])[:, None, None]
    total = np.where(clips < len(labels), np.logaddexp.reduce(logs, axis=0), -np.inf)
    order = np.lexsort((clips, -total), axis=1)[:, : ranking.MAX_NAMES]
    index = np.take_along_axis(clips, order, axis=1)
    return metrics.mean_average_precision(index, labels, positives)


@jax.jit
def _gather(
    found: Array, candidates: Array, scores: Array, clip_index: Array, batch_mask: Array
) -> Array:
    """Returns the candidates' scores [C, n], with those that stand in a block filled in."""
    num_rows = len(clip_index)
    clip = jnp.where(batch_mask, clip_index, -1)
    order = jnp.argsort(clip)
    place = jnp.clip(jnp.searchsorted(clip[order], candidates), 0, num_rows - 1)
    row = order[place]
    values = scores[row, jnp.arange(len(candidates))[:, None]]
    return jnp.where(clip[row] == candidates, values, found)
