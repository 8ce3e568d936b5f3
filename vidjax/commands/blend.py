"""`evaluate --runs`: ranks by the weighted mean of several runs' (log-)probabilities."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import config as config_lib
from vidjax import config_io, devices, files, metrics
from vidjax.analysis import analysis
from vidjax.batch import Array, Batch
from vidjax.config import Config
from vidjax.data.clips import Split, TrainingData
from vidjax.errors import UserError
from vidjax.evaluation import restore
from vidjax.evaluation.scoring import TrainedModel, conclude, score
from vidjax.messages import PROGRAM
from vidjax.run import results as results_lib
from vidjax.run import resume
from vidjax.run.terminal import say
from vidjax.steps import topk

# Fields of `config.eval` in which each run keeps its own value if the blend leaves the default.
OWN_FIELDS = ("reduce", "top_classes", "checkpoint")


def check_overrides(config: Config, given: Sequence[str]) -> None:
    """Refuses overrides of OWN_FIELDS to their defaults, with which a run keeps another value."""
    for field in OWN_FIELDS:
        name, value = f"eval.{field}", config.eval[field]
        if name not in given or value != config_lib.default().eval[field]:
            continue
        for run in config.join.runs:
            own = config_io.load_workdir(Path(run)).eval[field]
            if own != value:
                raise UserError(
                    f"--config.{name}={value} is the default: '{run}' keeps its own, {own}\n"
                    f"leave it out in a new --workdir, or join runs with --config.{name}={value}"
                )


def describe_run(name: str, scored: Config) -> dict[str, Any]:
    """Returns a joined run's model, data, training and settings of `scored`, for `metrics.json`."""
    config = config_io.load_workdir(Path(name))
    default = config_lib.default().eval
    special = [f"{field}={scored.eval[field]}" for field in OWN_FIELDS
               if scored.eval[field] != default[field]]  # fmt: skip
    metrics = results_lib.read_metrics(Path(name))
    data = {field: config.data[field] for field in ("name", "dir", "size", "seed")}
    return {
        "model": config.model.get("name"),
        "data": data | metrics.get("data", {}),
        "train_splits": list(config.data.train_splits),
        "held_out": results_lib.held_out(config.to_dict()),
        "modalities": list(config.modalities),
        "seed": config.seed,
        "scored_with": special or ["defaults"],
        **{key: metrics[key] for key in ("step", "num_params", "num_members") if key in metrics},
    }


def describe_data(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the entry `data` of `metrics.json`, of one dataset or of all that the runs read."""
    different = {entry["digest"]: entry for entry in entries}
    if len(different) == 1:
        return entries[-1]
    return {
        "name": ", ".join(entry["name"] for entry in different.values()),
        "dir": ", ".join(entry["dir"] or entry["name"] for entry in different.values()),
        "digest": files.sha256_json(list(different)),
    }


def fitted_splits(config: Config, workdir: Path) -> str | None:
    """Returns the split that the weights are fitted on, now or by an earlier blend; else None."""
    if config.join.greedy:
        return config.join.split
    path = workdir / "config.json"
    if not path.exists():
        return None
    before = config_io.load_workdir(workdir).join
    same = all(before[name] == config.join[name] for name in ("weights", "mean"))
    return results_lib.read_metrics(workdir).get("weights_fitted_on") if same else None


def command(config: Config, workdir: Path, split: str) -> str:
    """Returns the shell command that makes this blend from nothing and ranks a split with it."""
    words = ["--mode=evaluate", f"--workdir={workdir}", f"--runs={','.join(config.join.runs)}"]
    changed = config_lib.differences(config_lib.default(), config)
    values = {name: value for name, (_, value) in changed.items()} | {"eval.split": split}
    for name, value in values.items():
        if name != "join.runs" and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--config.{name}={text}")
    return shlex.join([*PROGRAM.split(), *words])


ROUNDS = 30  # of the greedy search; weights are multiples of 1 / 30 or coarser


def blend_runs(
    config: Config,
    workdir: Path,
    load: Callable[[Config], TrainingData],
    *,
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Ranks a split by the blended scores of several trained runs, and returns the metrics.

    The score of a clip is the weighted mean of the runs' probabilities, or of their logarithms.
    Greedy weights are fitted on `config.join.split`, by members that were not trained on its clips,
    and written into `config.json` of the folder: later evaluations use them. In `config`,
    `data.dir`, `data.cache_dir` and OWN_FIELDS replace those of every run where they are not the
    defaults. `load` returns the dataset of a run's configuration.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    spec, split = config.join, config.eval.split
    weights = _given_weights(config)
    logarithms = _takes_logarithms(config)
    datasets: dict[str, TrainingData] = {}
    models = _restore_all(config, load, datasets, mesh)
    if spec.greedy:
        weights = fit_weights(models, config, mesh)
    models = [model._replace(weight=weight) for model, weight in zip(models, weights, strict=True)]
    scored, observer = analysis.score_observed(
        models, config, mesh, analyse=config.eval.report, logarithms=logarithms
    )
    evaluation = conclude(scored)
    fitted_on = fitted_splits(config, workdir)
    kept = _keep_config(config, workdir, weights)
    results = evaluation.results | {
        "runs": [
            row | describe_run(row["name"], run_config(config, row["name"]))
            for row in evaluation.results["runs"]
        ],
        "command": command(kept, workdir, split),
        "data": describe_data([data.report["data"] for data in datasets.values()]),
        "eval_seconds": time.monotonic() - began,
        "date": results_lib.now(),
        "versions": devices.versions(),
        **({"weights_fitted_on": fitted_on} if fitted_on else {}),
    }
    files.write_json(workdir / "identities.json", list(models[0].data.identities))
    first, *others = [dict(data.report) for data in datasets.values()]
    if all(report == first for report in others):
        files.write_json(workdir / "data_report.json", first)
    trained = config_io.load_workdir(Path(spec.runs[0])).data
    analysis.write_results(
        workdir, models[0].data.identities, evaluation, results, own_split=kept.eval.split,
        trained=trained, observer=observer,
    )  # fmt: skip
    return results


def _given_weights(config: Config) -> list[float]:
    runs, weights = config.join.runs, config.join.weights
    if len(runs) < 2:
        raise UserError(f"--runs={','.join(runs)}: name two runs or more")
    if not weights:
        return [1.0] * len(runs)
    if len(weights) != len(runs) or min(weights) < 0 or not sum(weights) > 0:
        raise UserError(
            f"config.join.weights={weights}: want {len(runs)} numbers of 0 or more, not all 0"
        )
    return [float(weight) for weight in weights]


def _takes_logarithms(config: Config) -> bool:
    """Returns True if logarithms are averaged; refuses settings that do not go with the mean."""
    spec = config.join
    config_lib.check_ranges(config, ["join"])
    logarithms = spec.mean == "logarithms"
    if logarithms and spec.greedy:
        raise UserError(
            "config.join.greedy=True: it chooses the weights of a mean of probabilities\n"
            "--config.join.mean=probabilities, or give --config.join.weights"
        )
    for name in spec.runs if logarithms else ():
        count = run_config(config, name).eval.top_classes
        if count:
            raise UserError(
                f"'{name}' scores {count} identities of a clip (config.eval.top_classes): one that "
                "it leaves out has no mean of logarithms\n--config.join.mean=probabilities"
            )
    return logarithms


def _restore_all(
    config: Config,
    load: Callable[[Config], TrainingData],
    datasets: dict[str, TrainingData],
    mesh: Mesh,
) -> list[TrainedModel]:
    models = []
    for name in config.join.runs:
        own = run_config(config, name)
        key = repr(own.data)
        run = restore.find_run(own, Path(name))
        if key not in datasets:
            datasets[key] = load(own)
        models.append(restore.make_model(own, Path(name), run, datasets[key], mesh))
        if config.join.greedy:  # the clips that weights are fitted on are those of the run, too
            own.eval.split = config.join.split
            restore.fit_data(datasets[key], own, Path(name), run)
    return models


def run_config(config: Config, name: str) -> Config:
    """Returns a run's configuration with the blend's `eval`, but for its own OWN_FIELDS."""
    found = config_io.load_workdir(Path(name))
    if found.join.runs:
        raise UserError(f"--runs: '{name}' is itself a joined run: name the runs that it joins")
    scores, defaults = found.eval.scores, config_lib.default().eval
    kept = [field for field in OWN_FIELDS if config.eval[field] == defaults[field]]
    own = {field: found.eval[field] for field in kept}
    # Cosines of one run and probabilities of another cannot be added, and logarithms need
    # probabilities that sum to at most 1.
    softmax = scores == "logits" or config.join.mean == "logarithms"
    own["scores"] = "log_softmax" if softmax else scores
    with found.unlocked():
        found.eval.update(config.eval.to_dict())  # of its own: fields are shared otherwise
        found.eval.update(own)
        for field in ("dir", "cache_dir"):
            if config.data[field] is not None:
                found.data[field] = config.data[field]
    return found


def _keep_config(config: Config, workdir: Path, weights: Sequence[float]) -> Config:
    """Writes the configuration of the blend with the weights in use, and returns it.

    Its `eval.split` stays the split that the folder was first evaluated on.
    """
    config = config_io.from_json(config_io.to_json(config))
    path = workdir / "config.json"
    if path.exists():
        config.eval.split = config_io.load_workdir(workdir).eval.split
    config.join.weights = tuple(float(weight) for weight in weights)
    config.join.greedy = False
    resume.write_config(workdir, config)
    return config


def fit_weights(models: Sequence[TrainedModel], config: Config, mesh: Mesh) -> list[float]:
    """Chooses weights, of sum 1, by MAP: members score clips that they were not trained on."""
    split_name = config.join.split
    split, block_size = models[0].data.split(split_name), config.eval.block_size
    if not split.labelled or not split.positives.any():
        raise UserError(
            f"config.join.split={split_name}: it has no ground truth to fit weights on\n"
            "choose a labelled split with --config.join.split"
        )
    first = conclude(score(models, split_name, mesh, block_size=block_size, each_member=False))
    if first.results["map_kind"] == "in_sample":
        raise UserError(
            f"config.join.split={split_name}: a run was trained on it without folds\n"
            "train with --config.ensemble.folds=5, or choose a split that no run was trained on"
        )
    clips = candidates([model.top for model in first.models if model.top is not None])
    scores = gather_scores(models, split_name, mesh, block_size, clips)

    def value_of(weights: np.ndarray) -> float:
        return blended_map(scores, clips, split, first.positives, weights)

    weights, value = greedy_weights(value_of, len(models), ROUNDS)
    shown = ", ".join(
        f"{weight:.2f} {model.name}" for weight, model in zip(weights, models, strict=True)
    )
    say(f"weights on {split_name} ({first.results['map_kind']} MAP {value:.4f}): {shown}")
    return weights.tolist()


def candidates(tops: Sequence[topk.TopK]) -> np.ndarray:
    """Returns the clips that any of R runs lists for an identity, [C, R k] int32.

    A row is sorted, with NO_CLIP in place of repeats. Weights are fitted on these clips only: a
    clip that no run ranks among its best 100 is rarely among the best 100 of the blend.
    """
    clips = np.sort(np.concatenate([top.index for top in tops], axis=1), axis=1)
    clips[:, 1:][clips[:, 1:] == clips[:, :-1]] = topk.NO_CLIP
    return clips


def gather_scores(
    models: Sequence[TrainedModel], split_name: str, mesh: Mesh, block_size: int, clips: np.ndarray
) -> np.ndarray:
    """Scores a split once more; returns R models' scores of `clips`, [R, C, n] float64 logarithms.

    `clips` [C, n] are `candidates`, known only after a first pass. To keep all scores of that pass
    would take four bytes for each clip, identity and run. Scores are -inf where there is no clip.
    """
    wanted = jnp.asarray(clips)
    gathered = [jnp.full(clips.shape, -jnp.inf, jnp.float32) for _ in models]

    def observe(blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        for number, model_scores in enumerate(scores):
            for block, block_scores in zip(blocks, model_scores, strict=True):
                gathered[number] = _gather(
                    gathered[number], wanted, block_scores, block.clip_index, block.batch_mask
                )

    score(models, split_name, mesh, block_size=block_size, each_member=False, observe=observe)
    return np.stack([np.asarray(scores, np.float64) for scores in gathered])


@jax.jit
def _gather(
    gathered: Array, clips: Array, scores: Array, clip_index: Array, batch_mask: Array
) -> Array:
    """Fills in the scores [C, n] of those `clips` [C, n] that are in a block of scores [B, C]."""
    clip = jnp.where(batch_mask, clip_index, -1)
    order = jnp.argsort(clip)
    place = jnp.clip(jnp.searchsorted(clip[order], clips), 0, len(clip) - 1)
    row = order[place]
    values = scores[row, jnp.arange(len(clips))[:, None]]
    return jnp.where(clip[row] == clips, values, gathered)


def greedy_weights(
    value_of: Callable[[np.ndarray], float], num_runs: int, rounds: int
) -> tuple[np.ndarray, float]:
    """In each round, adds the one of R runs, with repetition, that makes the value largest.

    `value_of` maps counts [R] of the added runs to a value, such as MAP. Returns the weights [R] of
    the best blend of all rounds, which sum to 1, and its value.

    Source: selection with replacement of Caruana et al. 2004, Ensemble Selection from Libraries of
    Models. Ours: without their sorted initialisation and without bagging.
    """
    counts = best = np.zeros(num_runs)
    best_value = -np.inf
    for _ in range(rounds):
        choices = counts + np.eye(num_runs)
        values = [value_of(choice) for choice in choices]
        counts = choices[int(np.argmax(values))]
        if max(values) > best_value:
            best, best_value = counts, max(values)
    return best / best.sum(), best_value


def blended_map(
    scores: np.ndarray, clips: np.ndarray, split: Split, positives: np.ndarray, weights: np.ndarray
) -> float:
    """Returns the MAP of a blend among candidates [C, n]; weights [R] need not sum to 1."""
    used = weights > 0
    logs = scores[used] + np.log(weights[used])[:, None, None]
    total = np.where(clips < len(split.labels), np.logaddexp.reduce(logs, axis=0), -np.inf)
    order = np.lexsort((clips, -total), axis=1)[:, : topk.MAX_NAMES]
    index = np.take_along_axis(clips, order, axis=1)
    return metrics.mean_average_precision(index, split.labels, positives)
