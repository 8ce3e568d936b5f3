"""The analysis of an evaluation beyond MAP, `analysis.npz`, and the writing of all results."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, distributed, ensemble
from vidjax.data.clips import TrainingData
from vidjax.evaluation import eval_step as eval_step_lib
from vidjax.evaluation import ranking
from vidjax.evaluation.analysis import measures
from vidjax.evaluation.analysis.measures import Arrays, ScoredSplit, Values
from vidjax.evaluation.restore import FoundRun, make_model
from vidjax.evaluation.scoring import Evaluation, TrainedModel, positives_in, score, windows
from vidjax.evaluation.significance import FEWEST_IDENTITIES
from vidjax.runs import config as config_lib
from vidjax.runs import results
from vidjax.runs.config import Config
from vidjax.runs.run_folder import ResultPaths, RunFolder
from vidjax.runs.signals import Interrupted
from vidjax.utils.errors import warn


def analyse(
    models: Sequence[TrainedModel],
    evaluation: Evaluation,
    mesh: Mesh,
    config: Config,
) -> tuple[Values, Arrays]:
    """Returns the values and the arrays of `analysis.npz`; see `run.formats`.

    The frames of the split are read again for their qualities and the attention between vectors.

    Args:
      models: the models that made the evaluation. If there are several, the analysis has the
        modalities of the first model and no attention.
      config: of the evaluation. The clips of `data.train_splits` are counted for each identity, if
        the data have them.
    """
    model, split = models[0], evaluation.split
    names = model.system.model.vector_names if len(models) == 1 else ()
    quality, matrix = look(model, split.name, mesh, config.eval.block_size, attention=bool(names))
    logs = model.system.scores_are_logs
    values: Values = {
        "split": split.name,
        "lead": model.modalities[0],
        "modalities": list(model.modalities),
        "logs": logs,
    }
    arrays: Arrays = {}
    if matrix is not None:
        values["vectors"], arrays["attention"] = list(names), matrix
    if evaluation.results.get("map") is None:
        return values, arrays
    pool = evaluation.clips.pool
    positives = positives_in(split, pool)
    scored = ScoredSplit(evaluation.top, split.labels, split.clips, pool, positives)
    train_clips = measures.count_train_clips(model, config.data.train_splits)
    if train_clips is not None:
        arrays["train_clips"] = train_clips
    arrays |= {"ap": scored.averages, "positives": scored.positives.astype(np.int64)}
    values |= {
        "num_others": split.num_others if pool.all() else 0,
        "worst": measures.worst_identities(scored),
        "wrong_clips": measures.wrong_clips(scored),
        "intervals": measures.clip_intervals(evaluation.clips, split.labels),
        "fewest_identities": FEWEST_IDENTITIES,
        "strata": measures.strata(scored, split, model.modalities, quality, train_clips),
    }
    people = len(model.data.identities)
    more = measures.measure_open_set(evaluation.clips, split.labels, people, logs=logs)
    return values | more[0], arrays | more[1]


def look(
    model: TrainedModel, split_name: str, mesh: Mesh, block_size: int, *, attention: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns mean qualities of clips and, if `attention`, the mean attention of the first member.

    Qualities are [N] float64, of the frames of the primary modality. They are 0 for a clip without
    frames. Column j of the attention [V, V] is what vector j takes from each vector: the mean over
    the clips that have vector j, or over all clips with `fill_missing`. It is None if the model has
    no attention, or takes each frame as one example.
    """
    quality = np.zeros(len(model.data.split(split_name).clips))
    params, model_state = ensemble.take((model.params, model.model_state), 0)
    view = jnp.int32(model.training_sets.members[0].view)
    step = jax.jit(functools.partial(eval_step_lib.attention_step, model.system))
    attention = attention and not model.system.frame_is_example
    total = None
    blocks = (block for (own,) in windows([model], split_name, block_size, mesh) for block in own)
    for block in blocks:
        frames = block.frames[model.modalities[0]]
        found = step(params, model_state, view, block) if attention else None
        given, mask, clips, real, found = devices.fetch(
            (frames.quality, frames.mask, block.clip_index, block.batch_mask, found)
        )
        usable = np.where(mask & np.isfinite(given), given, 0.0).sum(axis=1, dtype=np.float64)
        quality[clips[real]] = (usable / np.maximum(mask.sum(axis=1), 1))[real]
        if found is not None:
            finite = np.where(np.isfinite(found), found, 0.0)
            total = (0.0 if total is None else total) + finite[real].sum(axis=0, dtype=np.float64)
    if total is None:
        return quality, None
    weight = total.sum(axis=0)  # the number of clips in which vector j takes from others
    return quality, total / np.where(weight > 0, weight, 1.0)


@functools.cache
def import_report(*, wanted: bool) -> None:
    """Imports in a thread, if `wanted`, what analysis and report use: nearly a second of work."""

    def load() -> None:
        with contextlib.suppress(ImportError):  # which `write_results` tells of
            from vidjax.evaluation.report import run_page  # noqa: F401

    if wanted:
        threading.Thread(target=load, daemon=True).start()


def write_results(
    folder: RunFolder,
    identities: Sequence[str],
    evaluation: Evaluation,
    values: Mapping[str, Any],
    *,
    paths: ResultPaths,
    analysed: Callable[[], tuple[Values, Arrays]] | None,
    ends_training: bool = False,
) -> None:
    """Writes ranking and metrics and, if they are wanted, analysis and report.

    The analysis and the report of an earlier evaluation of the split are deleted. All processes
    call `analysed`; the first one writes. Ranking and metrics come first: a fault of analysis or
    report does not touch them. `finished` is set after the report, so that the same command writes
    what a killed one did not.

    Args:
      values: content of `metrics.json`, see `run.formats`.
      paths: the files of these results.
      analysed: function that returns the result of `analyse`; None for no analysis and no report.
      ends_training: True if `values` are those of a training that ends here.
    """
    if distributed.is_first():
        paths.analysis.unlink(missing_ok=True)
        paths.report.unlink(missing_ok=True)
        ranking.write_ranking(paths.ranking, identities, evaluation.split.clips, evaluation.top)
        pending = {"finished": False} if ends_training else {}
        folder.write_metrics({**values, **pending}, paths)
    if analysed:
        with warning_of_faults(folder.path):
            found = analysed()
            if distributed.is_first():
                results.save_analysis(paths.analysis, *found)
    if not distributed.is_first():
        return
    if analysed:
        write_report(folder)
    if ends_training:
        folder.write_metrics(values, paths)


def write_report(folder: RunFolder) -> None:
    """Writes the report of a run; warns if a fault prevents it."""
    # Not at the top: not every run writes a report.
    from vidjax.evaluation.report import run_page

    with warning_of_faults(folder.path):
        run_page.write(folder)


@contextlib.contextmanager
def warning_of_faults(workdir: Path) -> Iterator[None]:
    """Turns an exception into a warning, since the results are written.

    A failed write, a signal, and any exception where several processes run are raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Interrupted)) or distributed.count() > 1:
            raise
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        warn(
            f"analysis or report are not written: {type(error).__name__}: {reason}\n"
            f"the results are in '{workdir}'; to try again: vidjax evaluate --workdir={workdir}"
        )


def evaluate(
    config: Config,
    run: FoundRun,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    report: bool = False,
) -> dict[str, Any]:
    """Ranks a split with the weights of a run; writes the results into its folder and returns them.

    The clips of `data` need not be those of the training, nor have a ground truth. `report` also
    writes the analysis and the report. Scores do not depend on `num_devices`; None uses all.
    `metrics.json` keeps the metrics of the training, too. If settings differ from those of the run,
    `metrics_<split>.json` and so on have the results.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    folder, models, spec = run.folder, [make_model(config, run, data, mesh)], config.eval
    evaluation = score(
        models, spec.split, mesh, block_size=spec.block_size, each_member=spec.members
    )
    changed = overrides(folder.config, config)
    trained = {name: x for name, x in folder.metrics().items() if name in results.TRAINING_KEYS}
    values = evaluation.results | {
        "data": data.report["data"],
        "step": run.manifest["step"],
        "eval_seconds": time.monotonic() - began,
        "eval_date": results.now(),
        **({"overrides": changed} if changed else {}),
    }
    write_results(
        folder, run.identities, evaluation, trained | values,
        paths=folder.paths(spec.split, apart=bool(changed)),
        analysed=functools.partial(analyse, models, evaluation, mesh, config) if report else None,
    )  # fmt: skip
    return values


# Fields that change no score of a clip beyond rounding, or that the name of the result files tells.
_FREE = (
    *config_lib.MOVABLE, "data.mode", "deterministic", "eval.block_size", "eval.members",
    "eval.split",
)  # fmt: skip


def overrides(trained: Config, config: Config) -> dict[str, Any]:
    """Returns field -> value in `config`, of those that differ from `trained` and change scores."""
    changed = config_lib.differences(trained, config)
    return {name: value for name, (_, value) in changed.items() if name not in _FREE}
