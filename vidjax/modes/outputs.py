"""What every evaluation leaves in a run's folder, however it was started."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax import ranking
from vidjax.modes.analysis import Observer
from vidjax.report import run_page
from vidjax.run import results
from vidjax.run import workdir as workdir_lib
from vidjax.steps.scoring import Evaluation


def write_results(
    workdir: Path,
    data: Any,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    *,
    split: str,
    own_split: str,
    observer: Observer | None = None,
    train_splits: Sequence[str] = (),
) -> None:
    """Writes the ranking, the metrics and, with an observer, the analysis and the report.

    The metrics are written after ranking and analysis: a run that has them has all.

    Args:
      workdir: the run's folder.
      data: the dataset that was evaluated.
      evaluation: the result of `scoring.score`.
      metrics: the content of `metrics.json`, see `run.results`.
      split: the split that was evaluated.
      own_split: the split that the run's training evaluates.
      observer: the observer of that evaluation; None for no analysis and no report.
      train_splits: the splits that the run was trained on.

    Raises:
      OSError: a file cannot be written.
    """
    paths = results.paths(workdir, split, own_split)
    ranking.write_ranking(paths.ranking, data.identities, data.split(split).clips, evaluation.top)
    if observer:
        results.save_analysis(paths.analysis, *observer.finish(evaluation, train_splits))
    workdir_lib.write_json(paths.metrics, metrics)
    if observer:
        run_page.write(workdir)
