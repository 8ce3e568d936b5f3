"""Writes the result files of an evaluation: at the end of training, of a run, or of a blend."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vidjax import config_io, files, metrics, ranking
from vidjax.analysis.analysis import Observer
from vidjax.cluster import processes
from vidjax.config import Config
from vidjax.data.clips import ClipSource
from vidjax.evaluation.scoring import Evaluation
from vidjax.run import logs, results
from vidjax.run.signals import Interrupted


@functools.cache
def import_report(*, wanted: bool) -> None:
    """Imports the modules of a report in a thread if `wanted`; Matplotlib takes half a second."""

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
    ends_training: bool = False,
) -> None:
    """Writes ranking and metrics, with an observer also analysis and report, then events.

    All processes measure for the analysis; the first one writes. Ranking and metrics come first: a
    fault of analysis or report costs these alone. `finished` is set after the report, so that the
    same command writes what a killed one did not.

    Args:
      values: content of `metrics.json`, see `run.formats`.
      own_split: the split that training evaluates, `config.eval.split`.
      trained: the group `data` of the configuration that the run was trained with.
      observer: observer of the evaluation; None to write no analysis and no report.
      ends_training: True if `values` are those of a training that ends here.
    """
    paths = results.paths(workdir, split, own_split)
    clips = data.split(split).clips
    if processes.is_first():
        ranking.write_ranking(paths.ranking, data.identities, clips, evaluation.top)
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
    with warning_of_faults(workdir):
        log_results(workdir, values, split)


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
            f"a page or a part of it is not written: {type(error).__name__}: {reason}\n"
            f"the results are in '{workdir}'; to try again: --mode=evaluate, with --debug for more",
            stacklevel=3,
        )


def log_results(workdir: Path, values: Mapping[str, Any], split: str) -> None:
    """Writes TensorBoard events of an evaluation: the attention matrix, and the end of the run.

    For a blend, which no training has logged, also the start of the run and its scores.
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

            picture = figures.heat_map_png(arrays["attention"], analysis.vectors or ())
            images.append(logs.Image(f"attention on {split}", *picture))
    logs.write_results(
        workdir,
        values.get("step", 0),
        scalars=metrics.logged(values) if blend else {},
        images=images,
        start=blend,
        end=own,
    )


def write_evaluation(
    workdir: Path,
    data: ClipSource,
    split: str,
    evaluation: Evaluation,
    observer: Observer | None,
    *,
    described: Mapping[str, Any],
    step: int,
    seconds: float,
) -> dict[str, Any]:
    """Writes an evaluation and returns its metrics, in which `described` is the entry `data`."""
    values = evaluation.results | {
        "data": described,
        "step": step,
        "eval_seconds": seconds,
        "eval_date": results.now(),
    }
    trained = config_io.load_workdir(workdir)
    write_results(
        workdir, data, evaluation, results.training_metrics(workdir) | values,
        split=split, own_split=trained.eval.split,
        trained=trained.data, observer=observer,
    )  # fmt: skip
    return values
