"""The result files of a run: their names, their contents, and how they are read and written.

A run has a split of its own, which training evaluates: `eval.split` in its `config.json`. Its
results are `metrics.json`, `ranking.txt` and `analysis.npz`. Those of any other split carry its
name: `metrics_<split>.json` and so on.

`metrics.json` is one JSON object. Only `num_clips` and `num_identities` are always there.

    data                             {name: str, dir: str | null, digest: str}: what was evaluated;
                                     absent in runs of earlier versions
    num_clips, num_identities        int: clips ranked, identities that have a list
    num_distractors                  int | null: clips ranked that show no identity
    num_ties                         int: places of the lists whose score is that of the place
                                     before; names decide on their order
    num_nan_clips                    int: clips with a score of NaN, ranked last; absent for none
    map, map_kind                    float 0..1; the split's name, `out_of_fold` or `in_sample`;
                                     absent without ground truth, and with them the next line
    top1, auroc, fnir_at_fpir_*      float 0..1 | null: every row of `metrics.CLIP_METRICS`
    threshold_at_fpir_*              float | null: the score at which that FNIR holds
    members                          list of {member: int, map: float, and what sets it apart}
    runs                             list of {name: str, weight: float, map: float}: blended runs;
                                     with model, data, train_splits, held_out, modalities, seed,
                                     step, num_params, num_members of each run; held_out: bool,
                                     members leave training clips out; scored_with: fields of
                                     `config.eval` that differ from their defaults
    weights_fitted_on                str: the split that the weights of a blend were fitted on
    date, eval_date                  str, UTC: end of the training, of a later evaluation
    eval_clips_per_second            float; eval_seconds: float; of an evaluation in parts, their
                                     rate in one process after the other, and their sum
    step                             int: optimiser steps behind the weights
    best_step, best_map              int, float: the best evaluation during training
    num_params, num_members          int: parameters per member, members
    train_clips_per_second           float: median of the training steps; waited_seconds: float
    train_seconds                    float: in training steps, by the process that ended the run
    seconds                          float: all processes of the run, from start to last evaluation
    mode                             `resident` or `streaming`
    seed, finished, command          int, bool, str
    trained_on                       digests of the run's data, see `evaluation.run_data`
    versions                         {package: version}

`analysis.npz` is a NumPy archive. Its entry `facts` holds UTF-8 JSON with these keys:

    split, modalities                str, list of str
    lead                             str: the modality whose quality and length make the strata
    logs                             bool: scores are logarithms of probabilities
    results                          {map, map_kind, num_clips, num_distractors} of `metrics.json`
    members, runs                    as in `metrics.json`
    assignment                       {modality: [K] float}: share of the frames per NetVLAD cluster
    vectors                          [V] str: names of the rows of `attention`
    num_others                       int: identities of the ground truth that the run cannot name
    worst                            list of {identity: int, ap: float, clips: int,
                                     lost_to, mixed_with: list of [identity or -1, count]}
    strata                           list of {by: str, rows: list of
                                     {label: str, map, low, high: float, identities, clips: int}}
    fewest_identities                int: a smaller group has null for `low` and `high`
    wrong_clips                      {distractors, known: list of {clip: str, shows: int or -1,
                                     identity: int, score: float}}
    lists                            list of {identity: int, ap: float, clips: int, rows: list of
                                     {clip: str, score: float, shows: int or -1}}
    named                            of a split without ground truth: {num: int, rows: list of
                                     {clip: str, identity: int, score: float}}, best score first
    open_set                         null without distractors, or {num_identities, num_known,
                                     num_people, num_strange, resamples: int, rates: list of {rate:
                                     float, fewest: int, threshold, fpir, fnir, fpir_low, fpir_high,
                                     fnir_low, fnir_high: float}}: clips of known people, these
                                     people, distractors; of fewer than `fewest` distractors a rate
                                     has no errors
    calibration_error                float: expected calibration error
    calibration_error_after          float: that of probabilities mapped as `calibration_maps` say
    calibration_maps                 list of {slope, offset: float}: of the log-odds of each half of
                                     the people, fitted on the other half
    num_sampled                      int: clips of the sample behind the next three
    robustness                       list of {change: str, map: float}; the first changes nothing
    gains                            [E] float: MAP that is lost without each member
    frames                           list of {clip: str, identity: int, right: bool, modality: str,
                                     numbers: [T] int, quality, falls: [T] float}

Its other entries are arrays, each of which may be absent:

    ap, positives, train_clips       [C] float64, int, int: average precision, clips of the
                                     evaluated split, clips of the training splits
    schedule                         [n, 2] float: steps and their learning rates
    attention                        [V, V] float: row i, column j: what vector j takes from i
    score_edges                      [bins + 1] float: edges of the two histograms that follow
    score_known, score_strange       [bins] int: best scores of known clips and of distractors
    fpir, fnir                       [n] float: errors of identification, threshold by threshold
    calibration, calibration_after   [bins, 3] float: clips, mean confidence, share that is right
"""

import contextlib
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vidjax import config as config_lib
from vidjax import files
from vidjax.errors import UserError
from vidjax.run import schema

T = TypeVar("T")

MOST_LINES = 20_000  # of a log, in memory
IDENTITIES_BYTES = 256 * files.MB  # of `identities.json`
REPORT = "report.html"
REMEDY = "delete it: --mode=evaluate of the run's folder writes its results again"
# Keys of `metrics.json` that describe the training. A later evaluation keeps them.
TRAINING_KEYS = (
    "best_step",
    "best_map",
    "num_params",
    "num_members",
    "train_clips_per_second",
    "train_seconds",
    "seconds",
    "date",
    "seed",
    "command",
    "finished",
    "trained_on",
    "versions",
)


def now() -> str:
    """Returns the date and the time of day as text, UTC, such as `2026-02-01 13:05:00 UTC`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class ResultPaths(NamedTuple):
    """The result files of one split."""

    metrics: Path
    ranking: Path
    analysis: Path
    report: Path


def paths(workdir: Path, split: str, own_split: str) -> ResultPaths:
    """Returns the paths of the results of a split.

    Args:
      workdir: the run's folder.
      split: the split that is evaluated.
      own_split: the split that the run's training evaluates.
    """
    suffix = "" if split == own_split else f"_{split}"
    return ResultPaths(
        workdir / f"metrics{suffix}.json",
        workdir / f"ranking{suffix}.txt",
        workdir / f"analysis{suffix}.npz",
        workdir / f"report{suffix}.html",
    )


def read_metrics(workdir: Path) -> dict[str, Any]:
    """Returns the content of a run's `metrics.json`, empty where there is none.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / "metrics.json"
    return load_metrics(path) if files.exists(path) else {}


def load_metrics(path: Path) -> dict[str, Any]:
    """Returns the content of a `metrics.json` or `metrics_<split>.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged.
    """
    return _read(path, dict, schema.METRICS)


def load_identities(path: Path) -> list[str]:
    """Returns the names of class columns 1..C, the content of `identities.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged.
    """
    return _read(path, list, schema.IDENTITIES, IDENTITIES_BYTES)


def check_identities(identities: Sequence[str]) -> None:
    """Refuses identities that `load_identities` would not read back.

    Raises:
      ValueError: there are too many, or their names are too long.
    """
    most, size = schema.IDENTITIES.most, len(files.to_json(list(identities)))
    if len(identities) > most or size > IDENTITIES_BYTES:
        raise UserError(
            f"{len(identities):,} identities, with names of {size:,} bytes: the most are {most:,}, "
            f"and {IDENTITIES_BYTES:,} bytes\nleave some out of the ground truth"
        )


def load_data_report(path: Path) -> dict[str, Any]:
    """Returns the content of `data_report.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged.
    """
    return _read(path, dict, schema.DATA_REPORT)


def read_data_report(workdir: Path) -> dict[str, Any]:
    """Returns the content of a run's `data_report.json`, empty where there is none.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / "data_report.json"
    return load_data_report(path) if files.exists(path) else {}


def _read(path: Path, kind: type[T], wanted: schema.Schema, limit: int = files.JSON_BYTES) -> T:
    try:
        value = files.read_json(path, kind, limit)
        schema.check(path, value, wanted, REMEDY)
    except ValueError as error:
        text = str(error)
        raise UserError(text if "\n" in text else f"{text}\n{REMEDY}") from error
    return value


def read_other_metrics(workdir: Path) -> dict[str, dict[str, Any]]:
    """Returns split -> content of `metrics_<split>.json`, without the run's own split.

    Raises:
      ValueError: a file is damaged.
    """
    return {
        path.stem.removeprefix("metrics_"): load_metrics(path)
        for path in sorted(workdir.glob("metrics_*.json"))
    }


def training_metrics(workdir: Path) -> dict[str, Any]:
    """Returns those entries of `metrics.json` that describe the training (`TRAINING_KEYS`).

    Raises:
      ValueError: the file is damaged.
    """
    metrics = read_metrics(workdir)
    return {name: metrics[name] for name in TRAINING_KEYS if name in metrics}


def describe_data(metrics: Mapping[str, Any]) -> str | None:
    """Returns the name, folder and short digest of the data behind results.

    Args:
      metrics: content of `metrics.json` or `metrics_<split>.json`.

    Returns:
      One line, or None where an earlier version did not write it.
    """
    data = metrics.get("data")
    if not isinstance(data, dict):
        return None
    place = f" in {data['dir']}" if data.get("dir") else ""
    return f"{data.get('name')}{place}, sha256 {str(data.get('digest'))[:12]}"


def unmeasured(
    config: Mapping[str, Any], metrics: Mapping[str, Any], data_report: Mapping[str, Any]
) -> str:
    """Returns why no clip is left to measure a run on; empty where one is, or where none can tell.

    A split measures if it has a ground truth, and if the run was not trained on it or members leave
    clips of it out. A joined run was trained on what any of its runs was trained on.

    Args:
      config: content of `config.json`.
      metrics: content of `metrics.json`, for the runs that a joined run joins.
      data_report: content of `data_report.json`.

    Returns:
      One line, which ends in the remedy.
    """
    splits = data_report.get("splits") or {}
    labelled = {name for name, counts in splits.items() if counts.get("labelled")}
    runs = metrics.get("runs") or [{**config.get("data", {}), "held_out": held_out(config)}]
    known = [run for run in runs if not run.get("held_out", True)]
    trained = list(dict.fromkeys(name for run in known for name in run.get("train_splits") or ()))
    if not labelled or not labelled <= set(trained):
        return ""
    return (
        f"{'runs were ' if metrics.get('runs') else ''}trained on {' and '.join(trained)}, so no "
        f"split is left; to measure: --config.ensemble.folds=5 --config.eval.split={trained[-1]}"
    )


def held_out(config: Mapping[str, Any]) -> bool:
    """Returns whether the members of a run leave training clips out, given its `config.json`."""
    return any(config.get("ensemble", {}).get(name) for name in config_lib.HOLD_OUT)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the readable lines of `metrics.jsonl` or `timing.jsonl`; none without the file.

    Damaged lines are skipped: a run may be writing the last one. Of very many lines some are left
    out, evenly: MOST_LINES or more of training, and of evaluation, stay.

    Raises:
      ValueError: a line has values of other types, or the file is no regular file.
    """
    if not files.exists(path):
        return []
    kinds = (_Thinned(), _Thinned())  # lines of training, lines of evaluations
    for number, line in enumerate(files.each_line(path)):
        with contextlib.suppress(ValueError):
            value = files.parse_line(line)
            schema.check(path, value, schema.LINE, REMEDY)
            kinds["split" in value].add(number, value)
    return [value for _, value in sorted((kinds[0].lines | kinds[1].lines).items())]


class _Thinned:
    """Some of many lines, evenly spaced: at least MOST_LINES, less than twice as many."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, Any]] = {}
        self._seen, self._step = 0, 1

    def add(self, number: int, value: dict[str, Any]) -> None:
        """Takes the next line, or leaves it out."""
        if self._seen % self._step == 0:
            self.lines[number] = value
        self._seen += 1
        if len(self.lines) == 2 * MOST_LINES:
            self.lines = dict(list(self.lines.items())[::2])
            self._step *= 2


def save_analysis(path: Path, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an analysis atomically.

    Args:
      path: the file to write or replace.
      values: what JSON can hold; the module's docstring lists the keys.
      arrays: name -> array.

    Raises:
      OSError: the file cannot be written.
    """
    content = io.BytesIO()
    text = json.dumps(values, default=np.ndarray.tolist).encode()
    parts: dict[str, Any] = {"facts": np.frombuffer(text, np.uint8), **arrays}
    np.savez_compressed(content, **parts)
    files.write_bytes(path, content.getvalue())


def load_analysis(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the values and the arrays that `save_analysis` wrote.

    Raises:
      ValueError: the file is damaged.
    """
    arrays = files.read_npz(path)
    text = arrays.pop("facts", np.zeros(0, np.uint8)).tobytes()
    try:
        if len(text) > files.JSON_BYTES:
            raise UserError(f"more than {files.JSON_BYTES:,} bytes of text")
        values: Any = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}\n{REMEDY}") from error
    schema.check(path, values, schema.ANALYSIS, REMEDY)
    schema.check_arrays(path, arrays, REMEDY)
    if "attention" in arrays and len(values.get("vectors") or ()) != len(arrays["attention"]):
        raise UserError(f"'{path}' is damaged: vectors does not name 'attention'\n{REMEDY}")
    return values, arrays
