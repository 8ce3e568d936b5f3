"""Ends a training whose metric no longer improves (`config.early_stop`)."""

from collections.abc import Mapping
from typing import Any

from vidjax.core import metrics
from vidjax.runs.config import Config
from vidjax.utils.errors import UserError, check_entry


def check_metric(config: Config) -> None:
    """Raises UserError if there is no metric `early_stop.metric`."""
    check_entry(
        "config.early_stop.metric", config.early_stop.metric, ["map", *metrics.CLIP_METRICS]
    )


def add_evaluation(
    config: Config, before: Mapping[str, Any] | None, step: int, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entry `early_stop` after the evaluation of `step`, see `schemas.EarlyStop`.

    `before` is the entry after the previous evaluation, or None. `results` are the metrics.
    """
    metric, patience = config.early_stop.metric, config.early_stop.patience
    if (value := results.get(metric)) is None:
        raise UserError(
            f"config.early_stop.metric={metric} has no value on {config.eval.split}\n"
            "choose another metric, or another --config.eval.split"
        )
    entry = {"metric": metric, "best": value, "step": step, "waited": 0, "stopped": False}
    sign = -1 if metric in metrics.CLIP_METRICS and metrics.CLIP_METRICS[metric].lower else 1
    if not before or sign * value > sign * before["best"]:
        return entry
    waited = before["waited"] + 1
    return {**before, "waited": waited, "stopped": waited >= patience}
