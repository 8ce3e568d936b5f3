"""Losses against loops written from their equations, at extremes, and mixed over epochs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vidjax import losses

LOSSES = {
    "softmax": lambda logits, labels, **kw: losses.softmax_cross_entropy(logits, labels, **kw),
    "binary": losses.binary_focal,
    "multiclass": losses.multiclass_focal,
}


def oracle(name, logits, labels, gamma, class_mask):
    """The losses in float64, term by term."""
    out = []
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
        columns = [c for c in range(len(row)) if class_mask[c]]
        if name == "binary":
            loss = 0.0
            for c in columns:
                p = 1 / (1 + np.exp(-row[c]))
                loss -= (1 - p) ** gamma * np.log(p) if c == label else p**gamma * np.log(1 - p)
        else:
            p = np.exp(row[label]) / sum(np.exp(row[c]) for c in columns)
            loss = -((1 - p) ** (gamma if name == "multiclass" else 0)) * np.log(p)
        out.append(loss)
    return np.asarray(out)


def example(batch=7, columns=9, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((batch, columns))).astype(dtype)
    return logits, rng.integers(1, columns, batch).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "gamma"),
    [("softmax", 0.0), ("binary", 0.5), ("binary", 2.0), ("multiclass", 0.5), ("multiclass", 2.0)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_equation(name, gamma, masked):
    logits, labels = example()
    class_mask = np.arange(logits.shape[1]) >= masked
    options = {} if name == "softmax" else {"gamma": gamma}
    if masked:
        options["class_mask"] = class_mask
    loss = jax.jit(functools.partial(LOSSES[name], **options))
    expected = oracle(name, logits, labels, gamma, class_mask)
    np.testing.assert_allclose(loss(logits, labels), expected, rtol=1e-5)
    with jax.enable_x64(True):
        exact = loss(logits.astype(np.float64), labels)
        assert exact.dtype == np.float64
        np.testing.assert_allclose(exact, expected, rtol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(name, masked):
    with jax.enable_x64(True):
        logits, labels = example(batch=3, columns=4, dtype="float64")
        class_mask = np.arange(4) > 0 if masked else None
        loss = jax.jit(functools.partial(LOSSES[name], labels=labels, class_mask=class_mask))
        check_grads(loss, (jnp.asarray(logits),), order=1, modes=("fwd", "rev"))


def test_gamma_zero_is_cross_entropy():
    logits, labels = example()
    np.testing.assert_array_equal(
        losses.multiclass_focal(logits, labels, gamma=0),
        losses.softmax_cross_entropy(logits, labels),
    )
    one_hot = np.eye(logits.shape[1])[labels]
    binary = np.logaddexp(0, np.where(one_hot, -logits, logits)).sum(axis=1)
    np.testing.assert_allclose(losses.binary_focal(logits, labels, gamma=0), binary, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_extreme_logits_have_finite_gradients(name, gamma):
    rows = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [1e4, 1e4, 1e4], [0, 90, -90]])
    logits = jnp.asarray(np.concatenate([rows, rows, rows]), jnp.float32)
    labels = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 5)
    options = {} if name == "softmax" else {"gamma": gamma}
    loss_fn = jax.value_and_grad(lambda x: LOSSES[name](x, labels, **options).sum())
    loss, gradient = jax.jit(loss_fn)(logits)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    # The step goes towards the label, and not above it where it has nothing to gain.
    assert np.all(np.take_along_axis(np.asarray(gradient), np.asarray(labels)[:, None], 1) <= 0)


def test_focal_looks_away_from_easy_clips():
    logits = jnp.asarray([[0.0, 4.0], [0.0, 0.0]])
    labels = jnp.ones(2, jnp.int32)
    plain = losses.softmax_cross_entropy(logits, labels)
    focal = losses.multiclass_focal(logits, labels)
    assert focal[0] / plain[0] < 0.001
    np.testing.assert_allclose(focal[1] / plain[1], 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_columns_change_nothing(name):
    logits, labels = example()
    class_mask = np.arange(logits.shape[1]) > 0

    @jax.jit
    def loss(logits):
        return LOSSES[name](logits, labels, class_mask=class_mask).sum()

    changed = logits.copy()
    changed[:, 0] = 1e4
    np.testing.assert_allclose(loss(changed), loss(logits), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(logits)[:, 0], 0)


def test_schedule_mixes_and_compiles_once():
    logits, labels = example()
    schedule = ((0, 0.75), (24, 0.75), (24, 1.0), (50, 1.0), (60, 0.5))
    loss = losses.make_loss({"gamma": 2.0, "schedule": schedule}, None, 10)
    traces = []

    @jax.jit
    def loss_fn(logits, labels, step):
        traces.append(step)
        return loss(logits, labels, step)

    focal = losses.binary_focal(logits, labels)
    softmax = losses.softmax_cross_entropy(logits, labels)
    for step, weight in [(0, 0.75), (239, 0.75), (241, 1), (500, 1), (550, 0.75), (9999, 0.5)]:
        expected = weight * focal + (1 - weight) * softmax
        np.testing.assert_allclose(loss_fn(logits, labels, jnp.int32(step)), expected, rtol=1e-6)
    assert len(traces) == 1


def test_pure_losses_need_no_mixture():
    logits, labels = example()
    softmax = losses.make_loss({}, None, 10)(logits, labels, jnp.int32(0))
    np.testing.assert_array_equal(softmax, losses.softmax_cross_entropy(logits, labels))
    spec = {"focal": "multiclass", "gamma": 1.5, "schedule": [(0, 1.0)]}
    focal = losses.make_loss(spec, None, 10)(logits, labels, jnp.int32(0))
    np.testing.assert_array_equal(focal, losses.multiclass_focal(logits, labels, gamma=1.5))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"focal_weight": 1}, "no option focal_weight; known are focal, gamma, schedule"),
        ({"focal": "sigmoid"}, "known are binary, multiclass"),
        ({"gamma": -1}, "gamma"),
        ({"schedule": ((3, 1), (1, 0))}, "in order"),
        ({"schedule": ()}, "in order"),
        ({"schedule": ((0, 1.5),)}, "between 0 and 1"),
    ],
)
def test_impossible_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        losses.make_loss(spec, None, 10)
