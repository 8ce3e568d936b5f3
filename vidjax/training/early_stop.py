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
    """Decides after an evaluation whether training ends, because the metric no longer improves.

    `before` is the result of this function after the previous evaluation, or None. `results` is
    metric -> value after `step` training steps. The result contains the best evaluation so far, the
    number of later evaluations, and whether training ends. Raises UserError if `results` have no
    value of `config.early_stop.metric`.
    """
    metric, patience = config.early_stop.metric, config.early_stop.patience
    if (value := results.get(metric)) is None:
        raise UserError(
            f"config.early_stop.metric={metric} has no value on the split {config.eval.split}\n"
            "choose another metric, or another --config.eval.split"
        )
    sign = -1 if metric in metrics.CLIP_METRICS and metrics.CLIP_METRICS[metric].lower else 1
    if not before or sign * value > sign * before.best:
        return EarlyStop(metric=metric, best=value, step=step)
    waited = before.waited + 1
    return structs.replace(before, waited=waited, stopped=waited >= patience)
