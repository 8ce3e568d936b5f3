"""Learning rate schedules equal their formulas, and optimiser steps equal steps by hand."""

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.helpers.seen import refused
from vidjax.core import optim
from vidjax.runs import config as config_lib

SPEC = {**config_lib.default().optim.to_dict(), "learning_rate": 0.1, "warmup": 0.2}


def rates(*, total_steps, steps_per_epoch=1.0, **spec: Any):
    """Returns the learning rates of all steps of a run."""
    sizes = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    return np.asarray(jax.jit(optim.make_schedule(SPEC | spec, **sizes))(np.arange(total_steps)))


def make_optimizer(*, total_steps, **spec) -> Any:
    optimizer, _ = optim.make_optimizer(SPEC | spec, total_steps=total_steps, steps_per_epoch=1.0)
    return optimizer._replace(update=jax.jit(optimizer.update))


def test_warmup_and_cosine_decay_match_their_formula():
    # The warm-up takes 10 of 50 steps. A scale of 0 means 1/10.
    for scale, start in ((0.0, 0.01), (0.3, 0.03)):
        computed = rates(total_steps=50, final_scale=0.01, warmup_scale=scale)
        cosine = 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40))
        wanted = [*np.linspace(start, 0.1, 10, endpoint=False), *(0.1 * (0.01 + 0.99 * cosine))]
        np.testing.assert_allclose(computed, wanted, rtol=1e-5)
    for total_steps, wanted in ((100, 7), (101, 8)):  # a share of 0.07, rounded up
        assert np.argmax(rates(total_steps=total_steps, warmup=0.07)) == wanted
    for total_steps in (1, 2, 3):
        computed = rates(total_steps=total_steps, final_scale=0.0)
        assert ((computed > 0) & (computed <= np.float32(0.1))).all(), "short runs learn"


@pytest.mark.parametrize(("every", "steps_per_epoch", "warmup"), [
    (1.0, 7.8125, 0.0), (1 / 3, 49.0, 0.5), (1e9, 10.0, 0.5),
])  # fmt: skip
def test_step_decay_counts_epochs_from_the_start_of_the_run(every, steps_per_epoch, warmup):
    options: Any = {"total_steps": 60, "steps_per_epoch": steps_per_epoch, "decay": "steps"}
    options |= {"decay_factor": 0.7, "decay_every_epochs": every, "final_scale": 1.0}
    # The rate falls every `width` steps, in exact arithmetic.
    width = Fraction(every).limit_denominator(1000) * Fraction(steps_per_epoch)
    expected = np.array([0.1 * 0.7 ** (step // width) for step in range(60)])
    # Over 30 steps, the factor rises from 1/30 to 1.
    factors = np.minimum(1, (1 + 29 * np.arange(60) / 30) / 30) if warmup else 1
    np.testing.assert_allclose(rates(warmup=warmup, **options), expected * factors, rtol=1e-5)


def test_piecewise_decay_jumps_and_interpolates_between_points():
    points = ((0, 0.5), (2, 0.5), (2, 1.0), (4, 0.2))  # (epoch, factor)
    epochs = (np.arange(60) + 0.5) / 10  # at the middle of each step
    factors = np.interp(epochs, [2, 4], [1.0, 0.2])
    factors[epochs < 2] = 0.5
    computed = rates(total_steps=60, steps_per_epoch=10, decay="piecewise", points=points, warmup=0)
    np.testing.assert_allclose(computed, 0.1 * factors, rtol=1e-5)


def test_jump_is_at_the_first_step_of_its_epoch():
    # Compiled programs multiply by 1 / 61, so that step 183 would be slightly before epoch 3.
    pairs = [*itertools.product((3.0, 10.0, 32.0), (10.0, 61.0, 3.3, 7.8125, 109.0))]
    firsts = [math.ceil(epoch * Fraction(str(steps))) for epoch, steps in pairs]

    @jax.jit
    def compute(steps):
        jumps = [optim.make_piecewise([(epoch, 0.0), (epoch, 1.0)]) for epoch, _ in pairs]
        return [jump(row / size) for jump, row, (_, size) in zip(jumps, steps, pairs, strict=True)]

    values = compute(np.array([[first - 1, first] for first in firsts], np.int32))
    np.testing.assert_array_equal(values, [[0.0, 1.0]] * len(pairs))


@pytest.mark.parametrize("decay_all", [False, True])
def test_sgd_steps_match_hand_computed_updates(decay_all):
    """The gradient is clipped to the norm 1. Then the decay is added, and then the momentum."""
    spec = {"name": "sgd", "momentum": 0.9, "decay": "constant", "warmup": 0.0, "clip_norm": 1.0}
    optimizer = make_optimizer(total_steps=9, weight_decay=0.5, decay_all=decay_all, **spec)
    params: Any = {"kernel": np.full((2, 2), 3, "f4"), "bias": np.full(2, -5, "f4")}
    params["slope"] = np.float32(7)
    gradient = jax.tree.map(lambda x: np.full_like(x, 2), params)  # 7 numbers
    state, momentum, wanted = optimizer.init(params), dict.fromkeys(params, 0), dict(params)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for name in params:
            decay = 0.5 * wanted[name] * (decay_all or name == "kernel")
            momentum[name] = 0.9 * momentum[name] + 7**-0.5 + decay
            wanted[name] = wanted[name] - 0.1 * momentum[name]
            np.testing.assert_allclose(params[name], wanted[name], rtol=1e-6)


def test_total_decay_is_spread_over_a_run_and_shrinks_only_matrices():
    """With gradients of 0, matrices shrink to exp(-total_decay), and biases do not change."""
    optimizer = make_optimizer(total_steps=300, name="adam", learning_rate=1e-3, total_decay=0.7)
    params: Any = {"kernel": np.full((1, 1), 2, "f4"), "bias": np.full(1, 2, "f4")}

    def update(carry, _):
        updates, state = optimizer.update(jax.tree.map(np.zeros_like, params), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    scan = functools.partial(jax.lax.scan, update, length=300)
    params = jax.jit(scan)((params, optimizer.init(params)))[0][0]
    np.testing.assert_allclose(params["kernel"], [[2 * math.exp(-0.7)]], rtol=2e-2)
    np.testing.assert_array_equal(params["bias"], [2.0])


def test_optimizer_restart_equals_a_fresh_optimizer():
    options = {"total_steps": 6, "name": "adam", "decay": "constant", "warmup": 0.0}
    plain = make_optimizer(**options)
    restarted = make_optimizer(**options, restart_epoch=3.0)  # an epoch has one step
    params = {"kernel": np.full((2, 3), 2, "f4")}
    state, plain_state = restarted.init(params), plain.init(params)
    for step, grad in enumerate(np.random.default_rng(0).normal(size=(6, 2, 3))):
        grads = {"kernel": np.float32(grad)}
        plain_state = plain.init(params) if step == 3 else plain_state
        updates, state = restarted.update(grads, state, params)
        wanted, plain_state = plain.update(grads, plain_state, params)
        np.testing.assert_allclose(updates["kernel"], wanted["kernel"], rtol=1e-6)


@pytest.mark.parametrize(("spec", "message"), [
    ({"name": "lion"}, "choose from adam, sgd"),
    ({"decay": "linear"}, "choose from constant, cosine, piecewise, steps"),
    *(({"decay": "piecewise", "points": points}, r"config\.optim\.points.* pairs .*in order")
      for points in ((), ((0, 1, 2),), ((3, 1), (1, 0)), ((0, math.inf),))),
    ({"decay": "piecewise", "points": ((0, 1), (3, -0.5))}, "values of 0 or more, not -0.5"),
    # float32 cannot hold the sum of 9 learning rates of 1e38.
    ({"learning_rate": 1e38, "total_decay": 0.1}, r"--config\.optim\.total_decay=0"),
    ({"name": "adamw"}, r"'adamw'(.|\n)*scale_by_adam\(\)"),
])  # fmt: skip
def test_impossible_optimiser_specifications_are_refused(spec, message, monkeypatch):
    # A user adds adamw. It is refused, because it applies the learning rate itself.
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", optax.adamw)
    with pytest.raises(ValueError, match=message):
        make_optimizer(total_steps=9, **spec)


def test_accumulated_gradients_equal_their_mean():
    """Schedules, decay and restart count updates."""
    spec: Any = {"weight_decay": 0.1, "total_decay": 0.5, "clip_norm": 0.3, "restart_epoch": 2.0}
    draw = np.random.default_rng(0).normal
    params, *grads = ({"w": np.float32(draw(size=(3, 2))), "b": np.float32(draw(size=2))}
                      for _ in range(25))  # fmt: skip

    def run(steps, grads, **more):
        sizes = {"total_steps": steps, "steps_per_epoch": steps / 3}
        tx, schedule = optim.make_optimizer(SPEC | spec | more, **sizes)

        def update(carry, grad):
            now, state = carry
            updates, state = tx.update(grad, state, now)
            now = optax.apply_updates(now, updates)
            return (now, state), now

        scan = jax.jit(functools.partial(jax.lax.scan, update))
        return scan((params, tx.init(params)), grads)[1], jax.jit(schedule)(np.arange(steps))

    stacked = jax.tree.map(lambda *x: np.stack(x), *grads)
    means = jax.tree.map(lambda x: x.reshape(6, 4, *x.shape[1:]).mean(axis=1), stacked)
    fine, rates_of_steps = run(24, stacked, accumulate=4)
    coarse, rates_of_updates = run(6, means)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, jax.tree.map(lambda x: x[3::4], fine), coarse)
    np.testing.assert_array_equal(rates_of_steps, np.repeat(rates_of_updates, 4))


def test_frozen_parameters_stay_and_others_are_updated_as_without_them():
    spec: Any = {"decay_all": True, "weight_decay": 0.1, "total_decay": 0.5, "clip_norm": 0.1}
    params: Any = {"net": {"w": np.ones((2, 2)), "b": np.ones(2)}, "head": {"w": np.ones((2, 2))}}
    grads = jax.tree.map(lambda x: x * 3.0, params)

    def step(params: Any, grads: Any, **more: Any) -> Any:
        tx = make_optimizer(total_steps=5, **spec, **more)
        return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])

    frozen = step(params, grads, freeze="^net/")
    np.testing.assert_equal(frozen["net"], params["net"])
    alone = step({"head": params["head"]}, {"head": grads["head"]})
    np.testing.assert_array_equal(frozen["head"]["w"], alone["head"]["w"])
    for pattern, wanted in (("x", "no parameter"), (".", "all parameters"), ("(", "correct the")):
        words = [wanted, *(["head/w, net/b, net/w"] if pattern != "(" else [])]
        refused(lambda pattern=pattern: step(params, grads, freeze=pattern), *words)
    told = optim.describe_frozen(params, "^net/")
    assert "6 of 10 parameters" in told and "net/b, net/w" in told
