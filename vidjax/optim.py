"""Optimisers and schedules, built from plain dicts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vidjax.batch import Array
from vidjax.errors import UserError

SECOND_MOMENT_DECAY = 0.999  # of Adam: its paper and optax


def make_piecewise(
    points: Sequence[Sequence[float]], *, name: str = "schedule"
) -> Callable[[Array], Array]:
    """Builds a piecewise linear function of the epoch.

    Args:
      points: (epoch, value) pairs with increasing epochs. Two pairs of one epoch are a jump, with
        the second value at the epoch itself. The function is constant before the first and after
        the last pair.
      name: name of the points in error messages.

    Returns:
      Function (epochs [...]) -> values [...] float32; the epochs may be traced.

    Raises:
      ValueError: There are no points, or they are not finite pairs in order.
    """
    try:
        table = np.asarray(points, np.float32)
    except (ValueError, TypeError):
        table = np.empty((0, 0), np.float32)
    if table.ndim != 2 or table.shape[1] != 2 or not np.all(np.isfinite(table)):
        raise UserError(f"{name} must be finite (epoch, value) pairs in order, got {points}")
    epochs, values = table.T
    if not np.all(np.diff(epochs) >= 0):
        raise UserError(f"{name} must be (epoch, value) pairs in order, got {points}")
    return lambda epoch: jnp.interp(epoch, epochs, values)


def make_schedule(
    spec: Mapping[str, Any], *, total_steps: int, steps_per_epoch: float | None = None
) -> optax.Schedule:
    """Builds a learning-rate schedule: a linear warm-up, then a decay.

    Args:
      spec: these fields of `config.optim`:
        learning_rate: peak of the learning rate.
        warmup: share of all steps in which the rate increases linearly to the peak.
        warmup_scale: rate at the first step relative to the peak, at most 1; 0 for one over the
          number of warm-up steps, so that the first step is not wasted.
        decay: `cosine` from the end of the warm-up to the end of the run; `steps`, a factor every
          `decay_every_epochs` from the start of the run, which also applies to the warm-up; or
          `constant`.
        final_scale: for `cosine`, rate at the end relative to the peak.
        decay_factor: for `steps`, the factor, above 0.
        decay_every_epochs: for `steps`, epochs between two factors, above 0; may be a fraction.
      total_steps: steps of the whole run, warm-up included.
      steps_per_epoch: for `steps`, optimiser steps per epoch; may be a fraction.

    Returns:
      Function (steps [...]) -> learning rates [...] float32; the steps may be traced.

    Raises:
      ValueError: The decay is unknown.
    """
    learning_rate, decay = spec["learning_rate"], spec["decay"]
    warmup, warmup_scale = spec["warmup"], spec["warmup_scale"]
    warmup_steps = min(math.ceil(total_steps * warmup), total_steps - 1)
    start = learning_rate * warmup_scale if warmup_scale else learning_rate / max(warmup_steps, 1)
    if decay == "cosine":
        final_scale = spec["final_scale"]
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
        stairs = _make_stairs(
            total_steps, spec["decay_factor"], spec["decay_every_epochs"], steps_per_epoch
        )
    else:
        raise UserError(f"config.optim.decay='{decay}': choose from constant, cosine, steps")
    rise = optax.constant_schedule(learning_rate)
    if warmup_steps >= 1:
        rise = optax.linear_schedule(start, learning_rate, warmup_steps)
    return lambda step: rise(step) * stairs(step)


def _make_stairs(
    total_steps: int, factor: float, every_epochs: float, steps_per_epoch: float | None
) -> optax.Schedule:
    """Builds a step function: step -> factor to the power of the number of stairs before it."""
    if steps_per_epoch is None or not steps_per_epoch > 0:
        raise UserError(f"config.optim.decay='steps' needs steps_per_epoch, got {steps_per_epoch}")
    width = every_epochs * steps_per_epoch  # width of a stair in steps
    num_stairs = math.ceil(total_steps / width) + 1
    # Tables computed on the host, where rounding cannot move an edge by a step as in float32.
    edges = np.ceil(width * np.arange(1, num_stairs) * (1 - 1e-12)).astype(np.int32)
    scales = (float(factor) ** np.arange(num_stairs)).astype(np.float32)
    return lambda step: jnp.asarray(scales)[jnp.searchsorted(edges, step, side="right")]


def make_optimizer(
    spec: Mapping[str, Any], *, total_steps: int, steps_per_epoch: float | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds an optimiser and its learning-rate schedule.

    There are two weight decays; both apply to matrices only.

    - `total_decay` is decoupled from the gradient and holds for the whole run: it equals the
      decoupled weight decay times the sum of all learning rates. Without gradients, a matrix
      shrinks by exp(-total_decay), independently of learning rate and number of steps.
    - `weight_decay` is the L2 penalty of published recipes. As in torch.optim, weight_decay x
      parameter is added to the clipped gradient, before the momentum or the moments of Adam.

    Args:
      spec: the fields of `config.optim`: `name` (adam | sgd), `total_decay`, `weight_decay`,
        `momentum` (for sgd; 0 for none), `clip_norm` (largest global norm of the gradient; 0 for
        any), and the fields of `make_schedule`.
      total_steps: steps of the whole run.
      steps_per_epoch: optimiser steps per epoch, which may be a fraction; needed for the decay
        `steps` only.

    Raises:
      ValueError: The name or the decay is unknown, or no learning rate is above 0.

    Ours: no decay of biases and normalisation parameters.
    """
    schedule = make_schedule(spec, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if spec["name"] == "adam":
        scale = optax.scale_by_adam(b2=SECOND_MOMENT_DECAY)
    elif spec["name"] == "sgd":
        scale = optax.trace(decay=spec["momentum"]) if spec["momentum"] else optax.identity()
    else:
        raise UserError(f"config.optim.name='{spec['name']}': choose from adam, sgd")
    parts = [optax.clip_by_global_norm(spec["clip_norm"])] if spec["clip_norm"] else []
    if spec["weight_decay"]:
        parts.append(optax.add_decayed_weights(spec["weight_decay"], mask=_is_matrix))
    parts.append(scale)
    if spec["total_decay"]:
        rates = float(jnp.sum(schedule(jnp.arange(total_steps))))
        if not 0 < rates < math.inf:
            raise UserError(
                f"config.optim.total_decay={spec['total_decay']}: learning rates sum to {rates}\n"
                "change config.optim.learning_rate, or --config.optim.total_decay=0"
            )
        decay = spec["total_decay"] / rates
        parts.append(optax.add_decayed_weights(decay, mask=_is_matrix))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule


def _is_matrix(params: optax.Params) -> optax.Params:
    """Returns a tree of booleans, True for parameters with more than one axis."""
    return jax.tree.map(lambda x: x.ndim > 1, params)
