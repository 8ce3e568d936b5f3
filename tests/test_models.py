"""Parts of models against their equations, and what dropout may do."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from tests.helpers.made_frames import make_frames
from vidjax.core.batch import ClipInfo
from vidjax.models import identifier, layers
from vidjax.models.layers import Dropout, Linear, NetVLAD, drop_modalities
from vidjax.models.multimodal import SigmoidGate


def netvlad_oracle(params, features, mask, reduce, norms):
    """Section 5.2 of the paper, BatchNorm by the statistics of the real frames."""
    z = features @ params["assignment"]["kernel"] + params["assignment"].get("bias", 0)
    if "batch" in norms:
        z = (z - z[mask].mean(axis=0)) / np.sqrt(z[mask].var(axis=0) + 1e-5)
        z = z * params["norm"]["scale"] + params["norm"]["bias"]
    share = np.exp(z)
    share = share / share.sum(axis=-1, keepdims=True) * mask[..., None]
    apart = features[:, :, None] - params["centers"]  # [B, T, K, D]
    out = (share[..., None] * apart).sum(axis=1)
    if reduce == "mean":
        out = out / np.maximum(mask.sum(axis=1), 1)[:, None, None]
    if "l2" in norms:
        for axis in (2, (1, 2)):
            length = np.sqrt((out**2).sum(axis=axis, keepdims=True))
            out = out / np.where(length > 0, length, 1)
    return out


@pytest.mark.parametrize(
    ("reduce", "norms"),
    quick_first(
        [("sum", ("batch",)), ("mean", ("batch",)), ("sum", ("l2",))],
        mark=pytest.mark.nightly,
    ),
)
def test_netvlad_matches_the_equations_of_both_papers(reduce, norms):
    """Arandjelovic et al. use L2 norms. The iQIYI-VID paper uses BatchNorm."""
    with jax.enable_x64(True):
        frames = make_frames([4, 2, 0, 1], max_frames=4, dtype="float64")
        model = NetVLAD(3, reduce=reduce, norms=norms, dtype=jnp.dtype("float64"))
        variables = made.init(model, frames.features, frames.mask, train=False)
        params = made.randomised(variables["params"])

        @jax.jit
        def forward(params):
            options = {"train": True, "mutable": ["batch_stats"]}
            given = (frames.features, frames.mask)
            return model.apply({**variables, "params": params}, *given, **options)[0]

        assert ("bias" in params["assignment"]) == ("norm" not in params) == ("batch" not in norms)
        pooled = forward(params)
        expected = netvlad_oracle(params, frames.features, frames.mask, reduce, norms)
        np.testing.assert_allclose(pooled, expected, atol=1e-6)
        np.testing.assert_array_equal(pooled[2], 0)


def test_modality_dropout_always_keeps_a_modality():
    present = np.random.default_rng(0).random((4000, 4)) < 0.7
    kept = np.asarray(drop_modalities(jax.random.key(1), jnp.asarray(present), 0.999))
    assert not np.any(kept & ~present)
    np.testing.assert_array_equal(kept.any(axis=1), present.any(axis=1))
    kept = np.asarray(drop_modalities(jax.random.key(2), jnp.ones((20_000, 3), bool), 0.3))
    # Lost with probability .3, save for one in three of the .027 where all would go.
    np.testing.assert_allclose(kept.mean(axis=0), 0.7 + 0.027 / 3, atol=0.015)


def test_knn_scores_are_the_best_cosine_of_every_identity():
    vectors = np.random.default_rng(0).standard_normal((14, 6)).astype(np.float32)
    frames = make_frames([1] * 10, max_frames=1)._replace(features=vectors[:10, None])
    frames.mask[7] = False
    labels = np.array([1, 1, 2, 4, 4, 0, 2, 3, 1, 3], np.int32)  # 3: only rows 7 and padded 9
    clips = ClipInfo(np.arange(10, dtype=np.int32)[::-1], np.arange(10) < 9, labels)
    spec = {"name": "knn", "logit_scale": 16.0}
    model = identifier.make_identifier(spec, modalities={"face": 6}, num_classes=5, num_clips=12)
    blank = made.init_identifier(model, {"face": frames}, clips)
    assert "params" not in blank
    # No clip is known: the cosine is -2.
    np.testing.assert_array_equal(made.eval_logits(model, blank, {"face": frames}, clips), 16 * -2)
    logits, memory = made.train_logits(model, blank, {"face": frames}, clips)
    np.testing.assert_array_equal(logits, np.zeros((10, 5)))
    queries = make_frames([1, 1, 1, 0], max_frames=1)._replace(features=vectors[10:, None])
    four = jax.tree.map(lambda x: x[:4], clips)
    scores = made.eval_logits(model, memory, {"face": queries}, four)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, row in zip(unit[10:13], scores[:3], strict=True):
        cosines = np.where(np.isin(np.arange(10), (7, 9)), -2, unit[:10] @ query)
        best = [cosines[labels == column].max() for column in range(5)]
        np.testing.assert_allclose(row, 16 * np.array(best), atol=1e-5)
    np.testing.assert_array_equal(scores[3], 16 * -2)


def test_gate_matches_its_equation_and_keeps_missing_vectors_at_zero():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 4, 5))
        x[1, 2] = 0
        model = SigmoidGate(dtype=jnp.dtype("float64"))
        params = made.init(model, x)["params"]
        forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
        np.testing.assert_array_equal(forward(params, x), x / 2)
        params = made.randomised(params)
        scores = (x * params["kernel"]).sum(axis=-1) + params["bias"]
        gated = forward(params, x)
        np.testing.assert_allclose(gated, x / (1 + np.exp(-scores))[..., None], atol=1e-6)


# Linear layers: products in one dtype, sums in float32 in both directions, and their dropout.

DRAW = np.random.default_rng(0).normal
# An input, a kernel, and weights of the output.
OPERANDS = [DRAW(size=shape).astype("f4") for shape in ((40, 30), (30, 50), (40, 50))]


def apply(module, params, x, **kwargs) -> Any:
    return module.apply(params, x, **kwargs)


def drop_out(rate, shape):
    rngs = {"dropout": jax.random.key(0)}
    return np.asarray(apply(Dropout(rate), {}, jnp.ones(shape), deterministic=False, rngs=rngs))


def wide(x):
    return np.asarray(x, np.float64)


def test_linear_layer_equals_flax_dense_in_parameters_and_values():
    x, kernel, _ = OPERANDS
    ours, flax = Linear(50), nn.Dense(50)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(1), x))
    for inputs in (x, x.reshape(8, 5, 30), x[0]):
        outputs, expected = apply(ours, params, inputs), apply(flax, params, inputs)
        np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)
    y = apply(Linear(50, use_bias=False), {"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, wide(x) @ wide(kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_values_and_gradients_are_accumulated_in_float32(dtype):
    x, kernel, weight = OPERANDS

    def matmul(x, kernel) -> Any:
        return layers.trained_matmul(x, kernel, jnp.dtype(dtype))

    def total(x, kernel):
        return jnp.sum(matmul(x, kernel) * weight)

    value = matmul(x, kernel)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    gradients = gradient(x, kernel)
    assert {value.dtype, *(g.dtype for g in gradients)} == {jnp.dtype("float32")}
    together = jax.vmap(gradient, in_axes=(None, 0))(x, jnp.stack([kernel, 2 * kernel]))[1]
    np.testing.assert_allclose(together, [gradients[1]] * 2, rtol=1e-5, atol=1e-4)
    # Products of rounded numbers are exact; what is left is the rounding of sums in float32.
    x, kernel, weight = (wide(a.astype(dtype)) for a in OPERANDS)
    expected = (x @ kernel, weight @ kernel.T, x.T @ weight)
    for ours, oracle in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rate", "width"), [(0.1, 1), (0.5, 63)])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate, width):
    """Dropout draws 8 or 16 random bits for a number."""
    y = drop_out(rate, (40_000 // width, width))
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 0.012  # 4 standard errors
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-4)


def test_dropout_is_independent_for_every_number():
    correlation = np.corrcoef((drop_out(0.5, (5000, 8)) != 0).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.06  # 4 standard errors
    x = jnp.arange(12.0).reshape(3, 4)
    for rate, deterministic in ((0.0, False), (0.5, True)):
        y = apply(Dropout(rate), {}, x, deterministic=deterministic)
        np.testing.assert_array_equal(y, x)
    assert not drop_out(1.0, (3, 4)).any()
