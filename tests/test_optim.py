"""Schedules against their formula, optimisers against one hand-made step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidjax import optim

SPEC = {
    "name": "adam",
    "learning_rate": 0.1,
    "warmup": 0.2,
    "final_scale": 0.01,
    "total_decay": 0.0,
    "momentum": 0.9,
    "clip_norm": 0.0,
}


def test_warmup_cosine_by_its_formula():
    schedule = optim.make_schedule(0.1, total_steps=50, warmup=0.2, final_scale=0.01)
    for step in range(51):
        if step < 10:
            wanted = 0.01 + (0.1 - 0.01) * step / 10
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
            wanted = 0.1 * (0.01 + 0.99 * cosine)
        assert float(np.asarray(schedule(step))) == pytest.approx(wanted, rel=1e-5), step


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_short_runs_have_finite_positive_rates(total_steps):
    schedule = optim.make_schedule(0.1, total_steps=total_steps, warmup=0.1, final_scale=0.0)
    rates = [float(np.asarray(schedule(step))) for step in range(total_steps)]
    assert all(0 < rate <= np.float32(0.1) for rate in rates), rates


def test_sgd_by_hand():
    spec = {**SPEC, "name": "sgd", "momentum": 0.0, "warmup": 0.0}
    tx, _ = optim.make_optimizer(spec, total_steps=10)
    params, grads = {"w": jnp.full((1, 1), 2.0)}, {"w": jnp.full((1, 1), 3.0)}
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["w"], [[-0.1 * 3]], rtol=1e-6)


@pytest.mark.parametrize(("name", "rate", "steps"), [("adam", 1e-3, 300), ("sgd", 1e-2, 50)])
def test_decay_is_that_of_the_whole_run(name, rate, steps):
    """Without gradients matrices shrink by exp(-total_decay), and nothing else changes."""
    spec = {**SPEC, "name": name, "learning_rate": rate, "total_decay": 0.7}
    tx, _ = optim.make_optimizer(spec, total_steps=steps)
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


def test_gradients_are_clipped_by_their_norm():
    spec = {**SPEC, "name": "sgd", "momentum": 0.0, "warmup": 0.0, "clip_norm": 1.0}
    tx, _ = optim.make_optimizer(spec, total_steps=10)
    params = {"w": jnp.zeros(2)}
    updates: Any = tx.update({"w": jnp.asarray([3.0, 4.0])}, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["w"], [-0.06, -0.08], rtol=1e-6)


def test_nothing_to_train_is_allowed():
    tx, _ = optim.make_optimizer(SPEC, total_steps=3)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_unknown_optimiser():
    with pytest.raises(ValueError, match="known are adam, sgd"):
        optim.make_optimizer({**SPEC, "name": "lion"}, total_steps=1)
