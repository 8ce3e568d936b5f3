"""DeepMEF and its parts against loops over frames, and what order, padding and absence may do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.made_frames import make_frames
from tests.helpers.made_models import (
    check_gradients,
    eval_logits,
    init,
    init_identifier,
    make_batch,
    make_model,
    randomised,
)
from tests.test_models_dense import FLOAT64, layer_oracle, train_forward
from vidjax.models import identifier
from vidjax.models.attention import AttentionAggregation, ChannelAttention
from vidjax.models.mlp import ResidualBlock

SMALL = {"name": "deepmef", "hidden_dim": 8, "branch_dims": (6, 4), "dropout_rate": 0.0}


def softmax(values):
    values = np.exp(np.asarray(values) - np.max(values))
    return values / values.sum()


def linear(params, name, x):
    return np.asarray(params[name]["kernel"]).T @ x + np.asarray(params[name]["bias"])


def frames_oracle(params, clip):
    """Affinity between the real frames of one clip [n, D]."""
    theta, phi, g = ([linear(params, name, x) for x in clip] for name in ("theta", "phi", "g"))
    out = []
    for t, x in enumerate(clip):
        affinity = softmax([theta[t] @ phi[s] / np.sqrt(len(phi[s])) for s in range(len(clip))])
        mixed = sum(a * value for a, value in zip(affinity, g, strict=True))
        out.append(x + linear(params, "out", mixed))
    return np.array(out)


def channels_oracle(params, clip):
    """The published form: 1x1 maps over the frames of one clip [T, D], feature by feature."""
    columns = clip.T
    theta, phi, g = (
        np.array([linear(params, name, x) for x in columns]).T for name in ("theta", "phi", "g")
    )  # each [T/2, D]
    mixed = np.zeros_like(g)
    for i in range(len(g)):
        affinity = softmax([sum(theta[i] * phi[j]) for j in range(len(g))])
        for j in range(len(g)):
            mixed[i] += affinity[j] * g[j]
    return np.array([x + linear(params, "out", y) for x, y in zip(columns, mixed.T, strict=True)]).T


def danet_oracle(params, clip):
    """The channel attention of DANet's code, with the frames of one clip [n, D] for channels."""
    out = []
    for x in clip:
        energy = np.array([x @ other for other in clip])
        affinity = softmax(energy.max() - energy)
        out.append(x + params["gamma"] * sum(a * y for a, y in zip(affinity, clip, strict=True)))
    return np.array(out)


ORACLES = {"features": frames_oracle, "channels": channels_oracle, "danet": danet_oracle}


@pytest.mark.parametrize("form", ORACLES)
def test_channel_attention_matches_a_loop(form):
    with jax.enable_x64(True):
        lengths = [4, 4, 0, 4] if form == "channels" else [4, 2, 0, 1]
        frames = make_frames(lengths, max_frames=4, dtype="float64")
        model = ChannelAttention(form, num_frames=4, dtype=FLOAT64)
        params = init(model, frames.features, frames.mask)["params"]

        @jax.jit
        def forward(params, features):
            return model.apply({"params": params}, features, frames.mask)

        start = forward(params, frames.features)
        np.testing.assert_array_equal(start, frames.features)  # the identity
        params = randomised(params)
        out = np.asarray(forward(params, frames.features))
        np.testing.assert_array_equal(out[~frames.mask], 0)
        oracle = ORACLES[form]
        for b, length in enumerate(lengths):
            if length:
                expected = oracle(params, frames.features[b, :length])
                np.testing.assert_allclose(out[b, :length], expected, atol=1e-6)
        check_gradients(forward, params, frames.features, modes=("rev",))


@pytest.mark.parametrize("form", ["features", "channels"])
def test_channel_attention_learns_from_its_start(form):
    """With theta and phi at 0, as published, neither would ever move."""
    frames = make_frames([4, 4, 4], max_frames=4, dtype="float32")
    target = np.random.default_rng(1).standard_normal(frames.features.shape)
    model: Any = ChannelAttention(form, num_frames=4)
    params = init(model, frames.features, frames.mask)["params"]

    @jax.jit
    def gradient(params):
        def loss(params):
            out = model.apply({"params": params}, frames.features, frames.mask)
            return jnp.mean((out - target) ** 2)

        return jax.grad(loss)(params)

    first = gradient(params)
    assert np.abs(first["out"]["kernel"]).max() > 1e-3
    second = gradient(jax.tree.map(lambda p, g: np.subtract(p, g), params, first))
    for name in ("theta", "phi", "g"):
        assert np.abs(second[name]["kernel"]).max() > 1e-5, name
    blank = {name: jax.tree.map(np.zeros_like, params[name]) for name in ("theta", "phi")}
    for name in ("theta", "phi"):
        stuck = gradient({**randomised(params), **blank})[name]["kernel"]
        np.testing.assert_array_equal(stuck, 0)


def test_attention_stays_finite():
    frames = make_frames([3, 1, 0], max_frames=3, dtype="float32")
    models: list[Any] = [
        ChannelAttention(),
        ChannelAttention("channels", 3),
        AttentionAggregation(),
    ]
    for model in models:
        params = randomised(init(model, frames.features, frames.mask)["params"])

        @jax.jit
        def gradient(params, features, model=model):
            def loss(params, features):
                return jnp.sum(model.apply({"params": params}, features, frames.mask))

            return jax.grad(loss, (0, 1))(params, features)

        for scale in (0, 1e4):
            for leaf in jax.tree.leaves(gradient(params, scale * frames.features)):
                assert np.isfinite(leaf).all()


def test_aggregation_matches_a_loop_and_starts_as_the_mean():
    with jax.enable_x64(True):
        lengths = [4, 2, 0, 1]
        frames = make_frames(lengths, max_frames=4, dtype="float64")
        model = AttentionAggregation()
        params = init(model, frames.features, frames.mask)["params"]

        @jax.jit
        def forward(params, features):
            return model.apply({"params": params}, features, frames.mask)

        start = np.asarray(forward(params, frames.features))
        params = randomised(params)
        out = np.asarray(forward(params, frames.features))
        for b, length in enumerate(lengths):
            clip = frames.features[b, :length]
            mean = clip.mean(axis=0) if length else np.zeros(6)
            np.testing.assert_allclose(start[b], mean, atol=1e-12)
            weights = softmax([x @ params["query"] for x in clip]) if length else []
            expected = sum((w * x for w, x in zip(weights, clip, strict=True)), np.zeros(6))
            np.testing.assert_allclose(out[b], expected, atol=1e-6)
        check_gradients(forward, params, frames.features)


def deepmef_oracle(params, frames, batch_mask, *, scale, rms_norm, published=False):
    """The whole system, a clip and a modality at a time; BatchNorm by the clips that have it."""
    num_clips = len(batch_mask)
    parts, seen = [], np.zeros(num_clips, bool)
    for name in ("face", "head", "audio"):
        features, mask = frames[name].features.astype(np.float64), frames[name].mask
        exists = mask.any(axis=1) & batch_mask
        seen |= exists
        if name == "face":
            part = np.zeros((num_clips, features.shape[-1] + 2))
            for b in np.flatnonzero(exists):
                clip = []
                for t in np.flatnonzero(mask[b]):
                    x = features[b, t]
                    if rms_norm:
                        x = x / np.sqrt(np.mean(x**2))
                    beside = [frames[name].quality[b, t] / 100, frames[name].detection[b, t]]
                    clip.append(np.concatenate([x, beside]))
                oracle = channels_oracle if published else frames_oracle
                clip = oracle(params["channel_attention"], np.array(clip))
                weights = softmax([x @ params["aggregation"]["query"] for x in clip])
                part[b] = sum(w * x for w, x in zip(weights, clip, strict=True))
        else:
            rows = [
                features[b, mask[b]].mean(axis=0) if exists[b] else 0 * features[b, 0]
                for b in range(num_clips)
            ]
            for i in range(2):
                rows = layer_oracle(params[f"{name}_{i}"], rows, exists, "prelu", True, published)
            part = np.array(rows) * exists[:, None]
        parts.append(part)
    x = np.concatenate(parts, axis=1)
    if published:  # Linear-BatchNorm-PReLU, twice
        rows = layer_oracle(params["block"]["hidden"], x, seen, "prelu", True, True)
        x = x + np.array(layer_oracle(params["block"]["back"], rows, seen, "prelu", True, True))
    else:
        hidden = layer_oracle(params["hidden"], x, seen, "prelu", True)
        x = x + np.array([linear(params, "back", np.array(row)) for row in hidden])
    kernel = np.asarray(params["classifier"]["kernel"])
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    return np.where(seen[:, None], scale * x @ kernel / lengths, 0)


@pytest.mark.parametrize(
    ("rms_norm", "gradients"),
    [
        (True, False),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_deepmef_matches_a_loop(rms_norm, gradients):
    with jax.enable_x64(True):
        frames, clips = make_batch()
        frames = {
            name: value._replace(features=value.features.astype(np.float64))
            for name, value in frames.items()
        }
        model = make_model(SMALL, dtype="float64", rms_norm=rms_norm)
        variables = init_identifier(model, frames, clips)
        params = randomised(variables["params"])

        @jax.jit
        def forward(params):
            collections = {**variables, "params": params}
            mutable = ["batch_stats"]
            output, _ = model.apply(collections, frames, clips, train=True, mutable=mutable)
            return output.logits[:, 0]

        expected = deepmef_oracle(params, frames, clips.mask, scale=30, rms_norm=rms_norm)
        np.testing.assert_allclose(forward(params), expected, atol=1e-6)
        if gradients:
            check_gradients(forward, params, modes=("rev",), eps=1e-6)


@pytest.mark.slow
def test_published_deepmef_matches_a_loop():
    with jax.enable_x64(True):
        frames, clips = make_batch()
        frames = {
            name: value._replace(features=value.features.astype(np.float64))
            for name, value in frames.items()
        }
        # Whole clips, as after drawing: padded frames would count in the maps over frames.
        size = frames["face"].mask.shape[1]
        lengths = size * frames["face"].mask.any(axis=1)
        frames["face"] = make_frames(lengths, max_frames=size, dtype="float64")
        options = {"channel_attention": "channels", "num_frames": size, "layer_form": "published"}
        model = make_model({**SMALL, **options}, dtype="float64")
        variables = init_identifier(model, frames, clips)
        params = randomised(variables["params"])
        collections = {**variables, "params": params}
        output, _ = jax.jit(
            lambda collections: model.apply(
                collections, frames, clips, train=True, mutable=["batch_stats"]
            )
        )(collections)
        expected = deepmef_oracle(
            params, frames, clips.mask, scale=30, rms_norm=True, published=True
        )
        np.testing.assert_allclose(output.logits[:, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_only_the_last_published_layers_have_no_dropout():
    """With a rate of 1 nothing passes any other layer."""
    frames, clips = make_batch()
    options = {"layer_form": "published", "dropout_rate": 1.0, "branch_dims": (6,)}
    model = make_model({**SMALL, **options, "channel_attention": "none"})
    variables = init_identifier(model, frames, clips)
    output, new = jax.jit(
        lambda: model.apply(
            variables, frames, clips, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
    )()  # fmt: skip
    exists = frames["head"].mask.any(axis=1) & clips.mask
    branch = np.asarray(output.embedding)[:, 8:14]  # of the head, a single layer
    assert (np.abs(branch[exists]).max(axis=1) > 0).all()
    seen = new["batch_stats"]["block"]["back"]["norm"]
    np.testing.assert_array_equal(seen["mean"], 0)  # what reaches the last layer is dropped


def test_the_scene_only_net_matches_a_loop():
    """X + f(x), with f twice as wide: Linear-BatchNorm-PReLU, twice."""
    with jax.enable_x64(True):
        mask = np.array([True, True, False, True, True])
        x = np.random.default_rng(0).standard_normal((5, 3))
        model = ResidualBlock(0, 0.0, FLOAT64)
        variables = init(model, x, mask, train=False)
        shapes = {
            name: variables["params"][name]["dense"]["kernel"].shape for name in ("hidden", "back")
        }
        assert shapes == {"hidden": (3, 6), "back": (6, 3)}
        params = randomised(variables["params"])
        rows = x
        for name in ("hidden", "back"):
            rows = layer_oracle(params[name], rows, mask, "prelu", True, True)
        forward = train_forward(model, variables, mask)
        np.testing.assert_allclose(forward(params, x), x + np.array(rows), atol=1e-6)


@pytest.fixture(scope="module")
def deepmef():
    frames, clips = make_batch()
    model = make_model(SMALL)
    variables = init_identifier(model, frames, clips)
    return model, {**variables, "params": randomised(variables["params"])}, frames, clips


def test_quality_and_detection_are_seen(deepmef):
    model, variables, frames, clips = deepmef
    logits = eval_logits(model, variables, frames, clips)
    has_face = frames["face"].mask.any(axis=1) & clips.mask
    for field in ("quality", "detection"):
        face = frames["face"]._replace(**{field: 0.5 * getattr(frames["face"], field)})
        moved = eval_logits(model, variables, {**frames, "face": face}, clips)
        np.testing.assert_array_equal(np.abs(moved - logits).max(axis=1) > 1e-4, has_face)


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"channel_attention": "channels", "num_frames": 4}, set()),
        (
            {"channel_attention": "none", "aggregation": "mean"},
            {"channel_attention", "aggregation"},
        ),
        (
            {"channel_attention": "danet", "aggregation": "quality"},
            {"aggregation"},
        ),
    ],
)
def test_ablations_work_on_one_modality(deepmef, options, gone):
    _, _, frames, clips = deepmef
    face = {"face": frames["face"]}
    whole = {"hidden", "back", "classifier", "channel_attention", "aggregation"}
    model = identifier.make_identifier(
        {**SMALL, **options}, modalities={"face": 6}, num_classes=5, num_clips=1
    )
    variables = init_identifier(model, face, clips)
    assert set(variables["params"]) == whole - gone
    logits = np.asarray(eval_logits(model, variables, face, clips))
    assert np.isfinite(logits).all() and logits[0].any()
    # At the start the net is the cosine with the mean frame.
    x = frames["face"].features[0].astype(np.float32)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    beside = np.stack([frames["face"].quality[0] / 100, frames["face"].detection[0]], axis=1)
    weights = np.ones(len(x))
    if options.get("aggregation") == "quality":
        weights = frames["face"].quality[0] * frames["face"].detection[0]
    mean = np.average(np.concatenate([x, beside], axis=1), axis=0, weights=weights)
    kernel = np.asarray(variables["params"]["classifier"]["kernel"])
    cosines = mean @ kernel / np.linalg.norm(mean) / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(logits[0], 30 * cosines, atol=1e-4)


def test_unknown_form_is_refused():
    face = make_frames([2], max_frames=2)
    with pytest.raises(ValueError, match="unknown channel attention 'neither'"):
        init(ChannelAttention("neither"), face.features, face.mask)
