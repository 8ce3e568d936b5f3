"""Means of log-probabilities of runs: those of the equations, exact near certainty."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from vidjax import logit_ops
from vidjax.steps.mean_scores import blend, log_rest

log_softmax = jax.jit(logit_ops.log_softmax)


def made_up(num_runs=3, num_clips=20, num_classes=6, seed=0, spread=2.0, dtype: Any = np.float32):
    """Returns logarithms [R, B, C] of identities, beside somebody new."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(num_runs, num_clips, 1 + num_classes))
    logits = jnp.asarray(logits, dtype)
    return np.array(log_softmax(logits, jnp.ones(1 + num_classes, bool)))[:, :, 1:]


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames="logarithms")
def joined(scores, weights, knows, *, logarithms=True):
    voices = list(zip(weights, knows, strict=True))
    (found,) = blend([[one] for one in scores], voices, logarithms=logarithms)
    return found


def oracle(scores, weights, knows):
    """The mean in float64, one clip and one run after another."""
    result = np.full(scores.shape[1:], -np.inf)
    for clip in range(scores.shape[1]):
        found: dict[int, Any] = {}
        for run, logs in enumerate(scores[:, clip].astype(np.float64)):
            if np.isfinite(logs).any():
                found[run] = np.concatenate([[1 - np.exp(logs).sum()], np.exp(logs)])
        if not found:
            continue
        new = [np.log(p[0]) for run, p in found.items() if knows[run]]
        for run, p in found.items():
            if not knows[run]:
                share = np.exp(np.mean(new)) if new else 0.0
                p[1:] *= 1 - share
                p[0] = share
        total = sum(weights[run] for run in found)
        with np.errstate(divide="ignore"):
            parts = [weights[run] / total * np.log(p) for run, p in found.items()]
        mean = np.sum(parts, axis=0)
        result[clip] = (mean - special.logsumexp(mean))[1:]
    return result


@pytest.mark.parametrize("knows", [(True,) * 3, (True, False, True), (False,) * 3])
def test_the_mean_is_that_of_the_equations(knows):
    with jax.enable_x64(True):
        scores = made_up(dtype=np.float64)
        for run in np.flatnonzero(~np.array(knows)):
            scores[run] -= special.logsumexp(scores[run], axis=1, keepdims=True)
        scores[0, 3] = scores[:, 5] = -np.inf  # a clip that one run cannot score, or none
        weights = (0.5, 2.0, 1.0)
        found = joined(scores, weights, knows)
    np.testing.assert_allclose(found, oracle(scores, weights, knows), atol=1e-9)


def test_runs_of_weight_0_do_not_count():
    scores = made_up()
    some = joined(scores[[0, 2]], (1.0, 3.0), (True, True))
    scores[1] = np.nan
    np.testing.assert_array_equal(joined(scores, (1.0, 0.0, 3.0), (True,) * 3), some)


@pytest.mark.parametrize(("logarithms", "knows"), [(True, True), (True, False), (False, True)])
def test_a_clip_of_which_a_run_makes_nan_is_nan(logarithms, knows):
    scores = made_up()
    scores[1, 4] = np.nan
    found = joined(scores, (1.0,) * 3, (True, knows, True), logarithms=logarithms)
    assert np.isnan(found[4]).all()
    assert np.isfinite(np.delete(found, 4, axis=0)).all()


@pytest.mark.parametrize("logarithms", [True, False])
def test_equal_runs_are_one_run(logarithms):
    for spread in (1.0, 5.0, 20.0):
        one = made_up(num_runs=1, spread=spread)
        three = np.repeat(one, 3, axis=0)
        found = joined(three, (1.0, 2.0, 0.5), (True,) * 3, logarithms=logarithms)
        np.testing.assert_allclose(found, one[0], rtol=2e-5, atol=1e-30)


def test_certain_clips_do_not_tie():
    """Leads of 20 to 80 nats keep their order and their digits."""
    leads = np.linspace(20, 80, 40)
    logits = np.zeros((2, len(leads), 5), np.float32)
    logits[:, :, 2] = leads
    scores = np.asarray(log_softmax(jnp.asarray(logits), jnp.ones(5, bool)))[:, :, 1:]
    found = joined(scores, (1.0, 1.0), (True, True))[:, 1]
    np.testing.assert_allclose(found, -4 * np.exp(-leads), rtol=1e-4)
    assert (np.diff(found) > 0).all()


def test_the_rest_is_what_identities_leave():
    logits = jnp.asarray([[0.0, 30.0, 1.0, -2.0], [8.0, 1.0, 2.0, 3.0]], jnp.float32)
    scores = log_softmax(logits, jnp.ones(4, bool))
    rest = jax.jit(log_rest)
    np.testing.assert_allclose(rest(scores[:, 1:]), scores[:, 0], rtol=1e-5)
    sure = log_softmax(logits[:, 1:], jnp.ones(3, bool))  # nothing is left
    assert (np.asarray(rest(sure)) < np.log(1e-6)).all()
