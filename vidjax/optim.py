"""Optimisers, and schedules over steps and epochs, from plain specifications."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vidjax.batch import Array

_DEFAULTS = {
    "name": "adam",
    "learning_rate": 1e-3,
    "warmup": 0.1,
    "warmup_scale": 0.0,
    "decay": "cosine",
    "final_scale": 0.01,
    "decay_factor": 0.7,
    "decay_every_epochs": 1.0,
    "total_decay": 0.0,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "clip_norm": 0.0,
}


def make_piecewise(
    points: Sequence[Sequence[float]], *, name: str = "schedule"
) -> Callable[[Array], Array]:
    """Returns the function of the epoch that joins points by straight lines.

    Args:
      points: (epoch, value) pairs in the order of epochs. An epoch named twice is a jump, and the
        later value holds at it; before the first and after the last the value is constant.
      name: what an error calls the points.

    Returns:
      Function of epochs [...], traced or not, that gives float32 values [...].

    Raises:
      ValueError: no points, not pairs, not finite, or out of order.
    """
    try:
        table = np.asarray(points, np.float32)
    except (ValueError, TypeError):
        table = np.empty((0, 0), np.float32)
    if table.ndim != 2 or table.shape[1] != 2 or not np.all(np.isfinite(table)):
        raise ValueError(f"{name} must be finite (epoch, value) pairs in order, got {points}")
    epochs, values = table.T
    if not np.all(np.diff(epochs) >= 0):
        raise ValueError(f"{name} must be (epoch, value) pairs in order, got {points}")
    return lambda epoch: jnp.interp(epoch, epochs, values)


def make_schedule(
    learning_rate: float,
    *,
    total_steps: int,
    warmup: float,
    final_scale: float,
    warmup_scale: float = 0.0,
    decay: str = "cosine",
    decay_factor: float = 0.7,
    decay_every_epochs: float = 1.0,
    steps_per_epoch: float | None = None,
) -> optax.Schedule:
    """Returns a learning-rate schedule: step -> rate, a linear warm-up and then a decay.

    Args:
      learning_rate: the peak.
      total_steps: steps of the whole run, warm-up included.
      warmup: share of the steps in which the rate rises linearly to the peak.
      final_scale: of `cosine`: the rate at the end, relative to the peak.
      warmup_scale: where the warm-up starts, relative to the peak, at most 1; 0: at one over its
        number of steps, so that the first step is not wasted.
      decay: `cosine`, from the end of the warm-up to `final_scale`; `steps`: multiplied by
        `decay_factor` every `decay_every_epochs`, counted from the start of the run, the warm-up
        included and multiplied too; `constant`: none.
      decay_factor: of `steps`, above 0.
      decay_every_epochs: of `steps`, above 0; may be a fraction.
      steps_per_epoch: of `steps`: optimiser steps in an epoch; may be a fraction.

    Returns:
      Function of steps [...], traced or not, that gives float32 rates [...].

    Raises:
      ValueError: an unknown decay, or a value out of its range.
    """
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"config.optim.learning_rate={learning_rate} must be 0 or more, finite")
    if not 0 <= warmup <= 1:
        raise ValueError(f"config.optim.warmup={warmup} is a share: between 0 and 1")
    if not 0 <= warmup_scale <= 1:
        raise ValueError(f"config.optim.warmup_scale={warmup_scale} must lie between 0 and 1")
    warmup_steps = min(math.ceil(total_steps * warmup), total_steps - 1)
    start = learning_rate * warmup_scale if warmup_scale else learning_rate / max(warmup_steps, 1)
    if decay == "cosine":
        if warmup_steps < 1:
            return optax.cosine_decay_schedule(learning_rate, max(total_steps, 1), final_scale)
        return optax.warmup_cosine_decay_schedule(
            init_value=start,
            peak_value=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=total_steps,
            end_value=learning_rate * final_scale,
        )
    if decay == "constant":
        stairs = optax.constant_schedule(1.0)
    elif decay == "steps":
        stairs = _make_stairs(total_steps, decay_factor, decay_every_epochs, steps_per_epoch)
    else:
        raise ValueError(f"config.optim.decay='{decay}': known are constant, cosine, steps")
    rise = optax.constant_schedule(learning_rate)
    if warmup_steps >= 1:
        rise = optax.linear_schedule(start, learning_rate, warmup_steps)
    return lambda step: rise(step) * stairs(step)


def _make_stairs(
    total_steps: int, factor: float, every_epochs: float, steps_per_epoch: float | None
) -> optax.Schedule:
    """Returns step -> what the rate is multiplied by: a factor every so many epochs."""
    if steps_per_epoch is None or not steps_per_epoch > 0:
        raise ValueError(f"config.optim.decay='steps' needs steps_per_epoch, got {steps_per_epoch}")
    if not factor > 0 or not every_epochs > 0:
        raise ValueError(
            "config.optim.decay='steps' needs decay_factor and decay_every_epochs above 0, got "
            f"{factor} and {every_epochs}"
        )
    width = every_epochs * steps_per_epoch  # of a stair, in steps
    num_stairs = math.ceil(total_steps / width) + 1
    # Tables from the host: neither float32 nor the rounding of the width puts an edge a step off.
    edges = np.ceil(width * np.arange(1, num_stairs) * (1 - 1e-12)).astype(np.int32)
    scales = (float(factor) ** np.arange(num_stairs)).astype(np.float32)
    return lambda step: jnp.asarray(scales)[jnp.searchsorted(edges, step, side="right")]


def make_optimizer(
    spec: Mapping[str, Any], *, total_steps: int, steps_per_epoch: float | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns an optimiser and its schedule.

    There are two weight decays, both of matrices only. `total_decay` is decoupled from the gradient
    and given for the whole run: without gradients a matrix would shrink by exp(-total_decay),
    whatever the learning rate and the number of steps. `weight_decay` is the L2 penalty of
    published recipes: weight_decay x parameter is added to the (clipped) gradient, before momentum
    or Adam's moments, as torch.optim does. Ours: no penalty on biases and norms.

    Args:
      spec: any of `name` (adam | sgd), `learning_rate`, `warmup`, `warmup_scale`, `decay` (cosine |
        steps | constant), `final_scale`, `decay_factor`, `decay_every_epochs`, `total_decay`,
        `weight_decay`, `momentum` (sgd; 0 for none), `clip_norm` (0 for none).
      total_steps: steps of the whole run.
      steps_per_epoch: optimiser steps in an epoch, which may be a fraction; only the decay `steps`
        needs it.

    Raises:
      ValueError: an unknown field, name or decay, or a value out of its range.
    """
    if unknown := sorted(set(spec) - set(_DEFAULTS)):
        raise ValueError(
            f"config.optim has no field {', '.join(unknown)}; known are {', '.join(_DEFAULTS)}"
        )
    options = {**_DEFAULTS, **spec}
    schedule = make_schedule(
        options["learning_rate"],
        total_steps=total_steps,
        warmup=options["warmup"],
        final_scale=options["final_scale"],
        warmup_scale=options["warmup_scale"],
        decay=options["decay"],
        decay_factor=options["decay_factor"],
        decay_every_epochs=options["decay_every_epochs"],
        steps_per_epoch=steps_per_epoch,
    )
    if options["name"] == "adam":
        scale = optax.scale_by_adam()
    elif options["name"] == "sgd":
        scale = optax.trace(decay=options["momentum"]) if options["momentum"] else optax.identity()
    else:
        raise ValueError(f"config.optim.name='{options['name']}': known are adam, sgd")
    parts = [optax.clip_by_global_norm(options["clip_norm"])] if options["clip_norm"] else []
    if options["weight_decay"]:
        parts.append(optax.add_decayed_weights(options["weight_decay"], mask=_is_matrix))
    parts.append(scale)
    if options["total_decay"]:
        decay = options["total_decay"] / float(jnp.sum(schedule(jnp.arange(total_steps))))
        parts.append(optax.add_decayed_weights(decay, mask=_is_matrix))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)
