"""Optimisers and learning-rate schedules from plain specifications."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_schedule(
    learning_rate: float, *, total_steps: int, warmup: float, final_scale: float
) -> optax.Schedule:
    """Returns a warmup-cosine schedule: step -> learning rate.

    Args:
      learning_rate: the peak.
      total_steps: steps of the whole run, warm-up included.
      warmup: share of the steps in which the rate rises linearly to the peak. It starts at
        peak / warm-up steps, not at 0, so that the first step is not wasted.
      final_scale: the rate at the end, relative to the peak.
    """
    warmup_steps = min(math.ceil(total_steps * warmup), total_steps - 1)
    if warmup_steps < 1:
        return optax.cosine_decay_schedule(learning_rate, max(total_steps, 1), final_scale)
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / warmup_steps,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=learning_rate * final_scale,
    )


def make_optimizer(
    spec: Mapping[str, Any], *, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns an optimiser and its schedule.

    Weight decay is decoupled, on matrices only, and given for the whole run: without gradients a
    matrix would shrink by exp(-total_decay), whatever the learning rate and the number of steps.

    Args:
      spec: `name` (adam | sgd), `learning_rate`, `warmup`, `final_scale`,
        `total_decay`, `momentum` (sgd; 0 for none), `clip_norm` (0 for none).
      total_steps: steps of the whole run.

    Raises:
      ValueError: unknown name.
    """
    schedule = make_schedule(
        spec["learning_rate"],
        total_steps=total_steps,
        warmup=spec["warmup"],
        final_scale=spec["final_scale"],
    )
    if spec["name"] == "adam":
        scale = optax.scale_by_adam()
    elif spec["name"] == "sgd":
        scale = optax.trace(decay=spec["momentum"]) if spec["momentum"] else optax.identity()
    else:
        raise ValueError(f"config.optim.name='{spec['name']}': known are adam, sgd")
    parts = [optax.clip_by_global_norm(spec["clip_norm"])] if spec["clip_norm"] else []
    parts.append(scale)
    if spec["total_decay"]:
        decay = spec["total_decay"] / float(jnp.sum(schedule(jnp.arange(total_steps))))
        parts.append(optax.add_decayed_weights(decay, mask=_is_matrix))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)
