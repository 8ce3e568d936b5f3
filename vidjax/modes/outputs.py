"""The files that every evaluation writes, whether training, evaluation or a blend ran it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax import metrics, ranking
from vidjax.data.clips import ClipSource
from vidjax.modes.analysis import Observer
from vidjax.run import results, tensorboard
from vidjax.run import workdir as workdir_lib
from vidjax.steps.scoring import Evaluation


def write_results(
    workdir: Path,
    data: ClipSource,
    evaluation: Evaluation,
    values: Mapping[str, Any],
    *,
    split: str,
    own_split: str,
    observer: Observer | None = None,
    train_splits: Sequence[str] = (),
) -> None:
    """Writes ranking, metrics and events; with an observer, the analysis and the report, too.

    `metrics.json` comes after the ranking and the analysis: a folder that has it has those.

    Args:
      workdir: the run's folder.
      data: the clips that were evaluated.
      evaluation: the result of `scoring.score`.
      values: the content of `metrics.json`, see `run.results`.
      split: the split that was evaluated.
      own_split: the split that the run's training evaluates.
      observer: the observer of that evaluation; None for no analysis and no report.
      train_splits: the splits that the run was trained on.

    Raises:
      OSError: a file cannot be written.
      ValueError: another file of the folder is damaged.
    """
    paths = results.paths(workdir, split, own_split)
    ranking.write_ranking(paths.ranking, data.identities, data.split(split).clips, evaluation.top)
    if observer:
        results.save_analysis(paths.analysis, *observer.finish(evaluation, train_splits))
    workdir_lib.write_json(paths.metrics, values)
    if observer:
        # Not at the top: matplotlib takes half a second that a run without a report can save.
        from vidjax.report import run_page

        run_page.write(workdir)
    log_results(workdir, values, split)


def log_results(workdir: Path, values: Mapping[str, Any], split: str) -> None:
    """Writes TensorBoard events of an evaluation: the end of the session, the attention matrix.

    Args:
      workdir: the run's folder, or that of a blend.
      values: the content of `metrics.json` or `metrics_<split>.json`.
      split: the split that was evaluated.

    Raises:
      ValueError: `config.json` or `analysis.npz` is damaged.
      OSError: the events cannot be written.
    """
    config = workdir_lib.read_json(workdir / "config.json")
    own_split = config["eval"]["split"]
    own = split == own_split
    blend = own and bool(config["join"]["runs"])  # no training has logged its scores
    path = results.paths(workdir, split, own_split).analysis
    images = []
    if path.exists():
        analysis, arrays = results.load_analysis(path)
        if "attention" in arrays:
            from vidjax.report import figures

            picture = figures.heat_map_png(arrays["attention"], analysis["vectors"])
            images.append(tensorboard.Image(f"attention on {split}", *picture))
    tensorboard.write_results(
        workdir,
        values.get("step", 0),
        scalars=metrics.logged(values) if blend else {},
        images=images,
        start=blend,
        end=own,
    )
