"""Losses of logits, one value an example, and their mixture by a schedule over epochs.

Logits are [..., K], K class columns (see `vidjax.batch`), with any leading axes: clips, branches of
a model, examples of a clip.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import optim
from vidjax.batch import Array

_DEFAULTS = {
    "focal": "binary",
    "gamma": 2.0,
    "schedule": ((0.0, 0.0),),
    "margin": 0.0,
    "label_smoothing": 0.0,
}


def softmax_cross_entropy(
    logits: Array,
    labels: Array,
    class_mask: Array | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Array:
    """Returns the cross-entropy of the softmax over the class columns.

    Args:
      logits: [..., K] float.
      labels: [...] int32, class columns.
      class_mask: [K] bool, True for columns that take part; None: all.
      label_smoothing: share of the target, in [0, 1), that is spread evenly over all columns that
        take part, the label's included.

    Returns:
      [...] float, in nats.

    Source: label smoothing as in Szegedy et al., Rethinking the Inception Architecture, section 7.
    """
    where = None if class_mask is None else jnp.asarray(class_mask)
    label_logit = _at_label(logits, labels)
    loss = jax.nn.logsumexp(logits, axis=-1, where=where) - label_logit
    if not label_smoothing:
        return loss
    return loss + label_smoothing * (label_logit - jnp.mean(logits, axis=-1, where=where))


def angular_margin(logits: Array, labels: Array, *, margin: float, scale: float) -> Array:
    """Returns the logits of a cosine classifier with an angle added at the label.

    Args:
      logits: [..., K] float, scale x cosine.
      labels: [...] int32, class columns.
      margin: angle m in radians, from 0, which changes nothing, to pi/2.
      scale: what the cosines were multiplied by, above 0.

    Returns:
      [..., K], float32 or wider: scale x cos(angle + m) in the label's column, and where the angle
      is beyond pi - m, so that the cosine would rise again, scale x (cosine - m sin m); the other
      columns as they were.

    Raises:
      ValueError: a margin or a scale out of its range.

    Source: Deng et al., ArcFace, equation 3, with the fallback of the authors' code. Ours: at a
    cosine of 1 or -1, where the sine has no derivative, its derivative counts as 0.
    """
    if not 0 <= margin <= np.pi / 2 or not scale > 0:
        raise ValueError(
            f"angular margin needs 0 <= margin <= pi/2 and scale > 0, got {margin} and {scale}"
        )
    if margin == 0:
        return logits
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    cosine = _at_label(logits, labels) / scale
    # Rounding may take a cosine past 1; and the derivative of a root is infinite at 0.
    squared = (1 - cosine) * (1 + cosine)
    sine = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    shifted = cosine * np.cos(margin) - sine * np.sin(margin)
    fallback = cosine - margin * np.sin(margin)
    harder = scale * jnp.where(cosine > np.cos(np.pi - margin), shifted, fallback)
    # Row by row, so that rows on several devices stay there.
    rows = logits.reshape(-1, logits.shape[-1])  # [N, K]
    put = jax.vmap(lambda row, label, value: row.at[label].set(value, mode="promise_in_bounds"))
    return put(rows, labels.reshape(-1), harder.reshape(-1)).reshape(logits.shape)


def binary_focal(
    logits: Array, labels: Array, gamma: float = 2.0, class_mask: Array | None = None
) -> Array:
    """Returns the sigmoid one-vs-rest focal loss, summed over the class columns.

    Args:
      logits: [..., K] float.
      labels: [...] int32, class columns.
      gamma: focusing exponent, 0 or more; 0 is the binary cross-entropy.
      class_mask: [K] bool, True for columns that take part; None: all.

    Returns:
      [...] float: with p = sigmoid(logit), the sum over the other columns of -p^gamma log(1 - p),
      plus -(1 - p)^gamma log p at the label's.

    Source: Lin et al., Focal Loss for Dense Object Detection, equation 4 without alpha; summed over
    all columns as in quality fusion (4th place 2019). The one-hot is never built: the negative term
    is summed over all columns and corrected at the label's.
    """
    negative = _focal_negative(gamma, logits)
    if class_mask is not None:
        negative = jnp.where(jnp.asarray(class_mask), negative, 0.0)
    label_logit = _at_label(logits, labels)
    positive = _focal_negative(gamma, -label_logit)  # 1 - sigmoid(x) is sigmoid(-x)
    return jnp.sum(negative, axis=-1) - _at_label(negative, labels) + positive


def multiclass_focal(
    logits: Array, labels: Array, gamma: float = 2.0, class_mask: Array | None = None
) -> Array:
    """Returns the focal loss of the softmax, (1 - p)^gamma x cross-entropy, for every example.

    Args:
      logits: [..., K] float.
      labels: [...] int32, class columns.
      gamma: focusing exponent, 0 or more; 0 is the cross-entropy.
      class_mask: [K] bool, True for columns that take part; None: all.

    Returns:
      [...] float; p is the probability of the label.
    """
    cross_entropy = softmax_cross_entropy(logits, labels, class_mask)
    if gamma == 0:
        return cross_entropy
    # The derivative of a power below 1 is infinite at 0, where p is 1.
    tiny = jnp.finfo(logits.dtype).tiny
    return jnp.maximum(-jnp.expm1(-cross_entropy), tiny) ** gamma * cross_entropy


def make_loss(
    spec: Mapping, class_mask: Array | None, steps_per_epoch: float, logit_scale: float = 1.0
) -> Callable[[Array, Array, Array], Array]:
    """Returns the loss that a plain dict describes: w x focal + (1 - w) x softmax cross-entropy.

    Args:
      spec: any of `focal` (`binary`, the default, or `multiclass`), `gamma` (2.0), `schedule`,
        pairs (epoch, w) as in `optim.make_piecewise`, `margin` (0.0), the `angular_margin` that
        both losses see, and `label_smoothing` (0.0) of the softmax cross-entropy. The default
        schedule, ((0, 0),), is softmax cross-entropy alone.
      class_mask: [K] bool, True for columns that take part; None: all.
      steps_per_epoch: optimiser steps in an epoch; may be a fraction.
      logit_scale: what the model multiplies its cosines by; 1 where its logits are no cosines.

    Returns:
      Function of (logits [..., K], labels [...] int32, step [] int32) that gives [...]. The weight
      is computed from the step, so that a traced step never compiles anew.

    Raises:
      ValueError: for an unknown field or focal loss, a value out of its range, an unordered
        schedule, a margin without a cosine classifier, or label smoothing without softmax.
    """
    if unknown := sorted(set(spec) - set(_DEFAULTS)):
        raise ValueError(
            f"loss has no option {', '.join(unknown)}; known are {', '.join(_DEFAULTS)}"
        )
    options = {**_DEFAULTS, **spec}
    focal_losses = {"binary": binary_focal, "multiclass": multiclass_focal}
    if options["focal"] not in focal_losses:
        raise ValueError(
            f"unknown focal loss {options['focal']!r}; known are {', '.join(focal_losses)}"
        )
    gamma, margin = float(options["gamma"]), float(options["margin"])
    smoothing = float(options["label_smoothing"])
    if not gamma >= 0:
        raise ValueError(f"focal gamma must be 0 or more, got {options['gamma']}")
    if not 0 <= margin <= np.pi / 2:
        raise ValueError(f"config.loss.margin={margin} must lie between 0 and pi/2")
    if margin and logit_scale == 1.0:
        raise ValueError(
            f"config.loss.margin={margin} needs a cosine classifier whose logit_scale is not 1"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"config.loss.label_smoothing={smoothing} must be at least 0 and below 1")
    focal_weight = optim.make_piecewise(options["schedule"], name="config.loss.schedule")
    weights = np.asarray(options["schedule"], np.float32)[:, 1]
    if not np.all((weights >= 0) & (weights <= 1)):
        raise ValueError(f"loss schedule weights must lie between 0 and 1, got {weights.tolist()}")
    if smoothing and np.all(weights == 1):
        raise ValueError(
            f"config.loss.label_smoothing={smoothing} is of the softmax cross-entropy, which has "
            f"no share in config.loss.schedule={options['schedule']}"
        )

    softmax = functools.partial(
        softmax_cross_entropy, class_mask=class_mask, label_smoothing=smoothing
    )
    focal = functools.partial(focal_losses[options["focal"]], gamma=gamma, class_mask=class_mask)

    def loss_fn(logits: Array, labels: Array, step: Array) -> Array:
        logits = angular_margin(logits, labels, margin=margin, scale=logit_scale)
        if not weights.any():
            return softmax(logits, labels)
        if np.all(weights == 1):
            return focal(logits, labels)
        weight = focal_weight(step / steps_per_epoch).astype(logits.dtype)
        return weight * focal(logits, labels) + (1 - weight) * softmax(logits, labels)

    return loss_fn


def _at_label(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


# Autodiff would keep four arrays of the shape of the logits for the backward pass; with the
# derivative written out it keeps one.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _focal_negative(gamma: float, logits: Array) -> Array:
    """Returns -p^gamma log(1 - p), p = sigmoid(logits), elementwise."""
    log_rest = jax.nn.softplus(logits)  # -log(1 - p)
    return jnp.exp(gamma * (logits - log_rest)) * log_rest


@_focal_negative.defjvp
def _focal_negative_jvp(gamma, primals, tangents):
    (logits,), (tangent,) = primals, tangents
    p = jax.nn.sigmoid(logits)
    log_rest = jax.nn.softplus(logits)
    power = jnp.exp(gamma * (logits - log_rest))
    return power * log_rest, power * (gamma * (1 - p) * log_rest + p) * tangent
