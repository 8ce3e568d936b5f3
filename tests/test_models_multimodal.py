"""The iQIYI-VID paper's net: its equations as float64 loops, its shapes and parameters by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.made_frames import make_frames
from vidjax.core import fusion
from vidjax.core.batch import ClipInfo
from vidjax.models import identifier
from vidjax.models.multimodal import MultimodalAttention
from vidjax.runs import config_io

ROOT = Path(__file__).parent.parent
WIDTHS = {"face": 6, "head": 5, "body": 4, "audio": 3}


def attention_oracle(x, exists, w_f, w_g, gamma, *, fill, scale=1.0):
    """Equations 1-3 for one clip: X [D, M], W_F and W_G [D~, D]; W_G is W_F in the paper.

    A vector that does not exist takes no part in the sum over i. With `fill`, its own column j is
    computed like any other.
    """
    z = np.where(np.asarray(exists)[:, None], scale * (w_f @ x).T @ (w_g @ x), -np.inf)
    y = np.exp(z - np.maximum(z.max(axis=0), -1e9))  # a common factor, against overflow
    y = y / np.maximum(y.sum(axis=0), 1e-300) * (np.asarray(exists) | fill)
    return x + gamma * x @ y, y


@pytest.mark.parametrize("form", quick_first(["two", "gram"], mark=pytest.mark.nightly))
def test_attention_matches_equations_1_to_3_with_both_masks(form):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        exists = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
        x = rng.standard_normal((3, 5, 8)) * exists[..., None]
        fields = {"dim": 4, "scale": 0.5, "gamma": 0.3, "form": form, "dtype": jnp.dtype("float64")}
        fields["train_gamma"] = True
        models = [MultimodalAttention(**fields, fill_missing=fill) for fill in (False, True)]

        @jax.jit
        def run(x):
            variables = models[0].init(jax.random.key(0), x, exists)
            return variables["params"], [model.apply(variables, x, exists) for model in models]

        params, outputs = run(x)
        assert set(params) == {"gamma", "w_f", *(["w_g"] if form == "two" else [])}
        w_f = np.asarray(params["w_f"]["kernel"]).T
        w_g = np.asarray(params["w_g"]["kernel"]).T if form == "two" else w_f
        for fill, (out, y) in zip((False, True), outputs, strict=True):
            for b in range(3):
                expected = attention_oracle(x[b].T, exists[b], w_f, w_g, 0.3, fill=fill, scale=0.5)
                np.testing.assert_allclose(out[b], expected[0].T, atol=1e-12)
                np.testing.assert_allclose(y[b], expected[1], atol=1e-12)
        assert not np.asarray(outputs[0][0])[1, 1].any()
        # A missing vector has no correlations: it becomes the mean of those that exist.
        np.testing.assert_allclose(outputs[1][0][1, 1], 0.3 * x[1, [0, 2]].mean(axis=0))


def video_level(params, name, frames, clip, *, netvlad, unit):
    """Section 5.2: NetVLAD with BatchNorm (at its initial statistics) and no L2 norm, or a mean."""
    features = np.asarray(frames.features, np.float64)[clip][frames.mask[clip]]
    if name == "face":  # the 32 frames of highest quality; a shorter clip repeats random frames
        order = np.argsort(-np.asarray(frames.quality)[clip][frames.mask[clip]], kind="stable")
        draws = np.asarray(jax.random.uniform(jax.random.key(0), (1, 32)))[0]  # for all clips
        again = (draws * len(order)).astype(int)
        features = features[order[[t if t < len(order) else again[t] for t in range(32)]]]
    if name == "face" and netvlad:
        pool = jax.tree.map(lambda p: np.asarray(p, np.float64), params["face_netvlad"])
        score = features @ pool["assignment"]["kernel"] / np.sqrt(1 + 1e-5)
        share = np.exp(score * pool["norm"]["scale"] + pool["norm"]["bias"])
        share /= share.sum(axis=1, keepdims=True)
        return (share.T @ features - share.sum(axis=0)[:, None] * pool["centers"]).reshape(-1)
    mean = features.mean(axis=0)
    return mean / np.linalg.norm(mean) if unit else mean


def logits_of_the_paper(
    params, frames, clip, modalities, *, netvlad, attention, pooled=False, unit=False
):
    """Figure 3 from the frames of one clip to its logits."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    columns, exists = [], []
    for name in modalities:
        layer, count = params[f"{name}_map"], 3 if name == "face" else 1
        mapped, real = np.zeros(layer["bias"].size), frames[name].mask[clip].any()
        if real:
            video = video_level(params, name, frames[name], clip, netvlad=netvlad, unit=unit)
            mapped = video @ layer["kernel"] + layer["bias"]
        columns += list(mapped.reshape(count, -1))
        exists += [real] * count
    x = np.stack(columns, axis=1)  # [D, M]
    if attention:
        w_f = params["attention_map"]["w_f"]["kernel"].T
        x, _ = attention_oracle(x, exists, w_f, w_f, 0.05, fill=True)
    vectors = x[:, exists].mean(axis=1) if pooled else x.T.reshape(-1)
    classifier = params["classifier"]["logits"]
    return vectors @ classifier["kernel"] + classifier["bias"]


@pytest.mark.parametrize(
    ("words", "parts"),
    quick_first(
        [
            ("published", {"netvlad": True, "attention": True}),
            ("average,concat,unit", {"netvlad": False, "attention": False, "unit": True}),
            ("pooled", {"netvlad": True, "attention": False, "pooled": True}),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_published_configuration_matches_the_equations_of_the_paper(words, parts):
    """The cases are the paper's net and the simplest nets of its table 3."""
    config = config_io.load_file(f"{ROOT}/configs/mma.py:published,{words}").to_dict()
    assert config["data"]["crop"] == "quality"  # else the best of a window
    sizes = {name: WIDTHS[name] for name in config["modalities"]}
    spec = {**config["model"], "embed_dim": 8, "gram_dim": 4, "num_clusters": 2}
    model = identifier.make_identifier(spec, modalities=sizes, num_classes=7, num_clips=4)
    # Clips of up to 40 faces; the second has no audio, the third no face.
    lengths = {"face": [40, 3, 0], "head": [9, 2, 4], "body": [3, 1, 1], "audio": [1, 0, 1]}
    frames = {
        name: make_frames(lengths[name], max_frames=max(lengths[name]), dim=dim, seed=dim)
        for name, dim in sizes.items()
    }
    clips = ClipInfo(np.arange(3, dtype=np.int32), np.ones(3, np.int32), np.ones(3, bool))

    def fused():
        specs = {name: config["fusion"].get(name, {}).get("evaluate") for name in sizes}
        fuse = {name: fusion.make_fusion(specs[name] or {"name": "all"}) for name in sizes}
        return {name: fuse[name](None, value) for name, value in frames.items()}

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), fused(), clips, train=False))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes["params"]
    )
    norm = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    stats = {"face_netvlad": {"norm": norm}} if parts["netvlad"] else {}

    @jax.jit
    def run(params):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, fused(), clips, train=False).logits[:, 0]

    logits = run(params)
    for clip in range(3):
        expected = logits_of_the_paper(params, frames, clip, sizes, **parts)
        np.testing.assert_allclose(logits[clip], expected, atol=1e-3, rtol=1e-4)
