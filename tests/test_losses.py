"""Losses against loops written from their equations, at extremes, and mixed over epochs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers.cases import nightly_after_first
from vidjax.core import losses
from vidjax.runs import config as config_lib

LOSSES = {
    "softmax": losses.softmax_cross_entropy,
    "smoothed": functools.partial(losses.softmax_cross_entropy, label_smoothing=0.1),
    "binary": losses.binary_focal,
    "multiclass": losses.multiclass_focal,
}


def oracle(name, logits, labels, gamma, class_mask):
    """Returns a loss [B] from its equation, in float64."""
    z = np.where(class_mask, np.asarray(logits, np.float64), -np.inf)
    label = np.arange(z.shape[1]) == labels[:, None]
    if name == "binary":
        p = 1 / (1 + np.exp(-z[:, class_mask]))
        right = np.where(label[:, class_mask], p, 1 - p)
        return -((1 - right) ** gamma * np.log(right)).sum(axis=1)
    log_p = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[:, class_mask]
    share = label[:, class_mask].astype(float)
    if name == "smoothed":
        share = 0.9 * share + 0.1 / share.shape[1]
    factor = (1 - np.exp(log_p)) ** gamma if name == "multiclass" else 1
    return -(share * factor * log_p).sum(axis=1)


def example(batch=7, columns=9, dtype="float32"):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((batch, columns))).astype(dtype)
    return logits, rng.integers(1, columns, batch).astype(np.int32)


@nightly_after_first("name, gamma", [
    ("softmax", 0.0), ("smoothed", 0.0), ("binary", 2.0), ("multiclass", 2.0),
    ("binary", 0.5), ("multiclass", 0.5),
], count=4)  # fmt: skip
def test_losses_match_their_equations_in_float64(name, gamma):
    logits, labels = example()
    loss = jax.jit(functools.partial(LOSSES[name], **({"gamma": gamma} if gamma else {})))
    for num_masked in (0, 1):  # a masked column has a huge logit
        class_mask = np.arange(logits.shape[1]) >= num_masked
        expected = oracle(name, logits, labels, gamma, class_mask)
        given = np.where(class_mask, logits, np.float32(1e4))
        np.testing.assert_allclose(loss(given, labels, class_mask=class_mask), expected, rtol=1e-5)
        with jax.enable_x64(True):
            exact = loss(given.astype(np.float64), labels, class_mask=class_mask)
            np.testing.assert_allclose(exact, expected, rtol=1e-11)


def test_polynomial_equals_log1p_on_the_unit_interval():
    x = np.linspace(0, 1, 1001, dtype=np.float32)
    np.testing.assert_allclose(jax.jit(losses._log1p)(x), np.log1p(x.astype(float)), rtol=3e-7)


@nightly_after_first("name", ["multiclass", "softmax", "smoothed", "binary"])
def test_gradients_of_losses_match_finite_differences(name):
    with jax.enable_x64(True):
        logits, labels = example(batch=3, columns=4, dtype="float64")
        loss = jax.jit(functools.partial(LOSSES[name], labels=labels, class_mask=np.arange(4) > 0))
        check_grads(loss, (jnp.asarray(logits),), order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_finite_gradients_at_extreme_logits_and_cosines(name):
    rows = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [1e4, 1e4, 1e4], [0, 90, -90]])
    logits = np.tile(rows, (3, 1)).astype(np.float32)  # each row with each label
    labels = np.repeat(np.arange(3, dtype=np.int32), 5)
    is_focal = name in ("binary", "multiclass")

    @functools.partial(jax.jit, static_argnames="gamma")
    @jax.value_and_grad
    def total(logits, **options):
        return LOSSES[name](logits, labels, **options).sum()

    for options in [{"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 2.0}] if is_focal else [{}]:
        value, gradient = total(logits, **options)
        assert np.isfinite(np.append(gradient, value)).all()
        if name != "smoothed":  # a step never decreases the logit of the label
            assert np.all(np.asarray(gradient)[np.arange(15), labels] <= 0)
    # Cosines just below, at and just above 1 and -1, with ArcFace's margin. All 7 labels are 0.
    ends = np.nextafter(np.float32(1), np.array([0, 1, 2], np.float32))
    of_label = 30 * np.concatenate([ends, -ends, [0]])
    logits = np.stack([of_label, of_label[::-1]], axis=1).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def total_with_margin(logits):
        harder = losses.angular_margin(logits, labels[:7] * 0, margin=0.5, scale=30.0)
        return LOSSES[name](harder, labels[:7] * 0).sum()

    for result in total_with_margin(logits):
        assert np.isfinite(result).all()


@nightly_after_first("name, margin", [
    ("angular", 0.5), ("cosine", 0.15), ("angular", 1.5),
], count=2)  # fmt: skip
def test_margins_match_their_equations_for_fixed_and_learned_scales(name, margin):
    rng = np.random.default_rng(2)
    cosine, labels = rng.uniform(-1, 1, (400, 6)), rng.integers(0, 6, 400).astype(np.int32)
    cosine[0], cosine[1] = 1, -1
    angle = np.arccos(cosine) + margin  # ArcFace, in float64; above pi, another formula
    arc_face = np.where(angle < np.pi, np.cos(angle), cosine - margin * np.sin(margin))
    harder = {"angular": arc_face, "cosine": cosine - margin}[name]
    harder = np.where(np.arange(6) == labels[:, None], harder, cosine)
    for scale in (30.0, jnp.where(labels % 2, 20.0, 3.0)):  # a learned scale differs between clips
        margin_fn = jax.jit(functools.partial(losses.MARGINS[name], margin=margin, scale=scale))
        factor = np.asarray(scale, np.float64).reshape(-1, 1)
        given, expected = factor * cosine, factor * harder
        with jax.enable_x64(True):
            np.testing.assert_allclose(margin_fn(given, labels), expected, atol=1e-9)
        atol = 2e-3 if name == "angular" else 1e-5
        np.testing.assert_allclose(margin_fn(given.astype("f4"), labels), expected, atol=atol)
        assert jax.eval_shape(margin_fn, given.astype("f2"), labels).dtype == np.float32
    assert losses.angular_margin(given, labels, margin=0, scale=30.0) is given


@pytest.mark.parametrize(("spec", "message"), [
    ({"margin": 0.5}, "config.loss.margin=0.5 needs a cosine classifier"),
    ({"schedule": ((float("nan"), 1),)}, "finite"),
    ({"schedule": ((3, 1), (1, 0))}, "in order"),
    ({"schedule": ((0, 1.5),)}, "between 0 and 1"),
    ({"margin_type": "round"}, f"choose from {', '.join(losses.MARGINS)}"),
    ({"classification": "hinge"}, f"choose from {', '.join(losses.CLASSIFICATION)}"),
    ({"focal": "multiclas"}, r"config\.loss\.focal=.*'multiclass'"),
])  # fmt: skip
def test_impossible_loss_specifications_are_refused(spec, message):
    whole = config_lib.default().loss.to_dict() | spec
    with pytest.raises(ValueError, match=message):
        losses.make_objective(whole, class_mask=None, steps_per_epoch=10, logit_scale=1.0)


def test_loss_with_the_option_margin_gets_plain_logits_and_the_learned_scale(monkeypatch):
    """The loss adds the margin itself. The scale is 30 at the start, and 20 after learning."""

    def with_margin(logits, labels, class_mask=None, *, logit_scale, margin):
        return logits[:, 0] + logit_scale * margin

    monkeypatch.setitem(losses.CLASSIFICATION, "with_margin", with_margin)
    spec = config_lib.default().loss.to_dict() | {"classification": "with_margin", "margin": 0.5}
    objective = losses.make_objective(spec, class_mask=None, steps_per_epoch=10, logit_scale=30.0)
    logits, labels = example()

    @jax.jit
    @jax.value_and_grad
    def total(scale):
        output: Any = losses.ModelOutput(logits[:, None], logits, logit_scale=scale[None])
        return jnp.sum(objective(output, labels, np.ones(7, bool), jnp.int32(0)))

    # The loss of each of the 7 clips is its logit 0 + 0.5 * scale.
    value, gradient = total(jnp.float32(20))
    np.testing.assert_allclose(value, logits[:, 0].sum() + 7 * 0.5 * 20, rtol=1e-6)
    np.testing.assert_allclose(gradient, 7 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(("value", "found"), [
    (jnp.mean, r"float32 \[\]"), (lambda x: x[:, :1], r"float32 \[7, 1\]"),
    (lambda x: x[:, 0] > 0, r"bool \[7\]"), (lambda x: None, "NoneType"),
])  # fmt: skip
def test_loss_that_is_not_a_float_for_each_label_is_refused(monkeypatch, value, found):
    """In the mean of two losses, a scalar would be added to the loss of each clip."""
    monkeypatch.setitem(losses.CLASSIFICATION, "own", lambda logits, labels: value(logits))
    spec = config_lib.default().loss.to_dict() | {"focal": "own", "schedule": ((0, 0.5),)}
    loss = losses.make_loss(spec, class_mask=None, steps_per_epoch=10, logit_scale=1.0)
    with pytest.raises(ValueError, match=rf"loss 'own' returns {found} .*\n.* of shape \[7\]"):
        jax.eval_shape(loss, *example(), jnp.int32(0))  # of 7 clips, at step 0
