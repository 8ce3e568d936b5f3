"""The files of a run that its report shows."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.run import results
from vidjax.run import workdir as workdir_lib


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


def load(workdir: Path) -> RunFiles:
    """Reads the files of a run.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    if not (workdir / "config.json").is_file():
        raise ValueError(f"--workdir: no run in '{workdir}' (no config.json)")
    config = workdir_lib.read_json(workdir / "config.json")
    split = str(config.get("eval", {}).get("split", ""))
    analysis_path = results.paths(workdir, split, split).analysis
    identities = workdir / "identities.json"
    data = workdir / "data_report.json"
    others = results.read_other_metrics(workdir)
    analysis, arrays = results.load_analysis(analysis_path) if analysis_path.exists() else ({}, {})
    return RunFiles(
        folder=workdir,
        config=config,
        metrics=results.read_metrics(workdir),
        lines=results.read_lines(workdir / "metrics.jsonl"),
        identities=workdir_lib.read_json(identities, list) if identities.exists() else [],
        analysis=analysis,
        arrays=arrays,
        data=workdir_lib.read_json(data) if data.exists() else {},
        other_metrics=others,
        split=split,
        analysed=tuple(
            other for other in others if results.paths(workdir, other, split).analysis.exists()
        ),
    )


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
