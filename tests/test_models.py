"""Nets and layers equal float64 oracles. Axes: B clips, T frames, D features.

`made.randomised` moves all parameters, because parameters that start at 0 or 1 hide mistakes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.helpers import made_models as made
from tests.helpers.cases import nightly_after_first
from tests.helpers.embeddings import unit
from tests.helpers.made_frames import make_frames
from vidjax.core.batch import ClipInfo
from vidjax.models import build_system, layers
from vidjax.models.build_system import TaskSpec, make_system
from vidjax.models.dense import MLP, ResidualDenseNet
from vidjax.models.layers import Dropout, NetVLAD, drop_modalities
from vidjax.models.multimodal import MultimodalAttention
from vidjax.runs import config_io

FLOAT64 = jnp.dtype("float64")
SMALL = {"name": "deepmef", "hidden_dim": 8, "branch_dims": (6, 4), "dropout_rate": 0.0}
COSINE = {"name": "cosine", "embed_dim": 7}
WIDTHS = {"face": 6, "head": 5, "body": 4, "audio": 3}
ACTIVATIONS = {
    "linear": lambda z, slope: z,
    "relu": lambda z, slope: np.maximum(z, 0),
    "sigmoid": lambda z, slope: 1 / (1 + np.exp(-z)),
    "swish": lambda z, slope: z / (1 + np.exp(-z)),
    "prelu": lambda z, slope: np.where(z > 0, z, slope * z),
}


def randomised(model, x, mask):
    """Returns variables of a layer with random parameters."""
    variables = made.init(model, x, mask, train=False)
    return {**variables, "params": made.randomised(variables["params"])}


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, x, mask):
    output, _ = model.apply(variables, x, mask, train=True, mutable=["batch_stats"])
    return output


def netvlad_oracle(params, features, mask, reduce="sum", batch_norm=True, stats=None):
    """Returns pooled frames [B, K, D], for K clusters, by section 5.2 of the iQIYI-VID paper."""
    z = features @ params["assignment"]["kernel"] + params["assignment"].get("bias", 0)
    if batch_norm:
        mean, variance = stats or (z[mask].mean(axis=0), z[mask].var(axis=0))  # of real frames
        z = (z - mean) / np.sqrt(variance + 1e-5)
        z = z * params["norm"]["scale"] + params["norm"]["bias"]
    share = np.exp(z)
    share = share / share.sum(axis=-1, keepdims=True) * mask[..., None]
    out = (share[..., None] * (features[:, :, None] - params["centers"])).sum(axis=1)
    if reduce == "mean":
        out = out / np.maximum(mask.sum(axis=1), 1)[:, None, None]
    return out


@nightly_after_first("reduce, batch_norm", [("sum", True), ("mean", True), ("sum", False)])
def test_netvlad_matches_the_equations_of_the_iqiyi_vid_paper(reduce, batch_norm):
    with jax.enable_x64(True):
        x, *_, mask = make_frames([4, 2, 0, 1], max_frames=4, dtype="float64")
        model = NetVLAD(num_clusters=3, reduce=reduce, batch_norm=batch_norm, dtype=FLOAT64)
        variables = randomised(model, x, mask)
        pooled = train(model, variables, x, mask)
        expected = netvlad_oracle(variables["params"], x, mask, reduce, batch_norm)
        np.testing.assert_allclose(pooled, expected, atol=1e-6)
        np.testing.assert_array_equal(pooled[2], 0)  # clip 2 has no frames


def test_dropout_of_modalities_never_drops_the_last_one():
    drop = jax.jit(drop_modalities, static_argnames="rate")
    present = np.random.default_rng(0).random((4000, 4)) < 0.7  # [clips, modalities]
    kept = np.asarray(drop(jax.random.key(1), present, rate=0.999))
    assert not np.any(kept & ~present)
    np.testing.assert_array_equal(kept.any(axis=1), present.any(axis=1))
    # With probability 0.3 ** 3 = 0.027 all three would be dropped. Then one of them stays.
    kept = np.asarray(drop(jax.random.key(2), np.ones((20_000, 3), bool), rate=0.3))
    np.testing.assert_allclose(kept.mean(axis=0), 0.7 + 0.027 / 3, atol=0.015)


# Dropout draws 8 random bits for each number, or 16 bits if the rate is no multiple of 1/256.
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_dropout_keeps_the_mean_and_drops_columns_independently(rate):
    rngs = {"dropout": jax.random.key(0)}
    drop_out = jax.jit(functools.partial(Dropout(rate).apply, {}, deterministic=False, rngs=rngs))
    y = np.asarray(drop_out(jnp.ones((4999, 7))))  # 7 numbers do not fill words of 32 bits
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 0.012  # 4 standard errors
    np.testing.assert_allclose(y[kept], 1 / (1 - rate) if rate < 1 else 1, rtol=1e-4)
    if 0 < rate < 1:  # columns are not correlated
        assert np.abs(np.corrcoef(kept.T) - np.eye(7)).max() < 0.06  # 4 standard errors


def test_knn_scores_are_the_best_cosine_of_every_identity():
    learned, asked = np.split(np.random.default_rng(0).standard_normal((14, 6)).astype("f4"), [10])
    # Only rows 7 and 9 have class 3, but row 7 has no face, and row 9 is padding.
    frames = make_frames([1] * 10, max_frames=1)._replace(features=learned[:, None])
    frames.mask[7] = False
    labels = np.array([1, 1, 2, 4, 4, 0, 2, 3, 1, 3], np.int32)
    clip_numbers = np.arange(10, dtype=np.int32)[::-1]  # rows are in the opposite order of clips
    clips = ClipInfo(index=clip_numbers, mask=np.arange(10) < 9, labels=labels)
    spec = {"name": "knn", "logit_scale": 16.0}
    model = build_system.make_identifier(spec, modalities={"face": 6}, num_classes=5, num_clips=12)
    blank = made.init_identifier(model, {"face": frames}, clips)
    _, memory = made.train_logits(model, blank, {"face": frames}, clips)
    queries = make_frames([1, 1, 1, 0], max_frames=1)._replace(features=asked[:, None])
    four_clips = jax.tree.map(lambda x: x[:4], clips)
    scores = made.eval_logits(model, memory, {"face": queries}, four_clips)
    for query, row in zip(unit(asked[:3]), scores[:3], strict=True):
        cosines = unit(learned) @ query
        cosines[[7, 9]] = -2  # below every cosine
        best = [cosines[labels == column].max() for column in range(5)]
        np.testing.assert_allclose(row, 16 * np.array(best), atol=1e-5)
    np.testing.assert_array_equal(scores[3], 16 * -2)  # a query without a frame


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_values_and_gradients_are_accumulated_in_float32(dtype):
    draw = np.random.default_rng(0).normal
    operands = [draw(size=shape).astype("f4") for shape in ((40, 30), (30, 50), (40, 50))]
    x, kernel, weight = operands  # `weight` multiplies the output

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(x, kernel):
        value: Any = layers.trained_matmul(x, kernel, jnp.dtype(dtype))
        return jnp.sum(value * weight), value

    gradients, value = gradient(x, kernel)
    assert {value.dtype, *(g.dtype for g in gradients)} == {jnp.dtype("float32")}
    # `dtype` rounds only the operands. The errors of products and sums in float32 are tiny.
    x, kernel, weight = (a.astype(dtype).astype(np.float64) for a in operands)
    expected = (x @ kernel, weight @ kernel.T, x.T @ weight)  # value, gradients of x and kernel
    for ours, oracle in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-5)


def layer_oracle(params, rows, mask, activation, batch_norm, norm_first=False):
    """Returns rows after a linear layer, an activation and BatchNorm (or first BatchNorm)."""

    def norm(x):
        real = x[np.asarray(mask)]
        x = (x - real.mean(axis=0)) / np.sqrt(real.var(axis=0) + 1e-5)
        return x * params["norm"]["scale"] + params["norm"]["bias"]

    out = np.array(rows) @ params["dense"]["kernel"] + params["dense"]["bias"]
    out = norm(out) if batch_norm and norm_first else out
    out = ACTIVATIONS[activation](out, params.get("slope", 0))
    return norm(out) if batch_norm and not norm_first else out


def test_mlp_matches_its_equations():
    # (width, activation, has BatchNorm, dropout rate) of each layer; layer 1 has no BatchNorm.
    specs = tuple((4 + i, name, i != 1, 0.0) for i, name in enumerate(ACTIVATIONS))
    mask = np.array([True, True, False, True, True])
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((5, 3))
        model = MLP(specs, FLOAT64)
        variables = randomised(model, x, mask)
        expected = x
        for i, (_, activation, batch_norm, _) in enumerate(specs):
            layer = variables["params"][f"layer_{i}"]
            expected = layer_oracle(layer, expected, mask, activation, batch_norm)
        np.testing.assert_allclose(train(model, variables, x, mask), expected, atol=1e-6)


@pytest.mark.slow
@nightly_after_first("shortcut", ["add", "none"])
def test_residual_dense_net_matches_its_equations(shortcut):
    """Layers 1 and 2 have shortcuts from earlier layers."""
    mask = np.arange(8) != 2
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((8, 3))
        sizes: Any = {"width": 5, "num_layers": 4, "activation": "swish", "dropout_rate": 0.0}
        model = ResidualDenseNet(**sizes, shortcut=shortcut, dtype=FLOAT64)
        variables = randomised(model, x, mask)
        expected = x
        for i in range(4):
            added = expected if shortcut == "add" and i in (1, 2) else 0
            layer = variables["params"][f"layer_{i}"]
            expected = layer_oracle(layer, expected, mask, "swish", batch_norm=True) + added
        np.testing.assert_allclose(train(model, variables, x, mask), expected, atol=1e-6)


def linear(params, name, x):
    return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])


def frames_oracle(params, clip):
    """Returns one clip [n, D] after attention between its n real frames."""
    theta, phi, g = (linear(params, name, clip) for name in ("theta", "phi", "g"))
    affinity = special.softmax(theta @ phi.T / np.sqrt(phi.shape[1]), axis=-1)
    return clip + linear(params, "out", affinity @ g)


def danet_oracle(params, clip):
    """Returns one clip [n, D] after the channel attention of DANet's code: frames are channels."""
    energy = clip @ clip.T
    affinity = special.softmax(energy.max(axis=1, keepdims=True) - energy, axis=-1)
    return clip + params["gamma"] * affinity @ clip


ORACLES = {"features": frames_oracle, "danet": danet_oracle, "none": lambda params, clip: clip}


def weights_oracle(params, clip, scores, aggregation):
    """Returns the weights [n] of the frames of one clip [n, D]; a score is quality x detection."""
    if aggregation == "attention":
        return special.softmax(clip @ params["aggregation"]["query"])
    weights = scores if aggregation == "quality" else np.ones(len(clip))
    return weights / weights.sum()


def deepmef_oracle(params, frames, batch_mask, form, rms_norm, layer_form, aggregation):
    """Returns the logits [B, C]. BatchNorm of a modality uses the clips that have the modality."""
    published = layer_form == "published"
    prelu_layer = functools.partial(layer_oracle, activation="prelu", batch_norm=True)
    parts, seen = [], np.zeros(len(batch_mask), bool)
    for name, (features, quality, detection, _, mask) in frames.items():
        exists = mask.any(axis=1) & batch_mask
        seen |= exists
        if name == "face":  # attention between the frames, then their weighted mean
            part = np.zeros((len(seen), features.shape[-1] + 2))
            for b in np.flatnonzero(exists):
                x = features[b, mask[b]]
                if rms_norm:
                    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
                two_more = np.stack([quality[b] / 100, detection[b]], axis=1)[mask[b]]
                clip = ORACLES[form](params.get("channel_attention"), np.hstack([x, two_more]))
                scores = (quality[b] * detection[b])[mask[b]]
                part[b] = weights_oracle(params, clip, scores, aggregation) @ clip
        else:  # the mean frame, then two layers
            count = np.maximum(mask.sum(axis=1), 1)[:, None]
            part = (features * mask[..., None]).sum(axis=1) / count
            for i in range(2):
                part = prelu_layer(params[f"{name}_{i}"], part, exists, norm_first=published)
            part = part * exists[:, None]
        parts.append(part)
    x = np.concatenate(parts, axis=1)
    if published:  # Linear-BatchNorm-PReLU, twice
        hidden = prelu_layer(params["block"]["hidden"], x, seen, norm_first=True)
        x = x + prelu_layer(params["block"]["back"], hidden, seen, norm_first=True)
    else:
        hidden = prelu_layer(params["hidden"], x, seen)
        x = x + linear(params, "back", hidden)
    kernel = np.asarray(params["classifier"]["kernel"])
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    return np.where(seen[:, None], 30 * x @ kernel / lengths, 0)  # 30 is the default scale


@nightly_after_first("form, rms_norm, layer_form, aggregation", [
    ("features", True, "published", "attention"),
    ("danet", False, "ours", "mean"),
    ("none", True, "ours", "quality"),
])  # fmt: skip
def test_deepmef_matches_a_float64_loop_over_frames(form, rms_norm, layer_form, aggregation):
    """ORACLES has the forms of attention. test_published.py tests the form "channels"."""
    options = {"rms_norm": rms_norm, "layer_form": layer_form, "aggregation": aggregation}
    with jax.enable_x64(True):
        frames, clips = made.make_batch(dtype="float64")
        model = made.make_model(SMALL, dtype="float64", channel_attention=form, **options)
        variables = made.init_identifier(model, frames, clips)
        params = made.randomised(variables["params"])
        wanted = deepmef_oracle(params, frames, clips.mask, form, **options)
        logits, _ = made.train_logits(model, {**variables, "params": params}, frames, clips)
        np.testing.assert_allclose(logits, wanted, atol=1e-6)


def cosine_oracle(params, stats, frames, clips, feature_scale):
    """Returns the embedding, of length 1, and the logits. BatchNorm uses the batch or `stats`."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    z = np.zeros((len(clips.mask), len(frames), COSINE["embed_dim"]))
    for m, (name, part) in enumerate(frames.items()):
        layer, mask = params[f"{name}_map"], part.mask & clips.mask[:, None]
        exists = np.flatnonzero(mask.any(axis=1))
        means = [part.features[b][mask[b]].mean(axis=0, dtype=np.float64) for b in exists]
        x = feature_scale * np.stack(means) @ layer["dense"]["kernel"] + layer["dense"]["bias"]
        norm = stats[f"{name}_map"]["norm"] if stats else {"mean": x.mean(0), "var": x.var(0)}
        x = (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5)
        x = x * layer["norm"]["scale"] + layer["norm"]["bias"]
        z[exists, m] = params["weights"][m] * unit(x)
    z = z.reshape(len(z), -1)
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    kernel = params["classifier"]["kernel"]
    return z, params["scale"] * z @ (kernel / np.linalg.norm(kernel, axis=0))


@nightly_after_first("train, feature_scale", [(True, 0.3), (False, 0.1)])
def test_cosine_net_matches_its_float64_equations(train, feature_scale):
    with jax.enable_x64(True):
        frames, clips = made.make_batch()
        options = {"feature_scale": feature_scale, "logit_scale": 9.0}
        model = made.make_model(COSINE, dtype="float64", **options)
        variables = made.init_identifier(model, frames, clips)
        # Each modality starts with half of the weight of the modality before it.
        np.testing.assert_array_equal(variables["params"]["weights"], [1, 0.5, 0.25])
        assert variables["params"]["scale"] == 9
        params = made.randomised(variables["params"])
        stats = jax.tree.map(np.abs, made.randomised(variables["batch_stats"]))
        variables = {"params": params, "batch_stats": stats}
        if train:
            output, _ = made.train_output(model, variables, frames, clips, jax.random.key(0))
        else:
            output = made.eval_output(model, variables, frames, clips)
        z, logits = cosine_oracle(params, None if train else stats, frames, clips, feature_scale)
        np.testing.assert_allclose(output.embedding, z, atol=1e-6, strict=True)
        np.testing.assert_allclose(output.logits[:, 0], logits, atol=1e-5)
        np.testing.assert_array_equal(output.logit_scale, params["scale"][None])


def attention_oracle(x, exists, w_f, gamma, *, fill, scale=1.0):
    """Returns X [D, M] of one clip after attention, and the weights Y [M, M]: equations 1 to 3.

    W_F is [D~, D]. Missing vectors have weight 0. With `fill`,
    attention replaces a missing vector by a mean of the other vectors.
    """
    z = np.where(np.asarray(exists)[:, None], scale * (w_f @ x).T @ (w_f @ x), -np.inf)
    y = np.exp(z - np.maximum(z.max(axis=0), -1e9))  # against overflow; the factor cancels
    y = y / np.maximum(y.sum(axis=0), 1e-300) * (np.asarray(exists) | fill)
    return x + gamma * x @ y, y


def test_attention_matches_equations_1_to_3_of_the_iqiyi_vid_paper():
    with jax.enable_x64(True):
        exists = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
        x = np.random.default_rng(0).standard_normal((3, 5, 8)) * exists[..., None]
        make = functools.partial(MultimodalAttention, dim=4, scale=0.5, gamma=0.3, dtype=FLOAT64)
        params = made.randomised(made.init(make(), x, exists)["params"])
        w_f = np.asarray(params["w_f"]["kernel"]).T
        for fill in (False, True):
            out, y = jax.jit(make(fill_missing=fill).apply)({"params": params}, x, exists)
            for b in range(3):
                expected = attention_oracle(x[b].T, exists[b], w_f, 0.3, fill=fill, scale=0.5)
                np.testing.assert_allclose(out[b], expected[0].T, atol=1e-12)
                np.testing.assert_allclose(y[b], expected[1], atol=1e-12)


def logits_of_the_paper(params, frames, *, netvlad, attention, pooled=False, unit_length=False):
    """Returns the logits [B, C] by figure 3 of the paper. A face gives three vectors."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    columns, exists = [], []
    for name in WIDTHS:
        layer, count = params[f"{name}_map"], 3 if name == "face" else 1
        mask: Any = np.asarray(frames[name].mask)
        real, features = mask.any(axis=1), np.asarray(frames[name].features, np.float64)
        video = (features * mask[..., None]).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)[:, None]
        if unit_length:
            video[real] = unit(video[real])
        if name == "face" and netvlad:
            pool = netvlad_oracle(params["face_netvlad"], features, mask, stats=(0, 1))
            video = pool.reshape(len(mask), -1)
        mapped = (video @ layer["kernel"] + layer["bias"]) * real[:, None]
        columns.append(mapped.reshape(len(mask), count, -1))
        exists += [real] * count
    vectors, exists = np.concatenate(columns, axis=1), np.stack(exists, axis=1)  # [B, M, D]
    if attention:
        w_f = params["attention_map"]["w_f"]["kernel"].T
        pairs = zip(vectors, exists, strict=True)
        vectors = [attention_oracle(x.T, has, w_f, 0.05, fill=True)[0].T for x, has in pairs]
    if pooled:
        vectors = [x[has].mean(axis=0) for x, has in zip(vectors, exists, strict=True)]
    return linear(params["classifier"], "logits", np.reshape(vectors, (len(exists), -1)))


@nightly_after_first("words, parts", [
    ("published", {"netvlad": True, "attention": True}),
    ("average,concat,unit", {"netvlad": False, "attention": False, "unit_length": True}),
    ("pooled", {"netvlad": True, "attention": False, "pooled": True}),
])  # fmt: skip
def test_published_configuration_matches_the_equations_of_the_paper(words, parts):
    """The cases are the paper's net and the simplest nets of its table 3."""
    config = config_io.load_file(f"mma:published,{words}").to_dict()
    sizes = {name: WIDTHS[name] for name in config["modalities"]}
    config["model"] |= {"embed_dim": 8, "gram_dim": 4, "num_clusters": 2}
    counts: Any = {"num_identities": 6, "num_clusters": None, "num_clips": 4, "total_steps": 9}
    system = make_system(config, TaskSpec(sizes, **counts, train_other=True))
    # Three clips of up to 40 faces. The second has no audio, and the third no face.
    lengths = {"face": [40, 3, 0], "head": [9, 2, 4], "body": [3, 1, 1], "audio": [1, 0, 1]}
    frames = {
        name: make_frames(lengths[name], max_frames=max(lengths[name]), dim=dim, seed=dim)
        for name, dim in sizes.items()
    }
    clips = ClipInfo(np.arange(3, dtype=np.int32), np.ones(3, bool), np.zeros(3, np.int32))
    # Random parameters, and the initial statistics of BatchNorm.
    fused = jax.jit(lambda: system.fuse(None, frames, jnp.int32(-1)))()  # -1: uses all features
    shapes = jax.eval_shape(lambda: made.init_identifier(system.model, fused, clips))
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: draw(0, 0.4, x.shape).astype("f4"), shapes["params"])
    norm = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    stats = {"face_netvlad": {"norm": norm}} if parts["netvlad"] else {}
    logits = made.eval_logits(system.model, {"params": params, "batch_stats": stats}, fused, clips)
    expected = logits_of_the_paper(params, fused, **parts)
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=1e-4)
