"""What a joined run says of itself: the runs that it joins, their data, its command."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax import digests
from vidjax.command_line import PROGRAM
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.errors import UserError
from vidjax.run import results as results_lib
from vidjax.run import workdir as workdir_lib
from vidjax.steps.model_scorer import TrainedModel

# Fields of `config.eval` in which each run keeps its own value, but where the blend changes it.
OWN_FIELDS = ("reduce", "top_classes", "checkpoint")


def check_overrides(config: Config, given: Sequence[str]) -> None:
    """Refuses an override that no run would be scored with.

    Args:
      config: the configuration of the blend.
      given: names of the overridden fields.

    Raises:
      UserError: a field is set to its default, and a run has another value, which it keeps.
    """
    for field in OWN_FIELDS:
        name, value = f"eval.{field}", config.eval[field]
        if name not in given or value != config_lib.default().eval[field]:
            continue
        for run in config.join.runs:
            own = config_lib.load_workdir(Path(run)).eval[field]
            if own != value:
                raise UserError(
                    f"--config.{name}={value} is the default: '{run}' keeps its own, {own}\n"
                    f"leave it out in a new --workdir, or join runs with --config.{name}={value}"
                )


def describe_run(name: str, scored: Config) -> dict[str, Any]:
    """Returns what a run is, for the metrics and the report of the blend.

    Args:
      name: its folder.
      scored: its configuration, as the blend scores it.
    """
    config = config_lib.load_workdir(Path(name))
    default = config_lib.default().eval
    special = [f"{field}={scored.eval[field]}" for field in OWN_FIELDS
               if scored.eval[field] != default[field]]  # fmt: skip
    metrics = results_lib.read_metrics(Path(name))
    data = {field: config.data[field] for field in ("name", "dir", "size", "seed")}
    return {
        "model": config.model.get("name"),
        "data": data | metrics.get("data", {}),
        "train_splits": list(config.data.train_splits),
        "held_out": results_lib.held_out(config.to_dict()),
        "modalities": list(config.modalities),
        "seed": config.seed,
        "scored_with": special or ["defaults"],
        **{key: metrics[key] for key in ("step", "num_params", "num_members") if key in metrics},
    }


def describe_data(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the entry `data` of `metrics.json`, of one dataset or of all that the runs read."""
    different = list({entry["digest"]: entry for entry in entries}.values())
    if len(different) == 1:
        return different[0]
    return {
        "name": ", ".join(entry["name"] for entry in different),
        "dir": ", ".join(entry["dir"] or entry["name"] for entry in different),
        "digest": digests.sha256_json([entry["digest"] for entry in different]),
    }


def fitted_on(config: Config, workdir: Path) -> str | None:
    """Returns the split that the weights are fitted on, now or by an earlier blend; else None."""
    if config.join.greedy:
        return config.join.split
    path = workdir / "config.json"
    if not path.exists():
        return None
    before = config_lib.load_workdir(workdir).join
    same = all(before[name] == config.join[name] for name in ("weights", "mean"))
    return results_lib.read_metrics(workdir).get("weights_fitted_on") if same else None


def command(config: Config, workdir: Path, split: str) -> str:
    """Returns the command that ranks a split by the same blend in a fresh folder."""
    words = ["--mode=evaluate", f"--workdir={workdir}", f"--runs={','.join(config.join.runs)}"]
    changed = config_lib.differences(config_lib.default(), config)
    values = {name: value for name, (_, value) in changed.items()} | {"eval.split": split}
    for name, value in values.items():
        if name != "join.runs" and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--config.{name}={text}")
    return shlex.join([*PROGRAM.split(), *words])


def write_description(
    workdir: Path, model: TrainedModel, datasets: Mapping[str, TrainingData]
) -> None:
    """Writes the identities of the runs, and their data report where they share it."""
    workdir_lib.write_json(workdir / "identities.json", list(model.data.identities))
    first, *others = [dict(data.report) for data in datasets.values()]
    if all(report == first for report in others):
        workdir_lib.write_json(workdir / "data_report.json", first)
