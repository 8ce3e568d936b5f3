"""Ends a training whose metric no longer improves (`config.early_stop`)."""

from collections.abc import Mapping
from typing import Any

from msgspec import structs

from vidjax.core import metrics
from vidjax.runs.config import Config
from vidjax.runs.facts import EarlyStop
from vidjax.utils.errors import UserError


def add_evaluation(
    config: Config, before: EarlyStop | None, step: int, results: Mapping[str, Any]
) -> EarlyStop:
    """Returns the best evaluation up to `step`, and whether training ends after this step.

    `before` is the result after the previous evaluation, or None. `results` are the metrics.
    """
    metric, patience = config.early_stop.metric, config.early_stop.patience
    if (value := results.get(metric)) is None:
        raise UserError(
            f"config.early_stop.metric={metric} has no value on {config.eval.split}\n"
            "choose another metric, or another --config.eval.split"
        )
    sign = -1 if metric in metrics.CLIP_METRICS and metrics.CLIP_METRICS[metric].lower else 1
    if not before or sign * value > sign * before.best:
        return EarlyStop(metric=metric, best=value, step=step)
    waited = before.waited + 1
    return structs.replace(before, waited=waited, stopped=waited >= patience)
