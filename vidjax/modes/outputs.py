"""The result files of an evaluation, at the end of training, of a run, or of a blend."""

import contextlib
import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax import files, metrics, ranking
from vidjax.cluster import members
from vidjax.config import Config
from vidjax.data.clips import ClipSource
from vidjax.modes.analysis import Observer
from vidjax.run import results, tensorboard
from vidjax.run import workdir as workdir_lib
from vidjax.steps.conclusion import Evaluation


@functools.cache
def import_report(*, wanted: bool) -> None:
    """Imports what writes a report, if it is wanted, once and in a thread.

    Matplotlib takes half a second. Call it while the devices train.
    """

    def load() -> None:
        with contextlib.suppress(ImportError):  # which `write_results` tells of
            from vidjax.report import run_page as run_page

    if wanted:
        threading.Thread(target=load, daemon=True).start()


def write_results(
    workdir: Path,
    data: ClipSource,
    evaluation: Evaluation,
    values: Mapping[str, Any],
    *,
    split: str,
    own_split: str,
    trained: Config,
    observer: Observer | None = None,
) -> None:
    """Writes ranking, metrics and events; with an observer also analysis and report.

    Several processes measure together what the analysis needs, and the first one writes.

    `metrics.json` is written after ranking and analysis, so a folder with it has those, too.

    Args:
      workdir: the folder of the run.
      data: the clips that were evaluated.
      evaluation: the result of `scoring.score`.
      values: content of `metrics.json`, see `run.results`.
      split: the evaluated split.
      own_split: the split that training evaluates, `config.eval.split`.
      trained: the group `data` of the configuration that the run was trained with.
      observer: observer of the evaluation; None to write no analysis and no report.

    Raises:
      OSError: A file cannot be written.
      ValueError: Another file of the folder is damaged.
    """
    paths = results.paths(workdir, split, own_split)
    clips = data.split(split).clips
    if members.is_first():
        ranking.write_ranking(paths.ranking, data.identities, clips, evaluation.top)
    if observer:
        steps = values.get("step", 0) if split == own_split else 0
        analysed = observer.finish(evaluation, trained, num_steps=steps)
        if members.is_first():
            results.save_analysis(paths.analysis, *analysed)
    if not members.is_first():
        return
    workdir_lib.write_json(paths.metrics, values)
    if observer:
        # Not at the top: not every run writes a report.
        from vidjax.report import run_page

        run_page.write(workdir)
    log_results(workdir, values, split)


def log_results(workdir: Path, values: Mapping[str, Any], split: str) -> None:
    """Writes TensorBoard events of an evaluation: the end of the session, the attention matrix.

    Args:
      workdir: the folder of the run or of the blend.
      values: content of `metrics.json` or `metrics_<split>.json`.
      split: the evaluated split.

    Raises:
      ValueError: `config.json` or `analysis.npz` is damaged.
      OSError: The events cannot be written.
    """
    config = files.read_json(workdir / "config.json", limit=files.CONFIG_BYTES)
    own_split = config["eval"]["split"]
    own = split == own_split
    blend = own and bool(config["join"]["runs"])  # a blend has no training that logs its scores
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
