"""Schedules against their formula, optimisers against one hand-made step."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidjax.core import optim
from vidjax.runs import config as config_lib

SPEC = {"learning_rate": 0.1, "warmup": 0.2}
DEFAULTS = config_lib.default().optim.to_dict()


def make_schedule(*, total_steps, steps_per_epoch=1.0, **spec):
    whole = {**DEFAULTS, **spec}
    return optim.make_schedule(whole, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


def make_optimizer(spec, *, total_steps):
    return optim.make_optimizer({**DEFAULTS, **spec}, total_steps=total_steps, steps_per_epoch=1.0)


@pytest.mark.parametrize(("scale", "start"), [(0.0, 0.01), (0.3, 0.03)])
def test_warmup_cosine_by_its_formula(scale, start):
    options: Any = {"total_steps": 50, "warmup": 0.2, "final_scale": 0.01, "warmup_scale": scale}
    schedule = make_schedule(learning_rate=0.1, **options)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(41) / 40))
    wanted = [*np.linspace(start, 0.1, 10, endpoint=False), *(0.1 * (0.01 + 0.99 * cosine))]
    np.testing.assert_allclose(schedule(np.arange(51)), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("every", "steps_per_epoch"), [(1.0, 7.8125), (2, 5), (0.1, 30), (1 / 3, 49.0)]
)
def test_steps_decay_from_the_start_of_the_run(every, steps_per_epoch):
    total = 60
    schedule = make_schedule(
        learning_rate=0.01,
        total_steps=total,
        warmup=0.0,
        final_scale=1.0,
        decay="steps",
        decay_factor=0.7,
        decay_every_epochs=every,
        steps_per_epoch=steps_per_epoch,
    )
    # Exact arithmetic: the epoch of a step is the step over the steps of an epoch.
    width = Fraction(every).limit_denominator(1000) * Fraction(steps_per_epoch)
    expected = [0.01 * 0.7 ** (step // width) for step in range(total)]
    np.testing.assert_allclose(schedule(np.arange(total)), expected, rtol=1e-5)
    np.testing.assert_allclose([jax.jit(schedule)(step) for step in (0, 59)], expected[::59], 1e-5)


def test_warmup_goes_before_the_other_decays_too():
    options: Any = {"total_steps": 20, "warmup": 0.5, "final_scale": 0.01}
    constant = make_schedule(learning_rate=0.1, decay="constant", **options)
    np.testing.assert_allclose(constant(np.arange(10)), 0.01 + 0.009 * np.arange(10), rtol=1e-5)
    np.testing.assert_allclose(constant(np.arange(10, 20)), 0.1, rtol=1e-6)
    options |= {"decay_factor": 0.5, "decay_every_epochs": 2, "steps_per_epoch": 4}
    steps = make_schedule(learning_rate=0.1, decay="steps", **options)
    halved = constant(np.arange(20)) * 0.5 ** (np.arange(20) // 8)
    np.testing.assert_allclose(steps(np.arange(20)), halved, rtol=1e-5)


def test_factors_by_the_epoch_jump_and_run_in_lines():
    points = ((0, 0.5), (2, 0.5), (2, 1.0), (4, 0.2))
    options: Any = {"decay": "piecewise", "points": points, "warmup": 0.0}
    schedule = make_schedule(learning_rate=0.1, total_steps=60, steps_per_epoch=10, **options)
    epochs = (np.arange(60) + 0.5) / 10
    line = np.where(epochs < 4, 1 - 0.4 * (epochs - 2), 0.2)
    np.testing.assert_allclose(
        schedule(np.arange(60)), 0.1 * np.where(epochs < 2, 0.5, line), rtol=1e-5
    )


@pytest.mark.parametrize("decay", ["cosine", "steps", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_short_runs_have_finite_positive_rates(total_steps, decay):
    schedule = make_schedule(
        learning_rate=0.1,
        total_steps=total_steps,
        warmup=0.1,
        final_scale=0.0,
        decay=decay,
        steps_per_epoch=0.5,
    )
    rates = [float(np.asarray(schedule(step))) for step in range(total_steps)]
    assert all(0 < rate <= np.float32(0.1) for rate in rates), rates


@pytest.mark.parametrize(
    ("options", "params", "grads", "wanted"),
    [
        ({}, [[2.0]], [[3.0]], [[-0.3]]),
        ({"clip_norm": 1.0}, [0.0, 0.0], [3.0, 4.0], [-0.06, -0.08]),
        # The decay of weights is not clipped.
        ({"clip_norm": 1.0, "weight_decay": 0.5}, [[2.0, 2.0]], [[3.0, 4.0]], [[-0.16, -0.18]]),
    ],
)
def test_sgd_by_hand(options, params, grads, wanted):
    spec = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0, "warmup": 0.0, **options}
    tx, _ = make_optimizer(spec, total_steps=10)
    params, grads = ({"w": jnp.asarray(x)} for x in (params, grads))
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "rate", "steps"),
    [pytest.param("adam", 1e-3, 300, marks=pytest.mark.slow), ("sgd", 1e-2, 50)],
)
def test_decay_is_that_of_the_whole_run(name, rate, steps):
    """Without gradients matrices shrink by exp(-total_decay), and nothing else changes."""
    spec = {**SPEC, "name": name, "learning_rate": rate, "total_decay": 0.7}
    tx, _ = make_optimizer(spec, total_steps=steps)
    params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    final: Any = params
    for _ in range(steps):
        final, state = step(final, state)
    np.testing.assert_allclose(final["kernel"], [[2 * math.exp(-0.7)]], rtol=2e-2)
    np.testing.assert_array_equal(final["bias"], [2.0])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_weight_decay_is_part_of_the_gradient_of_matrices(name):
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    grads = jax.tree.map(lambda p: 0.3 * jnp.ones_like(p), params)
    penalised = {**grads, "kernel": grads["kernel"] + 0.05 * params["kernel"]}
    plain, _ = make_optimizer({**SPEC, "name": name}, total_steps=9)
    decayed, _ = make_optimizer({**SPEC, "name": name, "weight_decay": 0.05}, total_steps=9)
    expected = plain.update(penalised, plain.init(params), params)[0]
    updates = decayed.update(grads, decayed.init(params), params)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_optimizer_that_restarts_is_two_in_a_row(name):
    options = {**SPEC, "name": name, "decay": "constant", "warmup": 0.0}
    (plain, _), (restarted, _) = (
        make_optimizer({**options, "restart_epoch": epoch}, total_steps=9) for epoch in (0.0, 4.0)
    )
    params = {"kernel": jnp.full((2, 3), 2.0)}
    grads = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float32)
    state, other = restarted.init(params), plain.init(params)
    for step, grad in enumerate(grads):
        if step == 4:
            other = plain.init(params)
        updates, state = jax.jit(restarted.update)({"kernel": grad}, state, params)
        wanted, other = plain.update({"kernel": grad}, other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, wanted)


def test_nothing_to_train_is_allowed():
    tx, _ = make_optimizer({**SPEC, "weight_decay": 0.1}, total_steps=3)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_piecewise_is_linear_between_its_points_and_constant_outside():
    value = optim.make_piecewise(((0, 0.75), (24, 0.75), (24, 1.0), (50, 1), (60, 0.5)))
    expected = {-1: 0.75, 0: 0.75, 23.5: 0.75, 24: 1.0, 50: 1.0, 55: 0.75, 60: 0.5, 999: 0.5}
    epochs = np.asarray(list(expected), np.float32)
    np.testing.assert_allclose(jax.jit(value)(epochs), list(expected.values()), rtol=1e-6)
    assert float(optim.make_piecewise([(3, 0.5)])(jnp.int32(1))) == 0.5
    jump = optim.make_piecewise(((0, 0.25), (8, 0.75), (8, 0.5)))
    np.testing.assert_array_equal(jump(jnp.array([-1.0, 4, 8, 9])), [0.25, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("points", [(), (1, 2), ((0, 1, 2),), ((3, 1), (1, 0)), ((0, math.inf),)])
def test_impossible_points_are_refused(points):
    with pytest.raises(ValueError, match=r"^mirrors must be .* in order"):
        optim.make_piecewise(points, name="mirrors")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "lion"}, "choose from adam, sgd"),
        ({"decay": "linear"}, "choose from constant, cosine, piecewise, steps"),
        ({"decay": "piecewise", "points": ((0, 1), (-1, 1))}, r"config\.optim\.points"),
    ],
)
def test_impossible_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer({**SPEC, **spec}, total_steps=1)


def test_an_optimizer_of_ones_own_is_one_function_and_one_line(monkeypatch):
    def signs(*, momentum):
        return optax.stateless(
            lambda grads, _: jax.tree.map(lambda x: jnp.sign(x) * momentum, grads)
        )

    monkeypatch.setitem(optim.OPTIMIZERS, "signs", signs)
    tx, schedule = make_optimizer({"name": "signs", "momentum": 0.5}, total_steps=10)
    params = {"w": jnp.ones((2, 2))}
    updates, _ = tx.update({"w": jnp.full((2, 2), -3.0)}, tx.init(params), params)
    np.testing.assert_allclose(
        np.asarray(jax.tree.leaves(updates)[0]), 0.5 * schedule(0), rtol=1e-6
    )
