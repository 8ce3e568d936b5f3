"""The analysis of an evaluation beyond MAP, `analysis.npz`, and the writing of all results.

Most of it covers the whole split, and is computed from the ranking or while the clips are scored.
Scores of changed clips are measured on a sample that depends on the split alone.
"""

import collections
import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vidjax import config as config_lib
from vidjax import config_io, devices, ensemble, files, metrics, ranking
from vidjax.analysis import open_set, robustness, strata
from vidjax.analysis.open_set import Arrays, Values
from vidjax.analysis.strata import ScoredSplit
from vidjax.batch import Array, Batch
from vidjax.cluster import processes
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.evaluation.restore import FoundRun, find_run, make_model
from vidjax.evaluation.scoring import Evaluation, TrainedModel, conclude, score
from vidjax.models.base import Identifier, ModelState, Params
from vidjax.run import results
from vidjax.run.signals import Interrupted
from vidjax.significance import FEWEST_IDENTITIES
from vidjax.steps import eval_step as eval_step_lib

MAX_RATES = 200  # learning rates that the analysis keeps


class Seen(NamedTuple):
    """Values kept while clips are scored.

    Attributes:
      quality: [N] float32, mean quality of each clip's frames of the primary modality.
      attention: name -> [...] int64, sums of `attention_step` over all clips, in units of UNIT.
    """

    quality: np.ndarray
    attention: dict[str, np.ndarray]


class Observer:
    """Collects values while an evaluation calls it as `observe`; `finish` measures the rest.

    Attention is that of the first member. Of several blended models only the ranking is analysed;
    the folders of the runs have their own analyses.
    """

    def __init__(
        self, models: Sequence[TrainedModel], split_name: str, mesh: Mesh, block_size: int
    ):
        self._model, self._single, self._mesh = models[0], len(models) == 1, mesh
        self._split = self._model.data.split(split_name)
        self._rows = block_size * mesh.size
        self._waiting: collections.deque[tuple[Array, Array, Array, Mapping[str, Array]]]
        self._waiting = collections.deque()
        self._seen = Seen(np.zeros(len(self._split.clips), np.float32), {})
        self._look: Callable[[Batch], Mapping[str, Array]] | None = None

    def __call__(self, blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        """Keeps the mean quality of every clip, and sums of attention over every block."""
        del scores
        look = self._look = self._look or self._attention_step(blocks[0])
        for block in blocks:
            frames = block.frames[self._model.modalities[0]]
            quality = _mean_quality(frames.quality, frames.mask)
            self._waiting.append((quality, block.clip_index, block.batch_mask, look(block)))
        self._flush(keep=len(blocks))  # a window behind, so that the devices never wait

    def _flush(self, keep: int = 0) -> None:
        """Copies the values of all blocks but the last `keep` to the host."""
        while len(self._waiting) > keep:
            quality, index, mask, attention = self._waiting.popleft()
            quality, index, mask = devices.fetch((quality, index, mask))
            self._seen.quality[index[mask]] = quality[mask]
            add_to(self._seen.attention, attention)

    @property
    def seen(self) -> Seen:
        """Values of all clips scored so far."""
        self._flush()
        return self._seen

    def _attention_step(self, block: Batch) -> Callable[[Batch], Mapping[str, Array]]:
        """Returns a function that sums the attention of a block; {} if the model has none."""
        model = self._model
        if not self._single or model.system.frame_is_example:
            return lambda block: {}
        weights = ensemble.take((model.params, model.model_state), 0)
        view = jnp.int32(model.training_sets.members[0].view)

        def look(
            params: Params, model_state: ModelState, view: Array, block: Batch
        ) -> Mapping[str, Array]:
            found = eval_step_lib.attention_step(model.system, params, model_state, view, block)
            return {name: add_up(x, block.batch_mask) for name, x in found.items()}

        step = functools.partial(jax.jit(look), *weights, view)
        return step if jax.eval_shape(step, block) else lambda block: {}

    def finish(
        self, evaluation: Evaluation, trained: Config, *, num_steps: int = 0
    ) -> tuple[Values, Arrays]:
        """Returns the values and the arrays of `analysis.npz`; see `run.formats`.

        Args:
          trained: the group `data` of the trained configuration. Its training splits give the
            number of training clips per identity; splits that the data lacks are skipped.
          num_steps: number of optimiser steps whose learning rates are kept; 0 to keep none.
        """
        model, found = self._model, evaluation.results
        split = evaluation.split
        names = ("map", "map_kind", "num_clips", "num_distractors")
        values: Values = {
            "split": split.name,
            "lead": model.modalities[0],
            "modalities": list(model.modalities),
            "logs": model.system.scores_are_logs,
            "results": {name: found.get(name) for name in names},
            "members": found.get("members", []),
            "runs": found.get("runs", []),
        }
        attention_values, arrays = attention(self.seen.attention, model.system.model)
        values |= attention_values
        if self._single and num_steps and not model.system.model.exact_inputs:
            arrays["schedule"] = learning_rates(model.system.lr_schedule, num_steps)
        scored = ScoredSplit(
            evaluation.top, split.labels, split.clips, evaluation.clips.pool, evaluation.positives
        )
        if found.get("map") is None:
            values["named"] = strata.named_clips(scored)
            return values, arrays
        train_clips = strata.count_train_clips(model, trained.train_splits)
        arrays |= {"ap": scored.averages, "positives": scored.positives.astype(np.int64)}
        if train_clips is not None:
            arrays["train_clips"] = train_clips
        quality = self.seen.quality.astype(np.float64)
        values |= {
            "num_others": split.num_others if scored.pool.all() else 0,
            "worst": strata.worst_identities(scored),
            "wrong_clips": strata.wrong_clips(scored),
            "lists": strata.ranked_lists(scored),
            "fewest_identities": FEWEST_IDENTITIES,
            "strata": strata.strata(scored, split, model.modalities, quality, train_clips),
        }
        people, logs = len(model.data.identities), model.system.scores_are_logs
        measured = open_set.measure(evaluation.clips, split.labels, people, logs=logs)
        values |= measured[0]
        arrays |= measured[1]
        if self._single:
            values |= self._measure_sample(evaluation)
        return values, arrays

    def _measure_sample(self, evaluation: Evaluation) -> Values:
        scorer = robustness.SampleScorer(self._model, self._split, self._mesh, self._rows)
        rng = np.random.default_rng(0)
        num_members = scorer.scorer.num_members
        sample = robustness.choose_sample(evaluation.clips.pool, num_members, rng)
        values: Values = {"num_sampled": int(sample.sum())}
        if not robustness.count_positives(self._split, sample).any():
            return values
        modality, chosen = robustness.choose_clips(scorer, evaluation.clips, sample, rng)
        values["robustness"] = robustness.robustness(scorer, sample)
        gains = robustness.member_gains(scorer, sample, plain=values["robustness"][0]["map"])
        if gains:
            values["gains"] = gains
        values["frames"] = robustness.occlusion(scorer, evaluation.clips, modality, chosen)
        return values


def score_observed(
    models: Sequence[TrainedModel],
    config: Config,
    mesh: Mesh,
    *,
    analyse: bool,
    **options: Any,  # noqa: ANN401
) -> tuple[Evaluation, Observer | None]:
    """Scores `config.eval.split`, see `scoring.score`; if `analyse`, an observer looks on."""
    spec = config.eval
    observer = Observer(models, spec.split, mesh, spec.block_size) if analyse else None
    options |= {"block_size": spec.block_size, "each_member": spec.members, "observe": observer}
    return score(models, spec.split, mesh, **options), observer


def learning_rates(schedule: optax.Schedule, num_steps: int) -> np.ndarray:
    """Returns [n, 2] float, step and learning rate of at most `MAX_RATES` evenly spaced steps."""
    steps = np.unique(np.linspace(0, num_steps - 1, MAX_RATES).astype(int))
    rates = np.asarray(jax.vmap(schedule)(jnp.asarray(steps, jnp.int32)), float)
    return np.stack([steps.astype(float), rates], axis=1)


def attention(units: Mapping[str, np.ndarray], model: Identifier) -> tuple[Values, Arrays]:
    """Averages `eval_step.attention_step` over clips; `units` are its sums, in units of UNIT.

    Column j of the attention matrix is what vector j takes from each vector. It is the mean over
    the clips that have vector j, or over all clips with `fill_missing`.
    """
    values: Values = {"assignment": {}}
    arrays: Arrays = {}
    for name, total in units.items():
        total = total * UNIT
        if name == "attention":
            weight = total.sum(axis=0)  # the number of clips in which vector j takes from others
            arrays["attention"] = total / np.where(weight > 0, weight, 1.0)
            names = model.vector_names
            numbers = [str(i + 1) for i in range(len(total))]
            values["vectors"] = list(names) if len(names) == len(total) else numbers
        else:
            share = total / max(total.sum(), 1e-12)
            values["assignment"][name.removeprefix("assignment/")] = share.tolist()
    return values, arrays


@jax.jit
def _mean_quality(quality: Array, mask: Array) -> Array:
    """Returns [B], the mean quality of each clip's frames; 0 for a clip without frames."""
    finite = jnp.where(jnp.isfinite(quality), quality, 0.0)
    return jnp.sum(finite, axis=1, where=mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)


UNIT = 2.0**-20
MOST = 1024  # magnitude of a contribution; larger ones count as this
_DIGITS, _NUM_DIGITS = 10, 3  # a contribution is three digits of 10 bits, which int32 can sum


def add_up(values: Array, mask: Array) -> Array:
    """Sums values / UNIT over the clips of a block, in 3 digits of base 1024: [3, ...] int32.

    Values are [B, ...] float with B below 2**21. NaN, Inf and clips outside the mask count as 0.
    """
    counts = mask.reshape(-1, *[1] * (values.ndim - 1)) & jnp.isfinite(values)
    units = jnp.round(jnp.clip(jnp.where(counts, values, 0.0), -MOST, MOST) / UNIT)
    units = units.astype(jnp.int32)
    low = (1 << _DIGITS) - 1
    digits = (units & low, (units >> _DIGITS) & low, units >> 2 * _DIGITS)
    return jnp.stack([jnp.sum(digit, axis=0) for digit in digits])


def add_to(totals: dict[str, np.ndarray], sums: Mapping[str, Array]) -> None:
    """Adds the `add_up` of a block, name -> [3, ...], to `totals`, name -> [...] int64."""
    for name, digits in sums.items():
        units = devices.fetch(digits).astype(np.int64)
        units = sum(units[i] << i * _DIGITS for i in range(_NUM_DIGITS))
        totals[name] = totals.get(name, 0) + np.asarray(units)


@functools.cache
def import_report(*, wanted: bool) -> None:
    """Imports in a thread, if `wanted`, what analysis and report use: nearly a second of work."""

    def load() -> None:
        import scipy.optimize  # noqa: F401

        with contextlib.suppress(ImportError):  # which `write_results` tells of
            from vidjax.report import run_page as run_page

    if wanted:
        threading.Thread(target=load, daemon=True).start()


def write_results(
    workdir: Path,
    identities: Sequence[str],
    evaluation: Evaluation,
    values: Mapping[str, Any],
    *,
    own_split: str,
    trained: Config,
    observer: Observer | None = None,
    ends_training: bool = False,
) -> None:
    """Writes ranking and metrics, with an observer also analysis and report.

    All processes measure for the analysis; the first one writes. Ranking and metrics come first: a
    fault of analysis or report costs these alone. `finished` is set after the report, so that the
    same command writes what a killed one did not. Without an observer an analysis and a report of
    the same results stay, those of others are deleted.

    Args:
      values: content of `metrics.json`, see `run.formats`.
      own_split: the split that training evaluates, `config.eval.split`.
      trained: the group `data` of the configuration that the run was trained with.
      observer: observer of the evaluation; None to write no analysis and no report.
      ends_training: True if `values` are those of a training that ends here.
    """
    split = evaluation.split.name
    paths = results.paths(workdir, split, own_split)
    if processes.is_first():
        if not observer and not _has_results(paths.metrics, values):
            paths.analysis.unlink(missing_ok=True)
            paths.report.unlink(missing_ok=True)
        ranking.write_ranking(paths.ranking, identities, evaluation.split.clips, evaluation.top)
        pending = {"finished": False} if ends_training else {}
        files.write_json(paths.metrics, {**values, **pending})
    if observer:
        steps = values.get("step", 0) if split == own_split else 0
        with warning_of_faults(workdir, paths.analysis):
            analysed = observer.finish(evaluation, trained, num_steps=steps)
            if processes.is_first():
                results.save_analysis(paths.analysis, *analysed)
    if not processes.is_first():
        return
    if observer:
        write_report(workdir)
    if ends_training:
        files.write_json(paths.metrics, values)


# Keys of `metrics.json` by which two evaluations have the same results.
_TOLD = ("step", "overrides", "runs", "map", "map_kind", "num_clips", *metrics.CLIP_METRICS)


def _has_results(path: Path, values: Mapping[str, Any]) -> bool:
    """Returns True if a `metrics.json` has the results `values`, but for times and members."""
    try:
        before = results.load_metrics(path)
    except (FileNotFoundError, ValueError):
        return False
    now: Any = files.parse_json(files.to_json(values))
    digests = [(one.get("data") or {}).get("digest") for one in (before, now)]
    return digests[0] == digests[1] and all(before.get(name) == now.get(name) for name in _TOLD)


def write_report(workdir: Path) -> None:
    """Writes the report of a run; warns if a fault prevents it."""
    # Not at the top: not every run writes a report.
    from vidjax.report import run_page

    with warning_of_faults(workdir, workdir / results.REPORT):
        run_page.write(workdir)


@contextlib.contextmanager
def warning_of_faults(workdir: Path, *outdated: Path) -> Iterator[None]:
    """Turns an exception into a warning, since the results are written; deletes `outdated` files.

    A failed write, a signal, and any exception where several processes run are raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Interrupted)) or processes.process_count() > 1:
            raise
        for path in outdated:
            path.unlink(missing_ok=True)
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        warnings.warn(
            f"analysis or report are not written: {type(error).__name__}: {reason}\n"
            f"the results are in '{workdir}'; to try again: --mode=evaluate --workdir={workdir}",
            stacklevel=3,
        )


def evaluate(
    config: Config,
    workdir: Path,
    data: TrainingData,
    run: FoundRun | None = None,
    *,
    num_devices: int | None = None,
    analyse: bool = False,
) -> dict[str, Any]:
    """Ranks a split with the weights of a run; writes the results into its folder and returns them.

    The clips of `data` need not be those of the training, nor have a ground truth. `run` is that in
    the folder, None to find it. `analyse` also writes the analysis and the report. Scores do not
    depend on `num_devices`; None uses all. `metrics.json` keeps the metrics of the training, too.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    run = run or find_run(config, workdir)
    model = make_model(config, workdir, run, data, mesh)
    scored, observer = score_observed([model], config, mesh, analyse=analyse)
    return write_evaluation(
        config, workdir, model.data.identities, scored, observer,
        described=data.report["data"], step=run.manifest["step"], began=began,
    )  # fmt: skip


def write_evaluation(
    config: Config,
    workdir: Path,
    identities: Sequence[str],
    evaluation: Evaluation,
    observer: Observer | None,
    *,
    described: Mapping[str, Any],
    step: int,
    began: float,
) -> dict[str, Any]:
    """Writes an evaluation and returns its metrics, in which `described` is the entry `data`.

    It took the time since `began`, a `time.monotonic()`, with the settings of `config`.
    """
    evaluation, trained = conclude(evaluation), config_io.load_workdir(workdir)
    changed = overrides(trained, config)
    values = evaluation.results | {
        "data": described,
        "step": step,
        "eval_seconds": time.monotonic() - began,
        "eval_date": results.now(),
        **({"overrides": changed} if changed else {}),
    }
    write_results(
        workdir, identities, evaluation, results.training_metrics(workdir) | values,
        own_split=trained.eval.split, trained=trained.data, observer=observer,
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
