"""Means of log-probabilities of runs: those of the equations, exact near certainty, fitted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from vidjax.modes import join_fit
from vidjax.steps.pooling import Pooling, blend, log_rest
from vidjax.system import log_softmax

LOGS = Pooling(logarithms=True)


def made_up(num_runs=3, num_clips=20, num_classes=6, seed=0, spread=2.0, dtype: Any = np.float32):
    """Returns logarithms [R, B, C] of identities, beside somebody new."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(num_runs, num_clips, 1 + num_classes))
    logits = jnp.asarray(logits, dtype)
    return np.array(log_softmax(logits, jnp.ones(1 + num_classes, bool)))[:, :, 1:]


def joined(scores, weights, knows, pooling):
    voices = list(zip(weights, knows, strict=True))
    (found,) = blend([[jnp.asarray(one)] for one in scores], voices, pooling)
    return np.asarray(found)


def oracle(scores, weights, knows, scale=1.0, offset=0.0):
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
        mean = scale * np.sum(parts, axis=0)
        mean[0] += offset
        result[clip] = (mean - special.logsumexp(mean))[1:]
    return result


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.4, 1.5), (3.0, -2.0)])
@pytest.mark.parametrize("knows", [(True,) * 3, (True, False, True), (False,) * 3])
def test_the_mean_is_that_of_the_equations(scale, offset, knows):
    with jax.enable_x64(True):
        scores = made_up(dtype=np.float64)
        for run in np.flatnonzero(~np.array(knows)):
            scores[run] -= special.logsumexp(scores[run], axis=1, keepdims=True)
        scores[0, 3] = scores[:, 5] = -np.inf  # a clip that one run cannot score, or none
        weights = (0.5, 2.0, 1.0)
        found = joined(scores, weights, knows, Pooling(True, scale, offset))
    np.testing.assert_allclose(found, oracle(scores, weights, knows, scale, offset), atol=1e-9)


def test_runs_of_weight_0_do_not_count():
    scores = made_up()
    some = joined(scores[[0, 2]], (1.0, 3.0), (True, True), LOGS)
    scores[1] = np.nan
    np.testing.assert_array_equal(joined(scores, (1.0, 0.0, 3.0), (True,) * 3, LOGS), some)


@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("pooling", [LOGS, Pooling()], ids=["logarithms", "probabilities"])
def test_equal_runs_are_one_run(pooling, spread):
    one = made_up(num_runs=1, spread=spread)
    found = joined(np.repeat(one, 3, axis=0), (1.0, 2.0, 0.5), (True,) * 3, pooling)
    np.testing.assert_allclose(found, one[0], rtol=2e-5, atol=1e-30)


def test_certain_clips_do_not_tie():
    """Leads of 20 to 80 nats keep their order and their digits."""
    leads = np.linspace(20, 80, 40)
    logits = np.zeros((2, len(leads), 5), np.float32)
    logits[:, :, 2] = leads
    scores = np.asarray(log_softmax(jnp.asarray(logits), jnp.ones(5, bool)))[:, :, 1:]
    found = joined(scores, (1.0, 1.0), (True, True), LOGS)[:, 1]
    np.testing.assert_allclose(found, -4 * np.exp(-leads), rtol=1e-4)
    assert (np.diff(found) > 0).all()


def test_the_rest_is_what_identities_leave():
    logits = jnp.asarray([[0.0, 30.0, 1.0, -2.0], [8.0, 1.0, 2.0, 3.0]], jnp.float32)
    scores = log_softmax(logits, jnp.ones(4, bool))
    np.testing.assert_allclose(log_rest(scores[:, 1:]), scores[:, 0], rtol=1e-5)
    sure = log_softmax(logits[:, 1:], jnp.ones(3, bool))  # nothing is left
    assert (np.asarray(log_rest(sure)) < np.log(1e-6)).all()


def drawn(slopes, offset, num_clips=4000, seed=0):
    """Returns logarithms of two runs, and answers drawn from their mean at slopes and offset."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(2, num_clips, 7))
    logs = logits - np.asarray(special.logsumexp(logits, axis=2, keepdims=True))
    mean = np.einsum("r,rnk->nk", np.array(slopes), logs)
    mean[:, 0] += offset
    odds = np.exp(mean - special.logsumexp(mean, axis=1, keepdims=True))
    answer = (rng.random((num_clips, 1)) > np.cumsum(odds, axis=1)).sum(axis=1)
    return logs, np.ones((2, num_clips), bool), np.minimum(answer, 6)


@pytest.mark.parametrize(("slopes", "offset"), [((0.6, 0.2), 1.0), ((0.1, 1.5), -0.5)])
def test_a_calibration_finds_slopes_and_offset(slopes, offset):
    weights, pooling = join_fit.fit_pooling(*drawn(slopes, offset), offset=None)
    assert sum(weights) == pytest.approx(1)
    np.testing.assert_allclose(np.array(weights) * pooling.scale, slopes, atol=0.06)
    assert pooling.offset == pytest.approx(offset, abs=0.15)
    assert pooling.logarithms


def test_an_offset_that_is_given_stays():
    """Without strangers the slopes are those among the identities, whatever else is probable."""
    logs, scored, answer = drawn((0.6, 0.2), 1.0)
    known = answer > 0
    logs[:, :, 0] += 5
    parts = logs[:, known], scored[:, known], answer[known]
    weights, pooling = join_fit.fit_pooling(*parts, offset=0.25)
    assert pooling.offset == 0.25
    np.testing.assert_allclose(np.array(weights) * pooling.scale, (0.6, 0.2), atol=0.06)


def test_the_fit_looks_at_the_answer_whatever_its_rank():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 8, 301)), jnp.float32)
    scores = log_softmax(logits, jnp.ones(301, bool))[:, :, 1:]
    labels = np.array([0, *(1 + np.asarray(scores.mean(axis=0)).argmin(axis=1)[1:])])
    knows = jnp.ones(2, bool)
    logs, scored, answer = join_fit._candidates(scores, knows, jnp.asarray(labels))
    assert logs.shape == (2, 8, join_fit.MOST_IDENTITIES + 2) and np.asarray(scored).all()
    np.testing.assert_array_equal(answer, [0, *[1] * 7])
    at = np.take_along_axis(np.asarray(logs), np.asarray(answer)[None, :, None], axis=2)[:, :, 0]
    wanted = np.asarray(log_softmax(logits, jnp.ones(301, bool)))[:, np.arange(8), labels]
    np.testing.assert_allclose(at, wanted, rtol=1e-4)
