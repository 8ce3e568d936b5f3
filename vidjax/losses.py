"""Losses of [B, 1 + C] logits, one value a clip, and their mixture by a schedule over epochs."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array

_DEFAULTS = {"focal": "binary", "gamma": 2.0, "schedule": ((0.0, 0.0),)}


def softmax_cross_entropy(logits: Array, labels: Array, class_mask: Array | None = None) -> Array:
    """Returns the cross-entropy of the softmax over the class columns.

    Args:
      logits: [B, 1 + C] float.
      labels: [B] int32, class columns.
      class_mask: [1 + C] bool, True for columns that take part; None: all.

    Returns:
      [B] float, in nats.
    """
    where = None if class_mask is None else jnp.asarray(class_mask)
    return jax.nn.logsumexp(logits, axis=-1, where=where) - _at_label(logits, labels)


def binary_focal(
    logits: Array, labels: Array, gamma: float = 2.0, class_mask: Array | None = None
) -> Array:
    """Returns the sigmoid one-vs-rest focal loss, summed over the class columns.

    Args:
      logits: [B, 1 + C] float.
      labels: [B] int32, class columns.
      gamma: focusing exponent, 0 or more; 0 is the binary cross-entropy.
      class_mask: [1 + C] bool, True for columns that take part; None: all.

    Returns:
      [B] float: with p = sigmoid(logit), the sum over the other columns of -p^gamma log(1 - p),
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
      logits: [B, 1 + C] float.
      labels: [B] int32, class columns.
      gamma: focusing exponent, 0 or more; 0 is the cross-entropy.
      class_mask: [1 + C] bool, True for columns that take part; None: all.

    Returns:
      [B] float; p is the probability of the label.
    """
    cross_entropy = softmax_cross_entropy(logits, labels, class_mask)
    if gamma == 0:
        return cross_entropy
    # The derivative of a power below 1 is infinite at 0, where p is 1.
    tiny = jnp.finfo(logits.dtype).tiny
    return jnp.maximum(-jnp.expm1(-cross_entropy), tiny) ** gamma * cross_entropy


def make_loss(
    spec: Mapping, class_mask: Array | None, steps_per_epoch: int
) -> Callable[[Array, Array, Array], Array]:
    """Returns the loss that a plain dict describes: w x focal + (1 - w) x softmax cross-entropy.

    Args:
      spec: any of `focal` (`binary`, the default, or `multiclass`), `gamma` (2.0) and `schedule`,
        pairs (epoch, w) in the order of epochs: w is linear between them and constant outside. An
        epoch named twice is a jump. The default, ((0, 0),), is softmax cross-entropy alone.
      class_mask: [1 + C] bool, True for columns that take part; None: all.
      steps_per_epoch: optimiser steps in an epoch.

    Returns:
      Function of (logits [B, 1 + C], labels [B] int32, step [] int32) that gives [B]. The weight is
      computed from the step, so that a traced step never compiles anew.

    Raises:
      ValueError: for an unknown field or focal loss, a negative gamma, an unordered schedule or a
        weight outside [0, 1].
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
    gamma = float(options["gamma"])
    if not gamma >= 0:
        raise ValueError(f"focal gamma must be 0 or more, got {options['gamma']}")
    points = np.asarray(options["schedule"], np.float32)
    if points.ndim != 2 or points.shape[1] != 2 or not np.all(np.diff(points[:, 0]) >= 0):
        raise ValueError(f"loss schedule must be (epoch, weight) pairs in order, got {points}")
    epochs, weights = points.T
    if not np.all((weights >= 0) & (weights <= 1)):
        raise ValueError(f"loss schedule weights must lie between 0 and 1, got {weights.tolist()}")

    softmax = functools.partial(softmax_cross_entropy, class_mask=class_mask)
    focal = functools.partial(focal_losses[options["focal"]], gamma=gamma, class_mask=class_mask)
    if not weights.any():
        return lambda logits, labels, step: softmax(logits, labels)
    if np.all(weights == 1):
        return lambda logits, labels, step: focal(logits, labels)

    def mixed(logits, labels, step):
        weight = jnp.interp(step / steps_per_epoch, epochs, weights).astype(logits.dtype)
        return weight * focal(logits, labels) + (1 - weight) * softmax(logits, labels)

    return mixed


def _at_label(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


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
