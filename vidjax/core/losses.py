"""Losses of logits, with a value per example, and the training objective.

Logits are [..., K] with K class columns (see `core.batch`) and any leading axes: clips, branches
of a model, examples of a clip. To add a loss, write a function here and add a line to
`CLASSIFICATION` or `MARGINS`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vidjax.core import optim
from vidjax.core.batch import Array, ModelOutput
from vidjax.utils.errors import UserError, check_entry


def softmax_cross_entropy(
    logits: Array, labels: Array, class_mask: Array | None = None, *, label_smoothing: float = 0.0
) -> Array:
    """Computes the cross-entropy of the softmax over the classes.

    Args:
      logits: [..., K] float, a column for each class.
      labels: [...] int32, the column of the right class.
      class_mask: [K] bool, True for class columns that the loss uses. None means all columns.
      label_smoothing: share of the target, in [0, 1), that is spread evenly over all columns that
        take part, including the column of the label.

    Returns:
      [...] float, in nats.

    Source: optax. Label smoothing: Szegedy et al., Rethinking the Inception Architecture, sec. 7.
    """
    where = None if class_mask is None else jnp.broadcast_to(class_mask, logits.shape)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels, where=where)
    if not label_smoothing:
        return loss
    label_logit = select_at_label(logits, labels)
    return loss + label_smoothing * (label_logit - jnp.mean(logits, axis=-1, where=where))


def angular_margin(logits: Array, labels: Array, *, margin: float, scale: float | Array) -> Array:
    """Adds a margin to the angle between the embedding and the direction of the label.

    Args:
      logits: [..., K] float, scale x cosine(angle).
      labels: [...] int32, class columns.
      margin: angle m in radians, from 0 to pi/2. With 0, the logits are returned unchanged.
      scale: factor on the cosines, above 0: a number, or a learned scale as an array that
        broadcasts to [...].

    Returns:
      Logits [..., K], at least float32. In the column of the label, they are scale x cos(angle +
        m). For an angle above pi - m, cos(angle + m) would increase with the angle, so the logit is
        scale x (cos(angle) - m sin(m)) instead. Other columns are unchanged.

    Raises:
      UserError: `scale` is not above 0.

    Source: Deng et al., ArcFace, equation 3. The formula for angles above pi - m is from the
    authors' code. Unlike that code, this function has finite derivatives at cosines of 1 and -1.
    """
    fixed = 1.0 if isinstance(scale, jax.Array) else scale  # a learned scale cannot be checked here
    if not fixed > 0:
        raise UserError(f"config.model.logit_scale={scale}: must be above 0 if there is a margin")
    if margin == 0:
        return logits
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    cosine = select_at_label(logits, labels) / scale
    # Rounding may give a cosine above 1, and the derivative of a square root is infinite at 0.
    squared = (1 - cosine) * (1 + cosine)
    sine = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    shifted = cosine * np.cos(margin) - sine * np.sin(margin)
    fallback = cosine - margin * np.sin(margin)
    harder = scale * jnp.where(cosine > np.cos(np.pi - margin), shifted, fallback)
    return put_at_label(logits, labels, harder)


def cosine_margin(logits: Array, labels: Array, *, margin: float, scale: float | Array) -> Array:
    """Subtracts a margin from the cosine between the embedding and the direction of the label.

    Args:
      logits: [..., K] float, scale x cosine. Cosines may exceed 1, for example after dropout.
      labels: [...] int32, class columns.
      margin: m, 0 or more.
      scale: factor on the cosines: a number, or a learned scale as an array that broadcasts to
        [...].

    Returns:
      Logits [..., K], at least float32. In the column of the label, they are scale x (cosine - m).
        Other columns are unchanged.

    Source: Wang et al., CosFace, equation 4.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    harder = select_at_label(logits, labels) - margin * scale
    return put_at_label(logits, labels, harder)


def binary_focal(
    logits: Array, labels: Array, gamma: float = 2.0, class_mask: Array | None = None
) -> Array:
    """Computes the focal loss of the sigmoid of each class column, summed over the columns.

    Args:
      logits: [..., K] float.
      labels: [...] int32, the class column of each example.
      gamma: focusing exponent, 0 or more; 0 is the binary cross-entropy.
      class_mask: [K] bool, True for class columns that the loss uses. None means all columns.

    Returns:
      [...] float. With p = sigmoid(logit): -(1 - p)^gamma log p in the column of the label, plus
        the sum of -p^gamma log(1 - p) over the other columns.

    Source: Lin et al., Focal Loss for Dense Object Detection, equation 4 without alpha. The sum
    over all columns is from quality fusion (4th place of iQIYI-VID 2019).
    """
    # A step with `optax.losses.sigmoid_focal_loss` takes two to four times as long. Here no one-hot
    # target is built: the sum over all columns is corrected in the column of the label.
    label_logit = select_at_label(logits, labels)
    positive = focal_negative(-label_logit, gamma)  # 1 - sigmoid(x) is sigmoid(-x)
    not_label = focal_negative(label_logit, gamma)
    if class_mask is not None:
        not_label = jnp.where(jnp.asarray(class_mask)[labels], not_label, 0.0)
        # The low logit adds 0 to the sum. An infinite logit would have NaN derivatives.
        logits = jnp.where(jnp.asarray(class_mask), logits, jnp.finfo(logits.dtype).min / 2)
    return sum_of_focal_negatives(logits, gamma) - not_label + positive


def multiclass_focal(
    logits: Array, labels: Array, gamma: float = 2.0, class_mask: Array | None = None
) -> Array:
    """Computes the focal loss of the softmax, (1 - p)^gamma x cross-entropy.

    p is the probability of the label. Returns [...] float.

    Args:
      logits: [..., K] float.
      labels: [...] int32, the class column of each example.
      gamma: focusing exponent, 0 or more; 0 is the cross-entropy.
      class_mask: [K] bool, True for class columns that the loss uses. None means all columns.
    """
    cross_entropy = softmax_cross_entropy(logits, labels, class_mask)
    if gamma == 0:
        return cross_entropy
    # For gamma below 1 the derivative of the power is infinite at p = 1.
    tiny = jnp.finfo(logits.dtype).tiny
    return jnp.maximum(-jnp.expm1(-cross_entropy), tiny) ** gamma * cross_entropy


def batch_focal(
    logits: Array,
    labels: Array,
    gamma: float = 2.0,
    class_mask: Array | None = None,
    counted: Array | None = None,
) -> Array:
    """Computes the focal loss (1 - p)^gamma x cross-entropy, where examples of a batch share p.

    -log p is the weighted mean of the cross-entropies in the batch, separately for each of the G
    branches of a model (sets of logits for each example). Returns the loss of each label, [...].

    Args:
      logits: [..., K] float. For G branches: [B * G, K], with G neighbouring rows per example.
      labels: [...] int32, the class column of each row.
      gamma: focusing exponent, 0 or more; 0 is the cross-entropy.
      class_mask: [K] bool, True for class columns that the loss uses. None means all columns.
      counted: [B, G] float, weight of each cross-entropy in the mean. None means that G is 1, and
        all weights are equal.

    Source: models/losses.py in the code of DeepMEF (3rd place 2019).
    """
    cross_entropy = softmax_cross_entropy(logits, labels, class_mask)
    rows = cross_entropy.reshape(-1, 1 if counted is None else counted.shape[1])
    weight = jnp.ones_like(rows) if counted is None else counted
    total = jnp.sum(jnp.where(weight > 0, rows * weight, 0.0), axis=0)
    mean = total / jnp.maximum(jnp.sum(weight, axis=0), 1e-6)  # [G]
    tiny = jnp.finfo(mean.dtype).tiny
    return (jnp.maximum(-jnp.expm1(-mean), tiny) ** gamma * rows).reshape(cross_entropy.shape)


# name -> loss (logits, labels, **options) -> [...]. An option with the name of a field of
# config.loss gets the value of that field. The system supplies `class_mask`, `logit_scale` and
# `counted`. A loss with the option `margin` adds the margin itself. The logits of other losses
# already contain the margin.
CLASSIFICATION: dict[str, Callable[..., Array]] = {
    "softmax": softmax_cross_entropy,
    "binary": binary_focal,
    "multiclass": multiclass_focal,
    "batch": batch_focal,
}

# name -> margin of a cosine classifier: (logits, labels, *, margin, scale) -> logits
MARGINS: dict[str, Callable[..., Array]] = {"angular": angular_margin, "cosine": cosine_margin}

# (output, labels [B] int32, weight [B] of each example in a mean, step [] int32) -> [B]
Objective = Callable[[ModelOutput, Array, Array, Array], Array]


def make_objective(
    spec: Mapping[str, Any], class_mask: Array | None, steps_per_epoch: float, *, logit_scale: float
) -> Objective:
    """Builds the training objective, a function that computes the loss of each example.

    A model has one or more branches (sets of logits). The loss of an example is the weighted sum of
    the losses of its branches, with the weights `ModelOutput.loss_weight`. If `spec["mean_over"]`
    is `branches`, a branch that learns from few examples counts as much as other branches. For the
    arguments, see `make_loss`. For the arguments of the result, see `Objective`.
    """
    loss_fn = make_loss(spec, class_mask, steps_per_epoch, logit_scale=logit_scale)

    def objective(output: ModelOutput, labels: Array, weight: Array, step: Array) -> Array:
        logits, loss_weight = output.logits, output.loss_weight  # [B, G, K], [B, G]
        if loss_weight is None:
            loss_weight = jnp.ones(logits.shape[:2], logits.dtype)
        # A single axis for examples and branches is faster, and so are logits that are stored once.
        rows = jax.lax.optimization_barrier(logits.reshape(-1, logits.shape[-1]))
        repeated = jnp.repeat(labels, logits.shape[1])
        scale = output.logit_scale
        if scale is not None:
            scale = jnp.tile(scale, len(logits))
        counted = loss_weight * weight[:, None]
        per_branch = loss_fn(rows, repeated, step, scale, counted).reshape(logits.shape[:2])
        if spec["mean_over"] == "branches":
            # The training step averages over all examples. Dividing by the share corrects that.
            share = jnp.sum(counted, axis=0) / jnp.maximum(jnp.sum(weight), 1e-6)  # [G]
            loss_weight = loss_weight / jnp.maximum(share, 1e-6)
        return jnp.sum(per_branch * loss_weight, axis=1)

    return objective


def _check_loss(name: str, value: object, labels: Array) -> Array:
    """Returns `value`, the result of the loss function `name`.

    Raises UserError if `value` is not a float array with a number for each label.
    """
    kind = type(value).__name__
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jnp.floating) and value.shape == labels.shape:
            return value
        kind = f"{value.dtype} {list(value.shape)}"
    raise UserError(
        f"config.loss: the loss '{name}' returns {kind} for {len(labels)} labels\n"
        f"return a float for each label, of shape {list(labels.shape)}"
    )


def make_loss(
    spec: Mapping[str, Any], class_mask: Array | None, steps_per_epoch: float, *, logit_scale: float
) -> Callable[..., Array]:
    """Builds the loss w x focal + (1 - w) x classification, with a schedule for w.

    Args:
      spec: the options of the losses, and these fields of `config.loss`:
        classification, focal: the names of the two losses, keys of CLASSIFICATION.
        schedule: pairs (epoch, w), see `optim.make_piecewise`.
        margin_type: the kind of the margin, a key of MARGINS.
        margin: the size of the margin; 0 if logits are not cosines.
      class_mask: [K] bool, True for class columns that the loss uses. None means all columns.
      steps_per_epoch: optimiser steps per epoch; may be a fraction.
      logit_scale: factor on the cosines of the model, or 1 if its logits are not cosines.

    Returns:
      Function (logits [..., K], labels [...] int32, step [] int32, scale, counted) -> loss [...]
        float. JAX may trace `step`. `scale` is None, or a learned scale that replaces `logit_scale`
        and broadcasts to [...]. For `counted`, see `batch_focal`.
    """
    margin = "--config.loss.classification=softmax --config.loss.margin=0.5"
    elsewhere = {
        "arcface": f"{margin} --config.loss.margin_type=angular",
        "cosface": f"{margin} --config.loss.margin_type=cosine",
    }
    check_entry("config.loss.classification", spec["classification"], CLASSIFICATION, elsewhere)
    check_entry("config.loss.focal", spec["focal"], CLASSIFICATION)
    check_entry("config.loss.margin_type", spec["margin_type"], MARGINS)
    if spec["margin"] and logit_scale == 1.0:
        raise UserError(
            f"config.loss.margin={spec['margin']} needs a cosine classifier, with a "
            "config.model.logit_scale other than 1\n"
            "choose such a model, or set --config.loss.margin=0"
        )
    focal_weight = optim.make_piecewise(spec["schedule"], name="config.loss.schedule")
    weights = np.asarray(spec["schedule"], np.float32)[:, 1]
    if np.any(weights > 1):
        raise UserError(
            f"config.loss.schedule: the second numbers of the pairs must be between 0 and 1, but "
            f"are {weights.tolist()}"
        )

    def loss_fn(
        logits: Array,
        labels: Array,
        step: Array,
        scale: Array | None = None,
        counted: Array | None = None,
    ) -> Array:
        scale_now = logit_scale if scale is None else scale
        supplied = {"class_mask": class_mask, "logit_scale": scale_now, "counted": counted}

        def loss(name: str) -> Array:
            function = CLASSIFICATION[name]
            options = optim.select_options(function, spec)
            options |= optim.select_options(function, supplied)
            harder = logits
            if spec["margin"] and "margin" not in options:
                margin_fn = MARGINS[spec["margin_type"]]
                harder = margin_fn(logits, labels, margin=spec["margin"], scale=scale_now)
            return _check_loss(name, function(harder, labels, **options), labels)

        if not weights.any():
            return loss(spec["classification"])
        if np.all(weights == 1):
            return loss(spec["focal"])
        weight = focal_weight(step / steps_per_epoch).astype(logits.dtype)
        rest = (1 - weight) * loss(spec["classification"])
        return weight * loss(spec["focal"]) + rest

    return loss_fn


# Operations on logits, with as few passes over them as possible. Logits [..., K] are the largest
# arrays of a training step: on a CPU the time of a loss is the time to read and write them. Each
# derivative below is elementwise and needs only the logits. So XLA computes the derivative of a
# whole loss in a single pass and stores no further array of this shape.


def is_label(labels: Array, num_classes: int) -> Array:
    """Returns [..., num_classes] bool, True in the column of the label. Labels are [...] int32."""
    return jnp.arange(num_classes) == labels[..., None]


@jax.custom_jvp
def select_at_label(values: Array, labels: Array) -> Array:
    """Selects the entry of `values` [..., K] at each of `labels` [...] int32; returns [...]."""
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


@select_at_label.defjvp
def _select_at_label_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (values, labels), (tangent, _) = primals, tangents
    # The transpose of this sum is elementwise. The transpose of a gather is a slow scatter.
    picked = jnp.where(is_label(labels, values.shape[-1]), tangent, 0)
    return select_at_label(values, labels), jnp.sum(picked, axis=-1)


def is_argmax(scores: Array, column: Array) -> Array:
    """Returns whether `column` has the highest score, for each row of scores, [B] bool.

    `scores` are [B, K] float, and `column` is [B] int32. Among equal scores, the first column
    counts as the highest. The result is False for a row with NaN.
    """
    # On a CPU this is 9 times faster than `argmax`.
    value = jnp.take_along_axis(scores, column[:, None], axis=-1)
    is_earlier = jnp.arange(scores.shape[-1]) < column[:, None]
    # A comparison with NaN is never true.
    is_below = (scores < value) | ((scores == value) & ~is_earlier)
    return jnp.all(is_below, axis=-1)


def put_at_label(logits: Array, labels: Array, values: Array) -> Array:
    """Returns logits [..., K] in which the column of each label has a new value.

    `labels` [...] int32 are class columns. `values` [...] float are the new values.
    """
    return jnp.where(is_label(labels, logits.shape[-1]), values[..., None], logits)


def log_softmax(logits: Array, class_mask: Array) -> Array:
    """Computes the logarithm of the softmax of logits [..., K], precise even near probability 1.

    The softmax is taken over the columns where `class_mask` [K] bool is True. In other columns, the
    result may exceed 0.
    """
    # The result for the best column is log_sigmoid(lead), where the lead is the logit minus the
    # logsumexp of all other logits. In float32 this keeps all digits up to a lead of 87 nats. The
    # usual formula rounds to 0 above 17 nats, so clips with different certainty would tie.
    trained = jnp.where(class_mask, logits, -jnp.inf)
    best = jnp.max(trained, axis=-1, keepdims=True)
    column = jnp.arange(logits.shape[-1])
    first = jnp.min(jnp.where(trained == best, column, len(class_mask)), axis=-1, keepdims=True)
    is_best = column == first
    others = jnp.where(is_best, -jnp.inf, trained)
    second = jnp.max(others, axis=-1, keepdims=True)
    second = jnp.where(second == -jnp.inf, 0.0, second)
    lead = best - second - jnp.log(jnp.sum(jnp.exp(others - second), axis=-1, keepdims=True))
    total = best + jax.nn.softplus(-lead)
    return jnp.where(is_best, jax.nn.log_sigmoid(lead), logits - total)


def focal_negative(logits: Array, gamma: float) -> Array:
    """Computes -p^gamma log(1 - p), the focal loss of a wrong class, where p = sigmoid(logit)."""
    log_rest = jax.nn.softplus(logits)  # -log(1 - p)
    return jnp.exp(gamma * (logits - log_rest)) * log_rest


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_of_focal_negatives(logits: Array, gamma: float) -> Array:
    """Sums `focal_negative` of the logits [..., K] over the last axis."""
    # Twice -log(1 - p), computed without constants: XLA for CPUs fuses the terms of a sum, but
    # writes every constant among them to memory as an array of this shape.
    log1p = jnp.log1p(jnp.exp(-jnp.abs(logits)))
    twice = (jnp.abs(logits) + logits) + (log1p + log1p)
    terms = jnp.exp((gamma / 2) * ((logits + logits) - twice)) * twice
    return jnp.sum(terms, axis=-1) / 2


@sum_of_focal_negatives.defjvp
def _sum_of_focal_negatives_jvp(
    gamma: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    total = sum_of_focal_negatives(logits, gamma)
    # With the barrier, XLA recomputes the exponentials and does not store them.
    logits = jax.lax.optimization_barrier(logits)
    log_rest = jnp.maximum(logits, 0) + _log1p(jnp.exp(-jnp.abs(logits)))
    p = jnp.exp(logits - log_rest)
    power = p * p if gamma == 2 else jnp.exp(gamma * (logits - log_rest))
    slope = power * (gamma * (1 - p) * log_rest + p)
    return total, jnp.sum(slope * tangent, axis=-1)


def _log1p(x: Array) -> Array:
    """Computes log(1 + x) for x in [0, 1], with a relative error below 2e-7 in float32.

    This is faster than `jnp.log1p`, because XLA for CPUs does not vectorise a fused `jnp.log1p`.
    """
    if x.dtype != jnp.float32:
        return jnp.log1p(x)
    return x * functools.reduce(lambda total, factor: total * x + factor, _LOG1P)


# The coefficients of a polynomial that is nearly log(1 + x) / x on [0, 1], highest power first.
_FIT = np.polynomial.Chebyshev.interpolate(lambda x: np.log1p(x) / x, 10, domain=[0, 1])
_LOG1P: list[float] = _FIT.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()
