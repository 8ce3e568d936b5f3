"""Properties of every model. `tiny.make_batch` returns 6 clips and 2 padded rows.

The fallback has two branches. `main` needs a face. `other` answers if the face is missing or poor.
"""

import functools
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.helpers import made_models as tiny
from tests.helpers.batches import assert_equal, real_frames
from tests.helpers.cases import nightly_after_first
from tests.helpers.made_frames import pad
from tests.helpers.small_runs import shrunk
from vidjax.core import fusion
from vidjax.models import build_system
from vidjax.models.layers import Classifier, CosineClassifier
from vidjax.training import plan as plan_lib

DENSE = {"name": "dense", "layers": ((7, "swish", True, 0.0),)}
FALLBACK = {"name": "fallback", "main": DENSE, "other": DENSE, "other_modalities": ("head",)}
COSINE = {"head": "cosine", "logit_scale": 64.0}
DEEPMEF = {"name": "deepmef", "branch_dims": (6, 4), "hidden_dim": 8, "dropout_rate": 0.0}
RESIDUAL = {"name": "dense", "backbone": "residual", "width": 9, "dropout_rate": 0.0}
PLDA = {"name": "plda"}
assert_close = functools.partial(np.testing.assert_allclose, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "threshold"), [("norm", 2.4), ("quality", 50.0)])
def test_fallback_weights_match_a_loop_over_clips(measure, threshold):
    frames, clips = tiny.make_batch()
    face, head = frames["face"], frames["head"]
    clips = clips._replace(measure=fusion.mean_measure(face, measure))
    bare = {"name": "dense", "layers": ()}
    model = tiny.make_model(FALLBACK, main=bare, other=bare, measure=measure, threshold=threshold)
    out = tiny.eval_output(model, tiny.init_identifier(model, frames, clips), frames, clips)
    has_face, has_head = (clips.mask & part.mask.any(axis=1) for part in (face, head))
    norms = np.linalg.norm(face.features.astype(float), axis=2)
    measures = norms if measure == "norm" else face.quality
    wanted = []  # weights of the branches (main, other); 0.95, 0.2 and 0.8 are the defaults
    for b in range(8):
        if has_head[b] and not has_face[b]:
            wanted.append((0, 0.95))
        elif has_head[b] and measures[b, face.mask[b]].mean() < threshold:
            wanted.append((0.2, 0.8))
        else:
            wanted.append((1, 0))
    assert set(wanted) == {(1, 0), (0, 0.95), (0.2, 0.8)}, "all cases occur"
    np.testing.assert_array_equal(out.loss_weight, np.stack([has_face, has_head], axis=1))
    np.testing.assert_allclose(out.score_weight, wanted, rtol=1e-6)


@pytest.mark.slow
def test_each_branch_equals_a_separate_model_on_its_clips():
    """The other model learns its scale, but no weight: a modality alone needs none."""
    main = {**DENSE, "head": "cosine", "logit_scale": 16.0}
    other: Any = {"name": "cosine", "embed_dim": 7}
    frames, clips = tiny.make_batch()
    model = tiny.make_model(FALLBACK, main=main, other=other, main_modalities=("face",))
    variables = tiny.init_identifier(model, frames, clips)
    variables["params"] = tiny.randomised(variables["params"])
    assert "weights" not in variables["params"]["other"]  # below 0, it would negate all cosines
    variables["params"]["other"]["scale"] = np.float32(21)  # as if it was learned
    out, after = tiny.train_output(model, variables, frames, clips, jax.random.key(5))
    evaluated = tiny.eval_output(model, variables, frames, clips)
    np.testing.assert_array_equal(evaluated.logit_scale, [16, 21])
    for branch, (part, spec, used) in enumerate((("main", main, "face"), ("other", other, "head"))):
        sizes: Any = {"num_classes": 5, "num_clips": 6, "modalities": {used: tiny.DIMS[used]}}
        net = build_system.make_identifier(spec, **sizes)
        own = {collection: tree[part] for collection, tree in variables.items()}
        seen = clips.mask & frames[used].mask.any(axis=1)  # the branch learns from these
        logits, net_after = tiny.train_logits(net, own, frames, clips._replace(mask=seen), seed=5)
        assert_close(out.logits[:, branch][seen], logits[seen])
        jax.tree.map(assert_close, net_after["batch_stats"], after["batch_stats"][part])
        assert_close(evaluated.logits[:, branch], tiny.eval_logits(net, own, frames, clips))


def test_fallback_threshold_is_a_quantile_of_the_training_clips_or_a_given_number(data):
    """The norm uses all features of a face, although a member of `views` sees only a part."""
    spec, both = "configs/deepmef.py:iqiyi_vid,face,audio", "--config.data.train_splits=train,val"
    words = ("--config.model.threshold_share=0.2", "--config.ensemble.views=3", both)
    norms = sorted(
        np.linalg.norm(np.float64(frames.features), axis=-1).mean()
        for split in ("train", "val") for _, frames in real_frames(data, split)
        if len(frames.features)
    )  # fmt: skip
    fitted: Any = plan_lib.make_plan(shrunk(*words, spec=f"{spec},trainval"), data).task.settings
    assert fitted["threshold"] == pytest.approx(norms[int(0.2 * len(norms))], rel=1e-6)
    # The configuration has a `threshold_share`.
    absolute = shrunk("--config.model.threshold=2.5", spec=spec)
    with pytest.raises(ValueError, match="set one of them to 0"):
        plan_lib.make_plan(absolute, data)
    absolute.model.threshold_share = 0.0
    assert plan_lib.make_plan(absolute, data).task.settings is None


# name of a case -> (specification of a model, width of the embedding).
MODELS = {
    "mma": (tiny.SMALL, 5 * 8),  # three vectors of the face, one of the head, one of the voice
    "mma without attention": ({**tiny.SMALL, "attention": False}, 5 * 8),
    "dense, cosine": ({**DENSE, **COSINE}, 7),
    "residual": (RESIDUAL, 9),
    "deepmef": (DEEPMEF, tiny.DIMS["face"] + 2 + 4 + 4),  # face and its two scores, head, audio
    "cosine": ({"name": "cosine", "embed_dim": 7}, 7 * len(tiny.DIMS)),
    "knn": ({"name": "knn"}, tiny.DIMS["face"]),
    "fallback": (FALLBACK, 7 + 7),
}
DROPOUT = {
    "mma": {"modality_dropout_rate": 0.9, "dropout_rate": 0.5},
    "cosine": {"modality_dropout_rate": 0.5, "dropout_rate": 0.5},
    "dense, cosine": {"modality_dropout_rate": 0.9, "layers": ((7, "swish", True, 0.5),)},
    "residual": {"dropout_rate": 0.5},
    "deepmef": {"modality_dropout_rate": 0.9, "dropout_rate": 0.5},
}
MARKS = {"dense, cosine": (), "knn": (), "mma": pytest.mark.slow, "deepmef": pytest.mark.slow}
NETS = [pytest.param(name, marks=MARKS.get(name, pytest.mark.nightly)) for name in MODELS]
LEARNED = [net for net in NETS if net.values != ("knn",)]
Net = namedtuple("Net", "model variables frames clips")


@functools.cache
def made(name):
    """Returns a model of MODELS with random parameters, and the batch of `tiny`."""
    frames, clips = tiny.make_batch(dtype="float32")
    model = tiny.make_model(MODELS[name][0])
    variables = dict(tiny.init_identifier(model, frames, clips))
    if "params" in variables:
        variables["params"] = tiny.randomised(variables["params"])
    return Net(model, variables, frames, clips)


@functools.partial(jax.jit, static_argnums=0)
def learned(model, variables, frames, clips, seed=5):
    """Returns the output of a training step, the variables after the step, and a gradient."""

    def loss(params):
        given = {**variables, "params": params}
        output, new = tiny.train_output(model, given, frames, clips, jax.random.key(seed))
        return jnp.sum(jax.nn.log_softmax(output.logits)[..., 1]), (output, {**variables, **new})

    gradient, (output, after) = jax.grad(loss, has_aux=True)(variables.get("params", {}))
    return output, after, gradient


@functools.partial(jax.jit, static_argnums=0)
def evaluated(model, variables, frames, clips):
    """Returns the output of evaluation, and the input [B, D] of each classifier of the model."""
    inputs = []

    def note(call, args, kwargs, context):
        heads = (Classifier, CosineClassifier)
        if isinstance(context.module, heads) and context.method_name == "__call__":
            inputs.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        return model.apply(variables, frames, clips, train=False), inputs


def test_every_model_is_tested_against_the_contract():
    """PLDA has no net: test_models_plda checks the same properties of its sums."""
    assert {spec["name"] for spec, _ in MODELS.values()} == build_system.MODELS.keys() - {"plda"}


@pytest.mark.parametrize("name", NETS)
def test_outputs_do_not_depend_on_padding_or_the_order_of_frames(name):
    net = made(name)
    output, after, _ = learned(*net)
    assert output.logits.dtype == np.float32 and np.isfinite(output.logits).all()
    # The same clips with reversed frames, with garbage in padded rows, and with more padding.
    real, garbage = net.clips.mask, {}
    reverse = jax.tree.map(lambda x: x[:, ::-1], net.frames)
    for key, value in net.frames.items():
        features = np.where(real[:, None, None], value.features, 99)
        quality = np.where(real[:, None], value.quality, np.nan)
        garbage[key] = value._replace(features=features, quality=quality)
    longer = {key: pad(value, 3) for key, value in net.frames.items()}
    # Training gives the same logits and statistics.
    results = [learned(*net._replace(frames=frames))[:2] for frames in (reverse, garbage)]
    results.append(tiny.train_output(*net._replace(frames=longer), jax.random.key(5)))
    scale = net.model.logit_scale  # above 1, the logits are cosines x scale
    atol = 1e-5 if scale == 1 else 6e-6 * scale
    for other, other_after in results:
        np.testing.assert_allclose(other.logits[real], output.logits[real], atol=atol)
        for part in other_after.keys() - {"params"}:
            jax.tree.map(assert_close, other_after[part], after[part])
    # Evaluation gives the same outputs despite garbage in the padded rows 6 and 7, also for these
    # rows. Only knn gives other outputs for the padded rows, because it scores the garbage.
    before, other = (evaluated(net.model, after, x, net.clips)[0] for x in (net.frames, garbage))
    assert_equal(*jax.tree.map(lambda x: x[: 6 if name == "knn" else 8], (before, other)))


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_are_finite_without_features_and_zero_without_frames(name):
    net = made(name)
    for field in ("features", "mask"):  # features of 0, then no frames
        frames = {}
        for key, value in net.frames.items():
            frames[key] = value._replace(**{field: np.zeros_like(getattr(value, field))})
        output, after, gradient = learned(*net._replace(frames=frames))
        for leaf in jax.tree.leaves((gradient, output.logits, after)):
            assert np.isfinite(leaf).all()
    # The last gradient is of clips without frames. It is 0 for the layers of each modality.
    for part, leaves in gradient.items():
        if part.startswith(tuple(f"{key}_" for key in tiny.DIMS)):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(leaves)), part
    if name in ("cosine", "deepmef"):  # they have no bias
        np.testing.assert_array_equal(output.logits, 0)
    stats = "batch_stats"  # no row counts, so they stay
    assert_equal(after.get(stats), jax.tree.map(np.asarray, net.variables.get(stats)))


@pytest.mark.parametrize("name", LEARNED)
def test_bfloat16_outputs_are_close_to_float32_with_float32_parameters(name):
    net = made(name)
    half = net._replace(model=tiny.make_model(MODELS[name][0], dtype="bfloat16"))
    fresh = jax.eval_shape(lambda: tiny.init_identifier(half.model, net.frames, net.clips))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(fresh)} == {"float32"}
    (output, _), (other, _) = evaluated(*net), evaluated(*half)
    assert other.embedding.dtype == other.logits.dtype == np.float32
    scale = net.model.logit_scale  # above 1, the logits are cosines x scale
    assert 0 < np.abs(other.logits - output.logits).max() < (0.03 if scale == 1 else 0.02 * scale)


@pytest.mark.slow
@nightly_after_first("name", DROPOUT)
def test_dropout_is_used_only_in_training(name):
    plain = made(name)
    dropping = plain._replace(model=tiny.make_model({**MODELS[name][0], **DROPOUT[name]}))
    (without, *_), (with_dropout, *_) = learned(*plain), learned(*dropping)
    assert not np.array_equal(with_dropout.logits, without.logits)
    with_another_seed, *_ = learned(*dropping, seed=6)
    assert not np.array_equal(with_dropout.logits, with_another_seed.logits)
    evaluated(*dropping)  # without a random key, so dropout would raise an error


@pytest.mark.parametrize(("spec", "options", "message"), [
    ({"name": "mlp"}, {}, f"choose from {', '.join(sorted(build_system.MODELS))}"),
    ({"name": "mma", "num_classes": 3}, {}, "no option num_classes"),
    (tiny.SMALL, {"gama": 1}, "gama; its options: attention, (.|\n)*if another version of vidjax"),
    (tiny.SMALL, {"attention": "off"}, "attention='off': must be True or False"),
    (tiny.SMALL, {"logit_scale": 16.0}, "config.model.head=cosine"),
    (DENSE, {"backbone": "deep"}, "unknown backbone 'deep'; choose from block, mlp, residual"),
    (DENSE, {"width": 8}, "backbone 'mlp' has no option width"),
    (DENSE, {"layers": ((8, "gelu", False, 0.0),)}, "unknown activation 'gelu'; choose from"),
    (DENSE, {"layers": ((0, "relu", False, 0.0),)}, r"Expected `int` >= 1 - at `\$\[0\]\[0\]`"),
    (RESIDUAL, {"dropout_rate": 1.5}, "dropout_rate=1.5: Expected `float` <= 1.0"),
    (DEEPMEF, {"modality": "scene"}, "or choose one of these for config.model.modality"),
    (DEEPMEF, {"channel_attention": "channels"}, "needs 40 frames, not 4"),
    (PLDA, {"scale": 0.0}, "scale=0.0: Expected `float` > 0.0"),
    (PLDA, {"within": (0.5, None)}, r"Expected `float`, got `null` - at `\$\[1\]`"),
    (FALLBACK, {"main": 1}, "main=1: Expected `object`, got `int`"),
    ({"name": "fallback"}, {}, "model 'fallback' needs main, other, other_modalities"),
    (FALLBACK, {"threshold_share": 1.0}, "threshold_share=1.0: Expected `float` < 1.0"),
    (FALLBACK, {"other_share": -0.2}, "other_share=-0.2: Expected `float` >= 0.0"),
    (FALLBACK, {"other_modalities": ("face",)}, "modalities other than 'face', not face"),
    (FALLBACK, {"other_modalities": ("scene",)}, "'fallback': other_modalities lists scene"),
    (FALLBACK, {"main": {**DENSE, **COSINE}}, "must be equal, not 64.0 and 1"),
    (FALLBACK, {"main": FALLBACK}, "the models 'main' and 'other' must have one branch"),
    (FALLBACK, {"other": {"name": "plda"}}, "choose networks, or train two runs"),
])  # fmt: skip
def test_impossible_model_options_are_refused(spec, options, message):
    frames, clips = tiny.make_batch()
    with pytest.raises(ValueError, match=message):
        tiny.init_identifier(tiny.make_model(spec, **options), frames, clips)


@pytest.mark.parametrize("name", NETS)
def test_embedding_is_the_input_of_the_classifier(name):
    net = made(name)
    output, inputs = evaluated(*net)
    wanted = inputs
    if name == "fallback":  # the unit vectors of both branches, or 0 if a branch has the weight 0
        weights = np.asarray(output.score_weight).T[..., None]  # [branches, clips, 1]
        counted = [x * (weight > 0) for x, weight in zip(inputs, weights, strict=True)]
        wanted = [x / np.maximum(np.linalg.norm(x, axis=1)[:, None], 1e-12) for x in counted]
    if name == "knn":  # it has no classifier, and compares mean faces
        face = net.frames["face"]
        real = face._replace(mask=face.mask & net.clips.mask[:, None])
        wanted = [fusion.mean_frame(real).features[:, 0]]
    np.testing.assert_allclose(output.embedding, np.hstack(wanted), rtol=1e-6, atol=1e-7)
    assert output.embedding.shape[1] == MODELS[name][1]
