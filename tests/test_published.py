"""`CONFIG:published` against the numbers of its publication and of its code.

Code of DeepMEF: github.com/LegenDong/IQIYI_VID_FACE_2019 at 258ff92; of noise classes:
github.com/luckycallor/IQIYI_VID_5th at 72a2368.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy import special

from tests.helpers.made_frames import make_frames, one_hot_frames
from tests.helpers.made_models import init, randomised
from vidjax.core import augment, ensemble, fusion, losses, optim
from vidjax.core.batch import Frames, ModelOutput
from vidjax.models.deepmef import ChannelAttention
from vidjax.models.layers import ResidualBlock
from vidjax.models.system import System, TaskSpec, make_system
from vidjax.runs.config_io import load_file
from vidjax.training import train_step

pytestmark = pytest.mark.slow
CLIPS = 57_820  # of train
DEEPMEF = "deepmef:iqiyi_vid,face,scene,published"
NOISE = "noise_classes:iqiyi_vid,published"
QUALITY_FUSION = "quality_fusion:iqiyi_vid,published"
RESIDUAL_DENSE = "residual_dense:iqiyi_vid,published"
one_clip = functools.partial(one_hot_frames, padding=0, dtype="float32")


@functools.cache
def official(spec: str) -> tuple[Any, System]:
    """Returns a configuration, and its system with the sizes of the official data."""
    config = load_file(spec)
    widths = {name: 2048 if name == "scene" else 512 for name in config.modalities}
    clusters = 3691 if config.data.distractors == "noise" else None
    steps = math.ceil(config.num_epochs * CLIPS / config.batch_size)
    task = TaskSpec(widths, 10_034, clusters, CLIPS, steps, train_other=True)
    return config, make_system(config.to_dict(), task)


def shapes(spec: str) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of the parameters of one member."""
    _, system = official(spec)
    labels, rngs = jnp.zeros((1, CLIPS), jnp.int32), ensemble.make_rngs((ensemble.Member(),), 0)
    params = jax.eval_shape(lambda: train_step.init_state(system, rngs, labels)).params
    flat: Any = flatten_dict(params, sep="/")
    return {name: x.shape[1:] for name, x in flat.items()}


# The rate of an epoch such as 8.9 is the rate of the first step after it.
@pytest.mark.parametrize(("spec", "epochs", "published"), [
    (RESIDUAL_DENSE, range(8), 0.01 * 0.7 ** np.arange(8)),  # line 34 of the article
    (QUALITY_FUSION, (0, 8.9, 9, 58.9, 59, 109, 159, 199),  # training.py:314-331
     [2e-5, 2e-5, 1.5e-4, 1.5e-4, 7.5e-5, 3.75e-5, 1.875e-5, 1.875e-5]),
    # CosineAnnealingLR over 100 epochs, stepped once per epoch, ends near 0.
    (DEEPMEF, (0, 0.9, 1, 1.9, 2, 10, 50, 99),
     0.05 + 0.05 * np.cos(np.pi * np.array([0, 0, 1, 1, 2, 10, 50, 99]) / 100)),
    (NOISE, (0, 10, 20, 100, 199), [1e-3] * 5),
], ids=["residual_dense", "quality_fusion", "deepmef", "noise_classes"])  # fmt: skip
def test_learning_rates_equal_the_published_rates(spec, epochs, published):
    config, system = official(spec)
    steps = np.ceil(np.asarray(epochs) * CLIPS / config.batch_size).astype(np.int32)
    rates: list[Any] = [system.lr_schedule(step) for step in steps]
    np.testing.assert_allclose(rates, published, rtol=1e-5)


def training_weight(system, clip, min_quality=-1000.0):
    """Returns the weight of the loss of one clip."""
    _, (weight,) = trained_on(system, clip, min_quality)
    return weight


def trained_on(system, frames, min_quality=-1000.0):
    """Returns the face frames of a training step, and the weights of the losses of the clips."""
    ones = jnp.ones(len(frames.mask))
    clips = augment.MemberClips({"face": frames}, ones, ones, jnp.float32(min_quality), ())
    for transform in system.clip_transforms:
        clips = transform(jax.random.key(0), clips)
    fused = system.fuse(jax.random.key(1), clips.frames, jnp.int32(-1))  # all features
    clips = clips._replace(frames=fused, weight=clips.weight * fusion.has_frames(fused))
    for transform in system.transforms:
        clips = transform(jax.random.key(2), clips)
    return clips.frames["face"], np.asarray(clips.weight)


# Residual Dense Net: lines of the article.


def test_residual_dense_has_the_training_settings_of_the_article():
    config, _ = official(RESIDUAL_DENSE)
    assert config.num_epochs == 8 and config.optim.name == "adam"  # line 34 of the article
    assert (config.optim.total_decay, config.optim.weight_decay, config.mixup) == (0, 0, 0)
    assert (config.loss.classification, config.loss.label_smoothing) == ("softmax", 0)
    assert (config.eval.top_classes, config.after_fusion) == (100, "examples")  # line 36
    assert config.eval.reduce == "mean"  # line 36


@pytest.mark.nightly
def test_residual_dense_trains_three_nets_on_frames_above_quality_bounds():
    config, system = official(f"{RESIDUAL_DENSE},face,trainval")
    members = ensemble.make_members(config.ensemble.to_dict())
    assert config.ensemble.folds == 10  # line 22 of the article
    assert [member.fold for member in members] == [0, 0, 0]  # all leave out fold 0

    # Each kept frame counts twice, because training adds a merged frame for each frame.
    frames = one_clip([-5, 19.9, 20, 20.1, 40, 40.1])
    weights = [training_weight(system, frames, member.min_quality) for member in members]
    assert weights == [2 * 6, 2 * 3, 2 * 1]  # line 32: all, > 20, > 40
    # The second member drops a clip whose frames are all at most 20.
    assert training_weight(system, one_clip([20.0, 3.0]), members[1].min_quality) == 0


@pytest.mark.nightly
def test_residual_dense_trains_on_all_frames_and_as_many_merged_frames():
    _, system = official(f"{RESIDUAL_DENSE},face")
    frames = make_frames([9, 1, 4], max_frames=9, dtype="float32", dim=512)

    union, weights = trained_on(system, frames)
    own, merged = np.split(np.asarray(union.features), 2, axis=1)

    np.testing.assert_array_equal(weights, [18, 2, 8])  # line 32: long clips have more frames
    np.testing.assert_array_equal(union.mask.sum(axis=1), weights)
    np.testing.assert_array_equal(own, frames.features)  # line 32 of the article: "combined with"

    # A merged frame is a weighted mean of 2 to 5 frames. Least squares finds their weights.
    shares, *_ = np.linalg.lstsq(np.asarray(frames.features[0]).T, merged[0].T, rcond=None)
    shares = shares.T  # [9 merged frames, 9 frames] of clip 0
    assert set(np.count_nonzero(shares > 1e-3, axis=1)) <= {2, 3, 4, 5}  # line 32: 1 to 4 others
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)


@pytest.mark.nightly
def test_residual_dense_keeps_the_best_70_percent_of_its_own_and_merged_frames():
    _, system = official(f"{RESIDUAL_DENSE},face")
    fused = system.fuse(None, {"face": make_frames([10, 1], max_frames=10)}, jnp.int32(-1))["face"]
    # Line 36 of the article: 70 % of 10 own and 10 merged frames, or of 1 own and 1 merged.
    np.testing.assert_array_equal(fused.mask.sum(axis=1), [14, 2])  # 0.7 x 2 = 1.4 is rounded up
    quality, kept = np.asarray(fused.quality)[0], np.asarray(fused.mask)[0]  # of clip 0
    assert quality[kept].min() >= quality[~kept].max()


def test_residual_dense_has_the_layer_sizes_of_the_article():
    sizes = shapes(f"{RESIDUAL_DENSE},face")
    for i, width in enumerate((512, 8192, 8192)):
        assert sizes[f"backbone/layer_{i}/dense/kernel"] == (width, 8192)
        assert sizes[f"backbone/layer_{i}/norm/scale"] == (8192,)
    assert sizes["classifier/logits/kernel"] == (8192, 10_035)  # line 14: 10,034 people, strangers
    products = sum(2 * np.prod(shape) for name, shape in sizes.items() if "kernel" in name)
    assert 0.4e9 < products < 0.5e9  # line 5 of the article: about 0.5 GFLOP


# Quality fusion: lines of the article; training.py and inference.py at 60f5127.


def test_quality_fusion_trains_five_folds_that_score_by_sigmoids():
    config, system = official(f"{QUALITY_FUSION},trainval")
    assert (config.batch_size, config.optim.name) == (512, "adam")  # training.py:215, 314
    assert len(ensemble.make_members(config.ensemble.to_dict())) == 5  # training.py:112
    assert config.data.train_splits == ("train", "val")  # training.py:70
    scores = system.score_fn(jnp.array([0.0, 2.0]), jnp.ones(2, bool))
    np.testing.assert_allclose(np.exp(scores), [0.5, 0.880797], rtol=1e-5)  # inference.py:169
    assert system.scores_are_logs


def test_quality_fusion_reweights_its_losses_after_24_and_99_epochs():
    config, _ = official(QUALITY_FUSION)
    logits, label = np.array([[2.0, -1.0, 0.5]]), 1
    softmax = np.log(np.exp(logits).sum()) - logits[0, label]
    # Sigmoids: probabilities that class 1 is right, and that classes 0 and 2 are not.
    right = special.expit(np.array([-1, 1, -1]) * logits[0])
    focal = np.sum((1 - right) ** 2 * -np.log(right))  # training.py:267-282, gamma 2

    epoch_steps = CLIPS / config.batch_size
    sizes = {"class_mask": None, "steps_per_epoch": epoch_steps}
    objective = losses.make_objective(config.loss.to_dict(), **sizes, logit_scale=1.0)
    output = ModelOutput(jnp.asarray(logits, jnp.float32)[:, None], embedding=jnp.zeros((1, 4)))
    for epoch, share in ((0, 0.75), (23.9, 0.75), (24.1, 1), (98.9, 1), (99.1, 0.98), (199, 0.98)):
        step = jnp.int32(round(epoch * epoch_steps))
        loss = objective(output, jnp.array([label]), jnp.ones(1, bool), step)
        wanted = share * focal + (1 - share) * softmax  # training.py:295, 308, 327-333
        np.testing.assert_allclose(loss, [wanted], rtol=1e-4, err_msg=str(epoch))


@pytest.mark.nightly
def test_quality_fusion_drops_training_clips_without_a_good_face():
    config, system = official(QUALITY_FUSION)
    assert config.data.max_frames == 4096  # training.py:84, 144: all faces of a clip
    for quality, detection, weight in (
        ([25.0, 24.9, 80.0], 0.9, 1), ([24.9, 3.0, -1.0], 0.9, 0),  # training.py:94, 98
        ([80.0], 0.69, 0), ([80.0], 0.7, 1),
    ):  # fmt: skip
        assert training_weight(system, one_clip(quality, detection)) == weight
    probs = config.fusion.face.train.probs  # of 1 to 5 faces
    assert probs == (0.25, 0, 0.65, 0, 0.1)  # training.py:162-167


def test_quality_fusion_weights_evaluated_faces_by_graded_quality():
    quality = np.array([-1, 0, 10, 20, 25, 30, 35, 40, 90], np.float32)
    wanted = 0.9 * quality * [0, 0.2, 0.2, 0.3, 0.3, 0.6, 0.6, 1, 1]  # inference.py:95-104
    weights = fusion.frame_weights(one_clip(quality, detection=0.9), "graded")[0]
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_quality_fusion_nets_have_the_layer_sizes_of_the_code():
    hidden = {"mlp1": (), "mlp2": (512,), "mlp3": (), "mlp4": (768,), "mlp5": (1024,)}
    for net, widths in hidden.items():
        sizes = shapes(f"{QUALITY_FUSION},{net}")  # inference.py:200-256
        kernels = [shape for name, shape in sorted(sizes.items()) if name.endswith("dense/kernel")]
        assert kernels == list(itertools.pairwise((512, *widths, 1024)))
        assert sizes["classifier/logits/kernel"] == (1024, 10_035)  # line 22 of the article
        assert any("norm" in name for name in sizes) == (net not in ("mlp4", "mlp5"))


# The iQIYI-VID paper, "iQIYI-VID: A Large Dataset for Multi-modal Person Identification" (no code).


def test_mma_has_the_parameter_shapes_and_settings_of_the_paper():
    sizes = shapes("mma:published,iqiyi_vid")  # below: lines of the paper
    assert sizes["attention_map/w_f/kernel"] == (512, 64)  # line 215: "D is set to 512 ... 64"
    # "3 of the 6 features come from face" (line 170), "squeezed into a vector" (line 184)
    assert sizes["classifier/logits/kernel"] == (6 * 512, 10_035)
    assert sizes["face_map/kernel"][1] == 3 * 512
    for name in ("head", "body", "audio"):  # "did not apply NetVLAD to the other modal" (line 254)
        assert sizes[f"{name}_map/kernel"] == (512, 512)
    # "a Batch-normalization (BN) layer after the Fully-connected (FC) layer" (line 159)
    clusters = sizes["face_netvlad/centers"][0]
    assert sizes["face_netvlad/assignment/kernel"] == (512, clusters)
    assert sizes["face_netvlad/norm/scale"] == (clusters,)
    maps = {f"{name}_map" for name in ("face", "head", "body", "audio", "attention")}
    assert {name.split("/")[0] for name in sizes} == {*maps, "classifier", "face_netvlad"}
    model = load_file("mma:published,iqiyi_vid").model.to_dict()
    assert model["gamma"] == 0.05 and not model["train_gamma"]  # line 215
    assert model["netvlad_norms"] == ("batch",)  # "better to remove the L2 norm" (line 159)
    assert (model["attention_form"], model["gram_scale"]) == ("gram", 1.0)  # equation 2 (line 176)
    assert model["netvlad_reduce"] == "sum"  # "a weighted sum" (line 153)


def test_mma_uses_the_32_best_faces_and_repeats_faces_of_short_clips():
    """Line 142 of the paper. The fusion `top` is tested in test_fusion.py."""
    config = load_file("mma:published,iqiyi_vid")
    assert config.data.crop == "quality"  # the best faces of the clip, not of a window
    top = {"name": "top", "num_frames": 32}
    assert config.fusion.face.to_dict() == {"train": top, "evaluate": top | {"repeats": "random"}}


def test_mma_trains_three_nets_on_different_parts_of_the_clips():
    """Three models "trained on different partition of the training set" (line 252)."""
    spec = load_file("mma:published,iqiyi_vid,ensemble").ensemble.to_dict()
    labels = np.repeat(np.arange(1, 21), 6)
    uses = ensemble.count_clip_uses(ensemble.make_members(spec), labels, spec["folds"], seed=0)
    np.testing.assert_array_equal(uses.sum(axis=0), [2] * 120)  # each clip is left out by one net
    np.testing.assert_array_equal(uses.sum(axis=1), [80] * 3)


# DeepMEF, third place of 2019.


def test_deepmef_has_the_training_settings_of_its_code():
    """demo_train_face_scene_multi_view.py: the default arguments, optimiser and loss."""
    config, system = official(DEEPMEF)
    optim, loss, main = config.optim, config.loss, system.model.main
    assert (config.batch_size, config.num_epochs) == (4096, 100)
    assert (optim.name, optim.momentum, optim.clip_norm) == ("sgd", 0.9, 0)
    assert (loss.margin, loss.gamma, config.data.distractors) == (0.5, 2, "leave_out")
    # demo_test_face_scene_multi_view.py: Softmax of the net's output, without the factor of 30.
    assert config.eval.temperature == 30 == system.model.logit_scale
    assert (config.mixup, config.transforms, config.model.main.modality_dropout_rate) == (0, (), 0)
    assert load_file(f"{DEEPMEF},trainval").data.train_splits == ("train", "val")
    # sep_cat_qds_face_scene_transforms: the feature, quality / 100, detection.
    assert (main.rms_norm, main.feature_scale, main.num_frames) == (False, 1, 40)
    forms = (main.channel_attention, main.channel_norm, main.layer_form)
    assert forms == ("channels", True, "published")


def test_deepmef_weight_decay_applies_to_every_parameter():
    """Two steps equal SGD(momentum=0.9, weight_decay=1e-5), computed by hand."""
    spec = load_file(DEEPMEF).optim.to_dict()
    optimizer, _ = optim.make_optimizer(spec, total_steps=1413, steps_per_epoch=14.125)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, -5.0), "slope": jnp.float32(7)}
    grads = jax.tree.map(lambda x: 0.25 * jnp.ones_like(x), params)
    state, momentum, wanted = optimizer.init(params), dict.fromkeys(params, 0), dict(params)

    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name in params:
            momentum[name] = 0.9 * momentum[name] + 0.25 + 1e-5 * wanted[name]
            wanted[name] = wanted[name] - 0.1 * momentum[name]
            np.testing.assert_allclose(params[name], wanted[name], rtol=1e-6)


def test_deepmef_views_hide_the_same_feature_chunks_as_the_code():
    """View v hides chunk v of 16, or of 32 for only the scene (scripts/main.sh, get_mask_index)."""
    config, system = official(f"{DEEPMEF},views")
    members = ensemble.make_members(config.ensemble.to_dict())
    assert [member.view for member in members] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15]

    # Features count from 0, so that the features of a view show which of 16 chunks is hidden.
    ones, widths = jnp.ones((1, 1)), {"face": 512, "scene": 2048}
    frames = {
        name: Frames(jnp.arange(width)[None, None] * 1.0, ones, ones, ones.astype(int), ones == 1)
        for name, width in widths.items()
    }
    for view in (0, 15):
        seen = system.fuse(None, frames, jnp.int32(view))
        for name, width in widths.items():
            hidden = np.s_[width // 16 * view : width // 16 * (view + 1)]
            assert {*seen[name].features[0, 0].tolist()} == {*np.delete(range(width), hidden)}

    only_scene = load_file("deepmef:scene,published,views").ensemble.to_dict()
    views = [member.view for member in ensemble.make_members(only_scene)]
    assert views == [1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15]


def test_deepmef_parameters_have_the_names_and_shapes_of_the_code():
    """models/models.py, ArcFaceSceneModel and ArcSceneFeatModel; channel_attention_layer.py."""
    sizes = shapes(f"{DEEPMEF},views")
    norms = {"theta": 20, "phi": 20, "out": 40}
    wanted = {f"{x}_norm/{part}": (n,) for x, n in norms.items() for part in ("scale", "bias")}
    wanted |= {f"{name}/kernel": (40, 20) for name in ("theta", "phi", "g")}
    wanted |= {"out/kernel": (20, 40)}  # no layer has a bias
    attention = "main/channel_attention/"
    assert {x.removeprefix(attention): n for x, n in sizes.items() if attention in x} == wanted

    # A net sees 15 of 16 chunks: 480 of 512 numbers of a face, 1920 of 2048 of a scene.
    # 482 is a face with its two scores, and 602 also has the 120 numbers of the scene's branch.
    wanted = {
        "main/aggregation/query": (482,),
        "main/scene_0/dense/kernel": (1920, 480), "main/scene_1/dense/kernel": (480, 120),
        "main/block/hidden/dense/kernel": (602, 964), "main/block/back/dense/kernel": (964, 602),
        "main/classifier/kernel": (602, 10_035),
        "other/backbone/hidden/dense/kernel": (1920, 3840),
        "other/classifier/kernel": (1920, 10_035),
    }  # fmt: skip
    assert {name: sizes[name] for name in wanted} == wanted


def test_residual_block_starts_with_kaiming_normal_weights():
    """nn.init.kaiming_normal_. A truncated normal would end at 2.3 standard deviations."""
    params = init(ResidualBlock(1024), jnp.ones((2, 512)), jnp.ones(2, bool), train=False)
    for name, inputs in (("hidden", 512), ("back", 1024)):
        weights = np.asarray(params["params"][name]["dense"]["kernel"]) / np.sqrt(2 / inputs)
        assert weights.std() == pytest.approx(1, rel=0.01)
        assert np.abs(weights).max() > 4


def test_deepmef_channel_attention_equals_the_attention_of_its_code():
    """Maps over 4 frames have no bias. BatchNorm follows theta, phi and out."""
    frames = make_frames([4, 4, 0, 4], max_frames=4, dtype="float32")
    layer: Any = ChannelAttention("channels", num_frames=4, norm=True)
    variables = init(layer, frames.features, frames.mask)
    for name in ("theta", "phi", "out"):  # all start at 0, so theta and phi never learn
        np.testing.assert_array_equal(variables["params"][name]["kernel"], 0)

    params = randomised(variables["params"])
    apply = jax.jit(functools.partial(layer.apply, train=True, mutable=["batch_stats"]))
    out, new = apply({**variables, "params": params}, frames.features, frames.mask)

    real = np.array([0, 1, 3])  # the clips with frames
    rows = np.swapaxes(frames.features[real], 1, 2).astype(np.float64)  # [B, D, T]

    def mapped(name, x):
        y, norm = x @ np.asarray(params[name]["kernel"], np.float64), params[f"{name}_norm"]
        unit = (y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5)  # BatchNorm per channel
        return unit * norm["scale"] + norm["bias"]

    theta, phi, g = mapped("theta", rows), mapped("phi", rows), rows @ params["g"]["kernel"]
    affinity = special.softmax(np.einsum("bdi,bdj->bij", theta, phi), axis=-1)
    added = mapped("out", np.einsum("bij,bdj->bdi", affinity, g))
    wanted = frames.features[real] + np.swapaxes(added, 1, 2)
    np.testing.assert_allclose(out[real], wanted, atol=1e-4)
    np.testing.assert_array_equal(out[2], 0)

    means = new["batch_stats"]["theta_norm"]["mean"]  # moves by 0.1 to the mean, as in torch
    wanted_means = 0.1 * (rows @ params["theta"]["kernel"]).mean((0, 1))
    np.testing.assert_allclose(means, wanted_means, atol=1e-5)


@pytest.mark.nightly
def test_deepmef_samples_40_frames_and_repeats_frames_of_short_clips():
    """np.random.choice(frames, 40, replace=len(frames) < 40); evaluation always draws the same."""
    spec = load_file(DEEPMEF).fusion.face.train.to_dict()
    assert spec == load_file(DEEPMEF).fusion.face.evaluate.to_dict()
    sample, frames = fusion.make_fusion(spec), make_frames([50, 40, 5, 5, 0], max_frames=50)
    draw = jax.jit(jax.vmap(lambda key: sample(key, frames).number))

    # [400 draws, 5 clips, 40 frames]: frame t of `make_frames` has the number 10 * t.
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 400))) // 10

    # 50 frames: 40 different frames are drawn, each with the same probability, 40 / 50.
    assert all(len(set(row)) == 40 for row in drawn[:, 0].tolist())
    shares = np.bincount(drawn[:, 0].ravel(), minlength=50) / 400
    np.testing.assert_allclose(shares, 0.8, atol=0.08)

    # 40 frames: all are drawn, in random order.
    np.testing.assert_array_equal(np.sort(drawn[:, 1]), [np.arange(40)] * 400)
    assert 17 < np.argmax(drawn[:, 1] == 7, axis=1).mean() < 22

    # 5 frames: each is drawn 8 times on average, and its count is binomial.
    counts = np.stack([np.sum(drawn[:, 2] == t, axis=1) for t in range(5)])
    np.testing.assert_allclose(counts.mean(axis=1), 8, atol=0.4)
    np.testing.assert_allclose(counts.var(axis=1), 40 * 0.2 * 0.8, rtol=0.25)

    # Evaluation has no key. Its draw is fixed, and is equal for clips of equal length.
    fixed = np.asarray(sample(None, frames).number) // 10
    assert len(set(fixed[0].tolist())) == 40
    assert (np.diff(fixed[0]) < 0).any()  # not in order of time
    np.testing.assert_array_equal(fixed[2], fixed[3])
    assert len(set(np.bincount(fixed[2], minlength=5).tolist())) > 1  # not each frame 8 times


def test_deepmef_focal_factor_uses_the_mean_loss_of_the_batch():
    """models/losses.py of the code: the mean cross-entropy of a batch x (1 - exp(-mean))**2."""
    cosines = np.random.default_rng(1).uniform(-0.9, 0.9, (6, 2, 5))  # [clips, branches, classes]
    labels = np.array([1, 2, 3, 4, 1, 2], np.int32)
    mask, sees = np.arange(6) < 5, np.ones((6, 2), np.float32)  # row 5 is padding
    sees[2, 0] = 0  # branch 0 does not learn from clip 2, so it is not in the batch of branch 0
    spec = load_file(DEEPMEF).loss.to_dict()
    sizes = {"class_mask": None, "steps_per_epoch": 14.125}
    objective = losses.make_objective(spec, **sizes, logit_scale=30.0)

    def total(cosines):
        output = ModelOutput(30 * cosines, jnp.zeros((6, 1)), train_weight=jnp.asarray(sees))
        per_clip = jnp.where(mask, objective(output, labels, mask, jnp.int32(0)), 0)
        return jnp.sum(per_clip) / mask.sum()

    def by_hand(cosines):
        loss = 0.0
        for branch in range(2):
            rows = np.flatnonzero(mask & (sees[:, branch] > 0))
            cosine, at_label = cosines[rows, branch], (np.arange(len(rows)), labels[rows])
            angle = np.arccos(cosine[at_label])  # ArcFace adds 0.5 to the angle at the label
            beyond_pi = np.cos(angle) - 0.5 * np.sin(0.5)
            cosine[at_label] = np.where(angle < np.pi - 0.5, np.cos(angle + 0.5), beyond_pi)
            mean = np.mean(np.log(np.exp(30 * cosine).sum(axis=1)) - 30 * cosine[at_label])
            loss += (1 - np.exp(-mean)) ** 2 * mean
        return loss

    # The slope is compared in one number: at clip 3, branch 1 and class 4, the label of the clip.
    shift = np.zeros_like(cosines)
    shift[3, 1, 4] = 1e-5
    with jax.enable_x64(True):
        value, slope = jax.jit(jax.value_and_grad(total))(jnp.asarray(cosines))
    np.testing.assert_allclose(value, by_hand(cosines), rtol=1e-6)
    expected = (by_hand(cosines + shift) - by_hand(cosines - shift)) / 2e-5
    np.testing.assert_allclose(slope[3, 1, 4], expected, rtol=1e-4)


# Noise classes, fifth place of 2018.


def test_noise_classes_have_the_training_settings_of_their_code():
    """parse_args and the main program of fn_weightedMean_v2_multiModel_refuse_v4.py."""
    config = load_file(NOISE)
    assert (config.batch_size, config.num_epochs, config.ensemble.folds) == (10_240, 200, 8)
    optim = config.optim
    assert (optim.name, optim.weight_decay, optim.total_decay) == ("adam", 0, 0)
    assert (config.loss.margin, official(NOISE)[1].model.logit_scale) == (0.5, 64)
    assert config.noise.relabel_every_epochs == 1
    assert config.loss.mean_over == "clips"  # reduce_mean(cross-entropy x weight)
    sizes = shapes(NOISE)  # C identities, K clusters: 1 + 2C + K classes
    assert sizes["classifier/kernel"] == (512, 1 + 2 * 10_034 + 3691)
    assert sizes["backbone/layer_0/dense/kernel"] == (512, 512)


def test_weight_of_mirror_classes_rises_every_20_epochs():
    """noise_weight = [0.1, ..., 0.6], each for a tenth of 200 epochs."""
    config, system = official(NOISE)
    mirror = jnp.array([10_034 + 3691 + 1])  # the first class after "other", people and clusters
    epochs = (0, 19.9, 20.1, 45, 99.9, 100.1, 179.9, 180.1, 199)
    steps = jnp.float32(CLIPS / config.batch_size) * jnp.array(epochs)
    weights = [float(system.column_weight(mirror, step)[0]) for step in steps]
    assert weights == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.3, 0.35, 0.5, 0.6, 0.6])


def shares_of_frames(spec, quality, detection):
    """Returns the share of each frame in each fused frame of one clip."""
    return np.asarray(fusion.make_fusion(spec)(None, one_clip(quality, detection)).features[0])


@pytest.mark.nightly
def test_noise_classes_weight_frames_by_their_squared_quality():
    """feat_weighted_mean: weights are proportional to q squared; frames below 0 are left out."""
    spec = load_file(NOISE).fusion.face
    train, test = spec.train.to_dict(), spec.evaluate.to_dict()
    article = {"name": "mean", "weighting": "score"}  # line 18: "average of face quality scores"
    ones = [1.0, 1.0, 1.0]  # detection scores

    for fusion_spec, quality, detection, wanted in (
        (train, [1, 2, 3], ones, np.array([1, 4, 9]) / 14),
        (train, [-5, 2, 4], ones, [0, 0.2, 0.8]),
        (train, [1, 2, 3], [-0.1, 1, 1], np.array([0, 4, 9]) / 13),
        (train, [-1, -2, -3], ones, np.array([1, 4, 9]) / 14),  # none passes: all count
        (test, [-1, 2, 3], ones, np.array([1, 4, 9]) / 14),  # evaluation filters nothing
        (article, [1, -2, 3], [0.5, 0.9, 0.7], [0.25, 0, 0.75]),
    ):
        shares = shares_of_frames(fusion_spec, quality, detection)
        np.testing.assert_allclose(shares[0], wanted, rtol=1e-6)


@pytest.mark.nightly
def test_noise_classes_crop_short_clips_as_the_code_does():
    """load_data in ..._predict_v2.py. A cut takes one frame or more, and leaves one or more."""
    spec = load_file(NOISE).fusion.face.evaluate.to_dict()
    # The frames of the 4 crops of clips with 1, 3 and 7 frames: all, without the first third,
    # without the last third, without both sixths.
    for wanted in ("0 0 0 0", "012 12 01 1", "0123456 23456 01234 12345"):
        count = len(wanted.split()[0])
        crops = shares_of_frames(spec, [50.0] * count, [1.0] * count)
        assert " ".join("".join(map(str, np.flatnonzero(row > 0))) for row in crops) == wanted


def test_long_noise_clips_are_cut_to_pieces_of_random_length():
    """random_split draws a start from 0 to n - 1, then an end from start + 1 to n."""
    frames = make_frames([60, 60, 3], max_frames=60)
    # Clip 0 is long and chosen, as a noise clip. Clip 1 is long, and clip 2 is short.
    options = {"chosen": np.array([True, False, False]), "short": np.array([False, False, True])}
    cut = functools.partial(augment.concat_clips, frames=frames, pieces="random", **options)
    draw = jax.jit(jax.vmap(lambda key: cut(key).mask))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))

    assert masks[:, 1].sum(axis=1).tolist() == [60] * 4000  # clip 1 is not chosen
    # Joined clips have 120 places. Clip 0 has 60 frames.
    first, last = masks[:, 0].argmax(axis=1), 119 - masks[:, 0, ::-1].argmax(axis=1)
    np.testing.assert_array_equal(masks[:, 0].sum(axis=1), last - first + 1)  # without gaps
    assert (first.min(), first.max(), last.max()) == (0, 59, 59)
    assert first.mean() == pytest.approx(29.5, abs=1.2)
    late = (last - first)[first == 50]  # 1 to 10 frames are left, so this is 0 to 9
    assert set(late.tolist()) <= set(range(10)) and len(set(late.tolist())) > 6
