"""Models against loops written from the paper, and what dropout may do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from tests.helpers.made_frames import make_frames
from vidjax.core.batch import ClipInfo
from vidjax.models import identifier
from vidjax.models.layers import NetVLAD, drop_modalities
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
        [("sum", ("batch",)), ("mean", ("batch",)), ("sum", ("l2",)), ("sum", ("l2", "batch"))],
        mark=pytest.mark.nightly,
    ),
)
def test_netvlad_matches_the_papers(reduce, norms):
    """The paper's, and the original of Arandjelovic et al. without BatchNorm and with L2 norms."""
    with jax.enable_x64(True):
        frames = make_frames([4, 2, 0, 1], max_frames=4, dtype="float64")
        model = NetVLAD(3, reduce=reduce, norms=norms, dtype=jnp.dtype("float64"))
        variables = made.init(model, frames.features, frames.mask, train=False)
        params = made.randomised(variables["params"])

        @jax.jit
        def forward(params, features):
            collections = {**variables, "params": params}
            options = {"train": True, "mutable": ["batch_stats"]}
            return model.apply(collections, features, frames.mask, **options)[0]

        assert ("bias" in params["assignment"]) == ("norm" not in params) == ("batch" not in norms)
        found = forward(params, frames.features)
        expected = netvlad_oracle(params, frames.features, frames.mask, reduce, norms)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_array_equal(found[2], 0)
        if reduce == "sum" and len(norms) < 2:
            made.check_gradients(forward, params, frames.features, modes=("rev",))


def test_modality_dropout_never_drops_everything():
    present = jnp.asarray(np.random.default_rng(0).random((4000, 4)) < 0.7)
    drop = jax.jit(drop_modalities)
    for rate in (0.3, 0.999):
        kept = np.asarray(drop(jax.random.key(1), present, rate))
        assert not np.any(kept & ~np.asarray(present))
        np.testing.assert_array_equal(kept.any(axis=1), np.asarray(present).any(axis=1))
    kept = np.asarray(drop(jax.random.key(2), jnp.ones((20_000, 3), bool), 0.3))
    # Lost with probability .3, save for one in three of the .027 where all would go.
    np.testing.assert_allclose(kept.mean(axis=0), 0.7 + 0.027 / 3, atol=0.015)


def test_neighbours_are_the_best_cosine_of_every_identity():
    vectors = np.random.default_rng(0).standard_normal((14, 6)).astype(np.float32)
    frames = make_frames([1] * 10, max_frames=1)._replace(features=vectors[:10, None])
    frames.mask[7] = False
    labels = np.array([1, 1, 2, 4, 4, 0, 2, 3, 1, 3], np.int32)  # 3: only rows 7 and padded 9
    clips = ClipInfo(np.arange(10, dtype=np.int32)[::-1], np.arange(10) < 9, labels)
    spec = {"name": "knn", "logit_scale": 16.0}
    model = identifier.make_identifier(spec, modalities={"face": 6}, num_classes=5, num_clips=12)
    blank = made.init_identifier(model, {"face": frames}, clips)
    assert "params" not in blank
    np.testing.assert_array_equal(made.eval_logits(model, blank, {"face": frames}, clips), 16 * -2)
    logits, memory = made.train_logits(model, blank, {"face": frames}, clips)
    np.testing.assert_array_equal(logits, np.zeros((10, 5)))
    queries = make_frames([1, 1, 1, 0], max_frames=1)._replace(features=vectors[10:, None])
    scores = made.eval_logits(
        model, memory, {"face": queries}, jax.tree.map(lambda x: x[:4], clips)
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, row in zip(unit[10:13], scores[:3], strict=True):
        cosines = np.where(np.isin(np.arange(10), (7, 9)), -2, unit[:10] @ query)
        best = [cosines[labels == column].max() for column in range(5)]
        np.testing.assert_allclose(row, 16 * np.array(best), atol=1e-5)
    np.testing.assert_array_equal(scores[3], 16 * -2)


def test_gate_matches_its_equation_and_leaves_missing_vectors_out():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 4, 5))
        x[1, 2] = 0
        model = SigmoidGate(dtype=jnp.dtype("float64"))
        params = made.init(model, x)["params"]
        forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
        np.testing.assert_array_equal(forward(params, x), x / 2)
        params = made.randomised(params)
        scores = (x * params["kernel"]).sum(axis=-1) + params["bias"]
        found = forward(params, x)
        np.testing.assert_allclose(found, x / (1 + np.exp(-scores))[..., None], atol=1e-6)
