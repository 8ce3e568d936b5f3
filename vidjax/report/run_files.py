"""The files of a run that its report shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vidjax import config_io, files
from vidjax.errors import UserError
from vidjax.run import results

T = TypeVar("T")


class RunFiles(NamedTuple):
    """The content of a run's folder; a field is empty where its file is absent.

    Attributes:
      folder: the folder.
      config: `config.json`.
      metrics: `metrics.json`.
      lines: the lines of `metrics.jsonl`.
      identities: `identities.json`, the names of class columns 1..C.
      analysis: the values of `analysis.npz`; `run.results` lists their keys.
      arrays: the arrays of `analysis.npz`.
      data: `data_report.json`.
      other_metrics: split -> `metrics_<split>.json`, for splits other than the run's own.
      split: the split that the metrics and the analysis are of.
      analysed: the other splits that have an `analysis_<split>.npz`.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    lines: list[dict[str, Any]]
    identities: list[str]
    analysis: dict[str, Any]
    arrays: dict[str, np.ndarray]
    data: dict[str, Any]
    other_metrics: dict[str, dict[str, Any]]
    split: str = ""
    analysed: tuple[str, ...] = ()

    def identity(self, column: int) -> str:
        """Returns the name of an identity, given its place in `identities`."""
        return self.identities[column] if column < len(self.identities) else "unknown"

    def averages(self) -> np.ndarray:
        """Returns the average precision of every identity of the ground truth, 0 for unknown ones.

        Raises:
          KeyError: the analysis has none.
        """
        averages = self.arrays["ap"][self.arrays["positives"] > 0]
        return np.concatenate([averages, np.zeros(self.analysis["num_others"])])


def fitting(render: Callable[[RunFiles], T], run: RunFiles) -> T:
    """Returns `render(run)`.

    Raises:
      ValueError: every file is valid, but the files do not belong to the same evaluation.
    """
    try:
        return render(run)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"'{run.folder}': its results do not fit each other ({reason})\n"
            "--mode=evaluate of this folder writes them again"
        ) from error


def load(workdir: Path) -> RunFiles:
    """Reads the files of a run.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    split = str(config_io.load_workdir(workdir).eval.split)  # refuses values of other types
    analysis_path = results.paths(workdir, split, split).analysis
    identities = workdir / "identities.json"
    others = results.read_other_metrics(workdir)
    analysis, arrays = (
        results.load_analysis(analysis_path) if files.exists(analysis_path) else ({}, {})
    )
    return RunFiles(
        folder=workdir,
        config=files.read_json(workdir / "config.json", limit=files.CONFIG_BYTES),
        metrics=results.read_metrics(workdir),
        lines=results.read_lines(workdir / "metrics.jsonl"),
        identities=results.load_identities(identities) if files.exists(identities) else [],
        analysis=analysis,
        arrays=arrays,
        data=_data_report(workdir),
        other_metrics=others,
        split=split,
        analysed=tuple(
            other for other in others if files.exists(results.paths(workdir, other, split).analysis)
        ),
    )


def _data_report(workdir: Path) -> dict[str, Any]:
    path = workdir / "data_report.json"
    results.read_data_report(workdir)
    return files.read_json(path) if files.exists(path) else {}


def of_split(run: RunFiles, split: str) -> RunFiles:
    """Returns the files of a run with the results and the analysis of another split.

    Raises:
      ValueError: the analysis is damaged.
    """
    analysis, arrays = results.load_analysis(results.paths(run.folder, split, run.split).analysis)
    return run._replace(
        metrics=run.other_metrics[split],
        lines=[],
        analysis=analysis,
        arrays=arrays,
        other_metrics={},
        split=split,
        analysed=(),
    )
