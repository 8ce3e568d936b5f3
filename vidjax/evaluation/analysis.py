"""Makes `analysis.npz`, the detailed analysis of an evaluation, and writes all result files."""

import contextlib
import copy
import functools
import itertools
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices
from vidjax.evaluation import blend, measures, ranking
from vidjax.evaluation.blend import Load
from vidjax.evaluation.eval_step import attention_step
from vidjax.evaluation.measures import Arrays, ScoredSplit
from vidjax.evaluation.scores import Evaluation, count_positives, save, score, write_scores
from vidjax.evaluation.scoring import TrainedModel, iterate_windows
from vidjax.evaluation.significance import FEWEST_IDENTITIES
from vidjax.evaluation.trained_runs import FoundRun, find_run, make_model
from vidjax.runs import config as config_lib, facts, results
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, IDENTITIES, RunFolder
from vidjax.runs.schemas import Analysis
from vidjax.runs.signals import Interrupted
from vidjax.runs.versions import collect_versions
from vidjax.utils import distributed, files
from vidjax.utils.errors import warn


def analyse(evaluation: Evaluation) -> tuple[Analysis, Arrays]:
    """Analyses an evaluation. Returns the values and the arrays that `analysis.npz` will contain.

    If the model has attention, this function reads the frames of the split again. The analysis of a
    blend (several runs whose scores are joined) has the modalities of its first run, and no
    attention. If the evaluated data contain training clips, these are counted for each identity.
    """
    model, split = evaluation.model, evaluation.split
    names = () if evaluation.joined else model.system.model.vector_names
    matrix = None
    if names and not model.system.frame_is_example:
        matrix = measure_attention(model, split.name)
    logs, modalities = model.system.scores_are_logs, list(model.modalities)
    found = Analysis(split=split.name, lead=modalities[0], modalities=modalities, logs=logs)
    arrays: Arrays = {}
    if matrix is not None:
        found.vectors, arrays["attention"] = list(names), matrix
    if evaluation.results.get("map") is None:
        return found, arrays
    scored = make_scored_split(evaluation)
    counts = np.zeros(model.system.task.num_identities + 1, np.int64)
    for known, trained in measures.find_training_clips(model):
        counts += np.bincount(known.labels[trained], minlength=len(counts))
    if counts.any():
        arrays["train_clips"] = counts[1:]
    arrays |= {"ap": scored.averages, "positives": scored.positives.astype(np.int64)}
    clips, labels = evaluation.clips, split.labels
    _, found.num_others = count_positives(split, evaluation.clips.pool)
    found.worst = measures.find_worst_identities(scored)
    found.wrong_clips = measures.find_wrong_clips(scored)
    found.pairs = measures.find_confused_pairs(clips, labels)
    found.intervals = measures.compute_clip_intervals(clips, labels)
    found.fewest_identities = FEWEST_IDENTITIES
    found.strata = measures.measure_strata(scored, split, modalities, arrays.get("train_clips"))
    if logs and evaluation.results["map_kind"] != "in_sample":
        found.suspects = measures.measure_suspects(scored, clips)
    found.open_set = measures.open_set(clips, labels, len(model.data.identities))
    arrays |= measures.score_histograms(clips, labels)
    arrays |= measures.compute_error_curve(clips, labels)
    if logs and (calibrated := measures.measure_calibration(clips)):
        arrays["calibration"], found.calibration_error = calibrated
    return found, arrays


def make_scored_split(evaluation: Evaluation) -> ScoredSplit:
    """Returns the ranking and the labels of an evaluation in the form that `measures` needs."""
    split, clips = evaluation.split, evaluation.clips
    positives, _ = count_positives(split, clips.pool)
    return ScoredSplit(evaluation.top, clips.best, split.labels, split.clips, clips.pool, positives)


def measure_attention(model: TrainedModel, split_name: str) -> np.ndarray | None:
    """Returns the mean attention of a model between its V input vectors, [V, V] float64.

    Only the first member of an ensemble is measured. Element [i, j] is the attention of vector j to
    vector i, averaged over the clips that have vector j. So each column sums to 1, or to 0 if no
    clip has the vector. If the model has no attention, returns None.
    """
    own, total = model.member(0), np.zeros((1, 1))
    step = devices.jit(functools.partial(attention_step, model.system), model.mesh)
    for block in itertools.chain.from_iterable(iterate_windows(model, split_name)):
        attended = step(*own, block)
        real, attended = devices.fetch((block.batch_mask, attended))
        if attended is None:
            return None
        finite = np.where(np.isfinite(attended), attended, 0.0)
        total = total + finite[real].sum(axis=0, dtype=np.float64)
    weight = total.sum(axis=0)  # the number of clips in which vector j has attention
    return total / np.where(weight > 0, weight, 1.0)


def write_results(
    folder: RunFolder, config: Config, evaluated: Sequence[Evaluation], about: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes the results of splits to the folder of a run. Returns split -> metrics.

    The results of a split are the ranking and the metrics and, if `config.eval.report` is set, the
    analysis and the report. An earlier analysis and report are deleted. All processes must call
    this function, and the first process writes the files.

    Args:
      evaluated: an evaluation of each split, beginning with `config.eval.split`.
      about: further entries of the metrics, such as the result of `describe_evaluation`.
    """
    metrics = {}
    for evaluation in reversed(evaluated):
        model, split, is_last = evaluation.model, evaluation.split, evaluation is evaluated[0]
        copies = measures.measure_copies(make_scored_split(evaluation), split, model)
        found = {"copies": msgspec.to_builtins(copies)} if copies else {}
        metrics[split.name] = values = {**evaluation.results, **found, **about}
        paths = folder.paths(split.name, apart=bool(values.get("overrides")))
        # A command that is killed before the report is written can be repeated.
        pending = {"finished": False} if about.get("finished") and is_last else {}
        if distributed.is_first():
            names = paths.scores.with_suffix(".json")
            for path in (paths.analysis, paths.report, paths.scores, names):
                path.unlink(missing_ok=True)
            identities = list(model.data.identities)
            files.write_json(folder.path / IDENTITIES, identities)  # a user may have changed it
            ranking.write_ranking(paths.ranking, identities, split.clips, evaluation.top)
            folder.write_metrics({**values, **pending}, paths)
        if config.eval.keep_scores:
            kept = evaluation.joined or write_scores(model, split.name, folder.path)
            if distributed.is_first():
                save(kept, paths.scores)
        if config.eval.report:
            with describe_faults(folder.path, split.name):
                analysis = analyse(evaluation)
                if distributed.is_first():
                    results.save_analysis(paths.analysis, *analysis)
        if distributed.is_first() and is_last:
            if config.eval.report:
                write_report(folder, split.name)
            if pending:
                folder.write_metrics(values, paths)
    return metrics


def describe_evaluation(folder: RunFolder, config: Config, step: int | None) -> dict[str, Any]:
    """Returns entries for the metrics: how a run was trained, and how it is evaluated now.

    The entries about the training are copied from `metrics.json`. `eval_date` is the time. If
    fields that affect scores (except `eval.split`) had other values in the training, `overrides` is
    field -> value in `config`.

    `step` is the step of the scored checkpoint, or None for a blend. If the training ended at
    another step, `overrides` has an entry such as `eval.checkpoint`: "step 90".
    """
    own, trained = folder.config, folder.metrics()
    own.eval.split = config.eval.split  # another split has other files anyway
    own.eval.checkpoint = "latest"
    differences = config_lib.differences(own, config)
    changed = {n: value for n, (_, value) in differences.items() if config_lib.changes_scores(n)}
    if step is not None and trained.get("finished") and trained.get("step") != step:
        changed.setdefault("eval.checkpoint", f"step {step}")
    about = {**results.select_kept(trained), "eval_date": results.now()}
    return about | ({"overrides": changed} if changed else {})


def write_report(folder: RunFolder, split: str) -> None:
    """Writes the report of a run. If this fails, a warning names a command that can write it."""
    # This import takes nearly a second, and many runs write no report.
    from vidjax.evaluation.report import run_page

    with describe_faults(folder.path, split):
        run_page.write(folder)


@contextlib.contextmanager
def describe_faults(workdir: Path, split: str) -> Iterator[None]:
    """Turns exceptions into warnings, in a `with` block that makes an analysis or a report.

    OSError and Interrupted are raised. If several processes evaluate the run, all exceptions are
    raised: if only one process skipped the rest of the block, the others would wait for it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Interrupted)) or distributed.count() > 1:
            raise
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        warn(
            f"the analysis and the report were not written: {type(error).__name__}: {reason}\n"
            f"all other results are in '{workdir}'\n"
            f"to write the report: vidjax evaluate --workdir={shlex.quote(str(workdir))} "
            f"--config.eval.split={split}"
        )


def evaluate(
    config: Config,
    folder: RunFolder,
    load: Load,
    *,
    num_devices: int | None = None,
    command: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Ranks the clips of `config.eval.split` and `eval.splits` with a run or a blend of runs.

    With `config.join.runs` or `config.join.systems`, `folder` is the folder of a blend, and may be
    empty. The results are written to `folder`, see `write_results`. Returns split -> metrics. If a
    split has no ground truth, its metrics have counts of clips, but no MAP.

    Args:
      load: loads the dataset of a run, given the configuration of the run.
      num_devices: the number of devices to use. None means all. Scores do not depend on it.
      command: the command line that makes the blend. The metrics of a new blend contain it.
    """
    mesh, is_new = devices.make_mesh(num_devices), not folder.has(CONFIG)
    run = None if config_lib.is_blend(config) else find_run(config, folder)
    about: dict[str, Any] = {"date": results.now(), "versions": collect_versions()}
    about |= {"finished": True, **({"command": command} if command else {})}
    if not is_new:  # the files are read now, so that damaged files are reported early
        about = describe_evaluation(folder, config, run and run.manifest["step"])
        _ = folder.other_metrics() if config.eval.report else None
    evaluated = score_splits(config, folder, run, load, mesh)
    if is_new:
        folder.write_config(config)
    return write_results(folder, config, evaluated, about)


def score_splits(
    config: Config, folder: RunFolder, run: FoundRun | None, load: Load, mesh: Mesh, *splits: str
) -> list[Evaluation]:
    """Scores `splits` with a run or, if `run` is None, with the blend of `config`.

    The default of `splits` is all splits of `config`. `splits` must contain `config.eval.split`.
    Returns an evaluation of each split. The evaluation of `config.eval.split` is the first.
    """
    evaluated: dict[str, Evaluation] = {}
    for split in splits or config_lib.list_splits(config):
        began, one = time.monotonic(), copy.deepcopy(config)
        one.eval.split = split
        if run:
            model = make_model(one, run, load(one), mesh)
            evaluation = score(model, split, each_member=config.eval.members)
            entries = facts.to_json(run.manifest, only=False)
            evaluation.results.update(entries, step=run.manifest["step"])
        else:
            evaluation = blend.evaluate(one, folder, load, mesh)
        data: Any = evaluation.model.data
        seconds = time.monotonic() - began
        evaluation.results.update(data=data.report["data"], eval_seconds=seconds)
        evaluated[split] = evaluation
    return [evaluated.pop(config.eval.split), *evaluated.values()]
