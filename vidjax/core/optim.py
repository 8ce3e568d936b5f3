"""Builds optimisers and learning-rate schedules from dicts of configuration fields."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vidjax.core.batch import Array
from vidjax.utils import messages
from vidjax.utils.errors import UserError, check_entry


def make_piecewise(
    points: Sequence[Sequence[float]], *, name: str = "schedule"
) -> Callable[[Array], Array]:
    """Builds a piecewise linear function of the epoch: [...] -> [...] float32, also under jit.

    `points` are finite (epoch, value) pairs with increasing epochs and values of 0 or more. Two
    pairs with equal epochs make a jump. At that epoch, the second value counts. The function is
    constant before the first pair and after the last pair. Messages of errors begin with `name`.
    """
    try:
        table = np.asarray(points, np.float32)
    except (ValueError, TypeError):
        table = np.empty((0, 0), np.float32)
    pairs = table.ndim == 2 and table.shape[1] == 2 and np.all(np.isfinite(table))
    if not pairs or np.any(np.diff(table[:, 0]) < 0):
        raise UserError(f"{name}={points}: give finite pairs (epoch, value), in order of epochs")
    if np.any(table[:, 1] < 0):  # a negative learning rate or weight would enlarge the loss
        raise UserError(
            f"{name}={points}: must have values of 0 or more, not {table[:, 1].min():g}"
        )
    epochs, values = table.T
    # Rounding of step / steps_per_epoch must not delay a jump by a step.
    is_jump = np.isin(epochs, epochs[1:][np.diff(epochs) == 0])
    epochs = np.where(is_jump, epochs * np.float32(1 - 5e-7), epochs)
    # `optax.piecewise_interpolate_schedule` multiplies scales: it can never leave 0 and has no
    # jumps. The added point makes a jump at the last epoch take its second value.
    epochs, values = np.append(epochs, np.inf), np.append(values, values[-1])
    return lambda epoch: jnp.interp(epoch, epochs, values)


class Warmup(NamedTuple):
    """The linear warm-up of the learning rate, and the length of the run, for a schedule."""

    peak: float  # learning rate after the warm-up
    start: float  # learning rate at the first step of the warm-up
    warmup_steps: int  # steps of the warm-up; 0 means no warm-up
    total_steps: int  # steps of the run, including the warm-up
    steps_per_epoch: float  # optimiser steps per epoch; may be a fraction

    def multiply(self, scale: optax.Schedule) -> optax.Schedule:
        """Returns a schedule: warm-up, then peak. All rates are multiplied by `scale(step)`."""
        rate = optax.constant_schedule(self.peak)
        if self.warmup_steps >= 1:
            rate = optax.linear_schedule(self.start, self.peak, self.warmup_steps)
        return lambda step: rate(step) * scale(step)


def cosine(ramp: Warmup, *, final_scale: float) -> optax.Schedule:
    """Returns a schedule with a cosine decay from the end of the warm-up to the end of the run.

    `final_scale` is the rate at the end, divided by the peak.
    """
    if ramp.warmup_steps < 1:
        return optax.cosine_decay_schedule(ramp.peak, max(ramp.total_steps, 1), final_scale)
    return optax.warmup_cosine_decay_schedule(
        init_value=ramp.start,
        peak_value=ramp.peak,
        warmup_steps=ramp.warmup_steps,
        decay_steps=ramp.total_steps,
        end_value=ramp.peak * final_scale,
    )


def constant(ramp: Warmup) -> optax.Schedule:
    """Returns a schedule that stays at the peak after the warm-up."""
    return ramp.multiply(optax.constant_schedule(1.0))


def staircase(ramp: Warmup, *, decay_factor: float, decay_every_epochs: float) -> optax.Schedule:
    """Returns a schedule that multiplies the rate by `decay_factor` every `decay_every_epochs`.

    Epochs are counted from the first step. `decay_every_epochs` may be a fraction.
    """
    width = decay_every_epochs * ramp.steps_per_epoch  # width of a stair in steps
    num_stairs = math.ceil(ramp.total_steps / width) + 1
    # The table is computed on the host. In float32, as in `optax.exponential_decay`, rounding could
    # move an edge by a step.
    edges = np.ceil(width * np.arange(1, num_stairs) * (1 - 1e-12))
    edges = np.minimum(edges, np.iinfo(np.int32).max).astype(np.int32)  # a stair may be very wide
    scales = (float(decay_factor) ** np.arange(num_stairs)).astype(np.float32)
    return ramp.multiply(
        lambda step: jnp.asarray(scales)[jnp.searchsorted(edges, step, side="right")]
    )


def piecewise(ramp: Warmup, *, points: Sequence[Sequence[float]]) -> optax.Schedule:
    """Returns a schedule that multiplies the rate by a piecewise linear function of the epoch.

    `ramp` is the warm-up. `points` are pairs (epoch, factor), see `make_piecewise`.

    Source: quality fusion (4th place of iQIYI-VID 2019). Its training.py (lines 314-331 at commit
    60f5127) starts with a low rate, jumps to the peak and halves it every 50 epochs.
    """
    factor = make_piecewise(points, name="config.optim.points")
    # The epoch is taken at the middle of a step, so that rounding cannot move a jump by a step.
    return ramp.multiply(lambda step: factor((jnp.asarray(step) + 0.5) / ramp.steps_per_epoch))


# name in `config.optim.decay` -> function (ramp, *, options) that returns a schedule. Options are
# fields of `config.optim`. To add a decay or an optimiser, write a function and add a line to its
# table.
DECAYS: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "piecewise": piecewise,
    "steps": staircase,
}


def make_schedule(
    spec: Mapping[str, Any], *, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Builds a learning-rate schedule: a linear warm-up, then a decay.

    Args:
      spec: these fields of `config.optim`, and the options of the decay:
        learning_rate: peak of the rate.
        warmup: share of all steps in the warm-up.
        warmup_scale: rate at the first step, divided by the peak. 0 means 1 / (number of warm-up
          steps).
        decay: a key of DECAYS.
      total_steps: steps of the whole run, including the warm-up.
      steps_per_epoch: optimiser steps per epoch; may be a fraction.

    Returns:
      Function: steps [...] -> learning rates [...] float32. The steps may be traced.
    """
    learning_rate, decay = spec["learning_rate"], spec["decay"]
    warmup, warmup_scale = spec["warmup"], spec["warmup_scale"]
    check_entry("config.optim.decay", decay, DECAYS)
    # In floating point 100 x 0.07 is slightly more than 7.
    warmup_steps = min(math.ceil(total_steps * warmup * (1 - 1e-12)), total_steps - 1)
    # A rate of 0 would waste the first step.
    start = learning_rate * warmup_scale if warmup_scale else learning_rate / max(warmup_steps, 1)
    ramp = Warmup(learning_rate, start, warmup_steps, total_steps, steps_per_epoch)
    return DECAYS[decay](ramp, **select_options(DECAYS[decay], spec))


def adam() -> optax.GradientTransformation:
    """Returns Adam with the decays of its paper, 0.9 and 0.999 (Kingma and Ba)."""
    return optax.scale_by_adam()


def sgd(*, momentum: float) -> optax.GradientTransformation:
    """Returns stochastic gradient descent, with momentum if it is above 0."""
    return optax.trace(decay=momentum) if momentum else optax.identity()


# name in `config.optim.name` -> function (*, options) that returns a transformation of the
# gradient. The learning rate is applied later.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adam": adam, "sgd": sgd}


class RestartState(NamedTuple):
    """The state of an optimiser that is reset before a certain update, see `restart_before`."""

    state: optax.OptState  # of the original optimiser
    updates: Array  # [] int32, number of updates so far


def restart_before(tx: optax.GradientTransformation, step: int) -> optax.GradientTransformation:
    """Returns the optimiser `tx`, but resets its state before update `step`, counted from 0."""

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), jnp.int32(0))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RestartState]:
        assert isinstance(state, RestartState)
        is_due, fresh = state.updates == step, tx.init(updates)
        old = jax.tree.map(lambda x, new: jnp.where(is_due, new, x), state.state, fresh)
        updates, new = tx.update(updates, old, params)
        return updates, RestartState(new, state.updates + 1)

    return optax.GradientTransformation(init, update)


def list_names(params: optax.Params) -> list[str]:
    """Returns the name of each array in the tree `params`, such as `dense_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def describe_frozen(params: optax.Params, pattern: str) -> str:
    """Returns a line with number and names of the parameters that `pattern` freezes."""
    names, sizes = list_names(params), [math.prod(x.shape) for x in jax.tree.leaves(params)]
    frozen = [name for name in names if re.search(pattern, name)]
    number = sum(size for name, size in zip(names, sizes, strict=True) if name in frozen)
    return (
        f"config.optim.freeze: {number:,} of {sum(sizes):,} parameters stay unchanged, "
        f"{messages.list_some(frozen)}"
    )


def freeze(tx: optax.GradientTransformation, pattern: str) -> optax.GradientTransformation:
    """Returns the optimiser `tx`, but never updates parameters whose names match `pattern`.

    A name matches if the regular expression is found in it. `init` raises UserError if no name
    matches, or if all match.
    """
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"config.optim.freeze={pattern}: {error}: correct the pattern") from error

    def label(params: optax.Params) -> optax.Params:
        names = list_names(params)
        labels = ["frozen" if found(name) else "trained" for name in names]
        if len({*labels}) < 2:
            what = "no parameter" if "trained" in labels else "all parameters"
            raise UserError(
                f"config.optim.freeze={pattern} would freeze {what}: change the pattern\n"
                f"the names of the parameters are {messages.list_some(names, 20)}"
            )
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, label)


def make_optimizer(
    spec: Mapping[str, Any], *, total_steps: int, steps_per_epoch: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds an optimiser and its learning-rate schedule.

    There are two weight decays. By default, both apply only to matrices, not to biases and
    normalisation parameters.

    - `total_decay` is decoupled from the gradient. It is the decay over the whole run: the usual
      decoupled weight decay times the sum of all learning rates. If gradients are 0, a matrix
      shrinks to about exp(-total_decay) of its size, for any learning rate.
    - `weight_decay` is the L2 penalty of published recipes. As in torch.optim, weight_decay x
      parameter is added to the clipped gradient, before the momentum or the moments of Adam.

    Args:
      spec: these fields of `config.optim`, and the fields that `make_schedule` reads:
        name: a key of OPTIMIZERS. `spec` also contains the options of this optimiser.
        total_decay: the decoupled weight decay, see above.
        weight_decay: the L2 penalty, see above.
        decay_all: True to decay all parameters, as torch.optim does.
        clip_norm: largest global norm of the gradient; 0 means no limit.
        restart_epoch: epoch at which the momentum or the moments are reset to 0; 0 means never.
        accumulate: number of steps whose mean gradient makes an update.
        freeze: see the function `freeze`; "" means that all parameters are updated.
      total_steps, steps_per_epoch: see `make_schedule`.

    Raises:
      UserError: a name is unknown; the function in OPTIMIZERS has a parameter `learning_rate`; or
        `total_decay` is set, but the learning rates of all steps have no finite sum above 0.
    """
    every = spec["accumulate"]
    total_steps, steps_per_epoch = -(-total_steps // every), steps_per_epoch / every  # updates
    schedule = make_schedule(spec, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    name = spec["name"]
    adamw = {"adamw": "--config.optim.name=adam --config.optim.total_decay=1"}
    check_entry("config.optim.name", name, OPTIMIZERS, adamw)
    parts = [optax.clip_by_global_norm(spec["clip_norm"])] if spec["clip_norm"] else []
    # Matrices have 2 axes or more.
    decayed = None if spec["decay_all"] else lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    if spec["weight_decay"]:
        parts.append(optax.add_decayed_weights(spec["weight_decay"], mask=decayed))
    options = select_options(OPTIMIZERS[name], spec)
    if "learning_rate" in options:  # `optax.adamw` would multiply by it, and by -1, a second time
        raise UserError(
            f"config.optim.name='{name}': the function in OPTIMIZERS must not take learning_rate\n"
            "training applies the rate: let the function return, for example, optax.scale_by_adam()"
        )
    scaled = OPTIMIZERS[name](**options)
    restart = round(spec["restart_epoch"] * steps_per_epoch)
    parts.append(restart_before(scaled, restart) if restart else scaled)
    if spec["total_decay"]:
        rates = float(jnp.sum(jax.jit(schedule)(jnp.arange(total_steps))))  # one program
        if not 0 < rates < math.inf:
            raise UserError(
                f"config.optim.total_decay={spec['total_decay']} is divided by the sum of the "
                f"learning rates of all steps. The sum is {rates}, but must be above 0 and finite\n"
                "change --config.optim.learning_rate, or set --config.optim.total_decay=0"
            )
        decay = spec["total_decay"] / rates
        parts.append(optax.add_decayed_weights(decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(schedule))
    tx = optax.chain(*parts)
    if every > 1:
        tx = optax.MultiSteps(tx, every).gradient_transformation()
    tx = freeze(tx, spec["freeze"]) if spec["freeze"] else tx
    return tx, schedule if every == 1 else lambda step: schedule(step // every)


def select_options(function: Callable[..., Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `spec` whose names are names of parameters of `function`."""
    return {name: spec[name] for name in inspect.signature(function).parameters if name in spec}
