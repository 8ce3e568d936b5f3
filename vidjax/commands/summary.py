"""The summary of a run that a command prints, as rows for a person and as JSON for a program."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax import config_io, metrics
from vidjax.commands.arguments import shown
from vidjax.config import Config
from vidjax.run import parts as parts_lib
from vidjax.run import results as results_lib
from vidjax.run.parts import Part


def rows(
    config: Config, workdir: Path, results: Mapping[str, Any], seconds: float | None
) -> dict[str, str]:
    """Returns name -> text of every row.

    Args:
      config: the configuration of the command.
      workdir: the run's folder.
      results: the content of `metrics.json`.
      seconds: time that the command took; None for a run that was finished before.
    """
    split = config.eval.split
    rows = {"workdir": shown(workdir)}
    if "map" in results:
        kind = results["map_kind"].replace("_", " ")
        kind = split if kind in ("val", split) else f"{split}, {kind}"
        if results["map_kind"] == "in_sample":
            kind += ": the run was trained on these clips, and MAP is too high"
        rows["MAP@100"] = "; ".join([f"{results['map']:.4f} on {kind}", *metrics.describe(results)])
    else:
        rows["MAP@100"] = f"none: {split} has no ground truth and is ranked, not scored"
        report = results_lib.read_data_report(workdir)
        if reason := results_lib.unmeasured(config.to_dict(), results, report):
            rows["measured"] = f"nothing: {reason}"
    if "best_map" in results:
        rows["best"] = f"{results['best_map']:.4f} at step {results['best_step']:,}"
    if data := results_lib.describe_data(results):
        rows["data"] = data
    rows["clips"] = f"{results['num_clips']:,}"
    rows["identities"] = f"{results['num_identities']:,}"
    if seconds is not None:
        rows["time"] = f"{seconds:.1f} s"
    elif "seconds" in results:
        rows["trained in"] = f"{results['seconds']:.1f} s"
    return rows | {name: shown(Path(path)) for name, path in files(config, workdir).items()}


def part_rows(workdir: Path, part: Part, seconds: float) -> dict[str, str]:
    """Returns name -> text of every row about a part of an evaluation.

    Args:
      workdir: the run's folder.
      part: the part.
      seconds: time that the command took.
    """
    manifest, shard = part.manifest, part.shard
    found = parts_lib.find(workdir, manifest["split"]).items()
    there = sum(one.total == shard.total and isinstance(of, Part) for one, of in found)
    rows = {"workdir": shown(workdir), "part": f"{shard} of {manifest['split']}"}
    rows |= {"clips": f"{manifest['num_clips']:,}", "time": f"{seconds:.1f} s"}
    rows["files"] = shown(part.folder)
    left = shard.total - there
    rows["next"] = f"{left} of {shard.total} parts are to come" if left else "--mode=merge"
    return rows


def files(config: Config, workdir: Path) -> dict[str, str]:
    """Returns `ranking` and, if it exists, `report` -> path."""
    own_split = config_io.load_workdir(workdir).eval.split
    paths = results_lib.paths(workdir, config.eval.split, own_split)
    report = {"report": str(paths.report)} if paths.report.exists() else {}
    return {"ranking": str(paths.ranking), **report}


def to_json(content: Mapping[str, Any]) -> str:
    """Returns a summary as one line of JSON; numbers that JSON lacks become `inf` and `nan`."""
    return json.dumps(_plain(content), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
