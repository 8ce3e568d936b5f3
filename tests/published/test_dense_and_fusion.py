"""`published` of three systems: the numbers of their publications and of their code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.made_frames import make_frames
from tests.helpers.published import CLIPS, config_of, official, rates, shapes
from vidjax.core import ensemble, fusion, losses
from vidjax.core.augment import MemberClips
from vidjax.core.batch import ModelOutput

pytestmark = pytest.mark.slow


def published(name, words=""):
    return official(f"{name}:iqiyi_vid,published,{words}", train_other=True)


def one_clip(quality, detection=0.9):
    frames = make_frames([len(quality)], max_frames=len(quality), dtype="float32")
    quality = np.array([quality], np.float32)
    return frames._replace(quality=quality, detection=np.full_like(quality, detection))


def trained_on(system, frames, min_quality=-1000.0):
    """Returns the fused training frames of clips and the weights of their losses."""
    ones = jnp.ones(len(frames.mask))
    clips = MemberClips({"face": frames}, ones, ones, jnp.float32(min_quality), ())
    for transform in system.clip_transforms:
        clips = transform(jax.random.key(0), clips)
    fused = system.fuse(jax.random.key(1), clips.frames, jnp.int32(-1))
    clips = clips._replace(frames=fused, weight=clips.weight * fusion.has_frames(fused))
    for transform in system.transforms:
        clips = transform(jax.random.key(2), clips)
    return clips.frames["face"], np.asarray(clips.weight)


# Residual Dense Net. L: line of the article.


def test_residual_dense_trains_8_epochs_at_falling_learning_rates():
    config, _ = published("residual_dense")
    assert config.num_epochs == 8 and config.optim.name == "adam"  # L34
    learning_rates = rates("residual_dense:iqiyi_vid,published", *range(8))
    np.testing.assert_allclose(learning_rates, 0.01 * 0.7 ** np.arange(8), rtol=1e-5)  # L34
    assert (config.optim.total_decay, config.optim.weight_decay, config.mixup) == (0, 0, 0)
    assert (config.loss.classification, config.loss.label_smoothing) == ("softmax", 0)
    assert (config.eval.top_classes, config.after_fusion) == (100, "examples")  # L36
    assert config.eval.reduce == "mean"  # L36


@pytest.mark.nightly
def test_residual_dense_trains_three_nets_on_frames_above_quality_bounds():
    config, system = published("residual_dense", "face,trainval")
    members = ensemble.make_members(config.ensemble.to_dict())
    assert [member.fold for member in members] == [0, 0, 0] and config.ensemble.folds == 10  # L22
    frames = one_clip([-5.0, 19.9, 20.0, 20.1, 40.0, 40.1])
    counts = [trained_on(system, frames, member.min_quality)[1][0] / 2 for member in members]
    assert counts == [6, 3, 1]  # L32: all, > 20, > 40
    assert trained_on(system, one_clip([20.0, 3.0]), members[1].min_quality)[1] == 0


@pytest.mark.nightly
def test_residual_dense_trains_on_all_frames_and_as_many_merged_frames():
    _, system = published("residual_dense", "face")
    frames = make_frames([9, 1, 4], max_frames=9, dtype="float32", dim=512)
    union, weight = trained_on(system, frames)
    np.testing.assert_array_equal(weight, [18, 2, 8])  # L32: long clips have more frames
    np.testing.assert_array_equal(union.mask.sum(axis=1), weight)
    np.testing.assert_array_equal(union.features[:, :9], frames.features)  # L32: "combined with"
    clip = np.asarray(frames.features[0])
    used = np.linalg.lstsq(clip.T, np.asarray(union.features[0, 9:]).T, rcond=None)[0].T
    assert set(np.count_nonzero(used > 1e-3, axis=1)) <= {2, 3, 4, 5}  # L32: 1 to 4 others
    np.testing.assert_allclose(used.sum(axis=1), 1, rtol=1e-4)


@pytest.mark.nightly
def test_residual_dense_ranks_the_best_70_percent_of_all_and_merged_frames():
    _, system = published("residual_dense", "face")
    fused = system.fuse(None, {"face": make_frames([10, 1], max_frames=10)}, jnp.int32(-1))["face"]
    np.testing.assert_array_equal(fused.mask.sum(axis=1), [14, 2])  # L36: 70 % of 20, of 2
    quality = np.asarray(fused.quality)
    assert quality[0][fused.mask[0]].min() >= quality[0][~fused.mask[0]].max()


def test_residual_dense_has_the_layer_sizes_of_the_article():
    sizes = shapes("residual_dense:iqiyi_vid,published,face")
    for i in range(3):
        width = 512 if i == 0 else 8192
        assert sizes[f"backbone/layer_{i}/dense/kernel"] == (width, 8192)
        assert sizes[f"backbone/layer_{i}/norm/scale"] == (8192,)
    assert sizes["classifier/logits/kernel"] == (8192, 10_035)  # L14: 10,034 people, and strangers
    products = sum(2 * np.prod(shape) for name, shape in sizes.items() if "kernel" in name)
    assert 0.4e9 < products < 0.5e9  # L5: about 0.5 GFLOP


# Quality fusion. L: line of the article; training.py and inference.py at 60f5127.


def test_quality_fusion_learning_rate_starts_low_jumps_and_halves():
    config, _ = published("quality_fusion")
    assert (config.batch_size, config.optim.name) == (512, "adam")  # training.py:215, 314
    learning_rates = rates("quality_fusion:iqiyi_vid,published", 0, 8.9, 9, 58.9, 59, 109, 159, 199)
    wanted = [2e-5, 2e-5, 1.5e-4, 1.5e-4, 7.5e-5, 3.75e-5, 1.875e-5, 1.875e-5]  # :314-331
    np.testing.assert_allclose(learning_rates, wanted, rtol=1e-5)


def test_quality_fusion_reweights_its_losses_after_24_and_99_epochs():
    config, _ = published("quality_fusion")
    logits = np.array([[2.0, -1.0, 0.5]])
    softmax = np.log(np.exp(logits).sum()) + 1
    right = np.array([0, 1, 0]) + np.array([1, -1, 1]) / (1 + np.exp(logits[0]))
    focal = np.sum((1 - right) ** 2 * -np.log(right))  # training.py:267-282, gamma 2
    epoch_steps = CLIPS / config.batch_size
    objective = losses.make_objective(config.loss.to_dict(), None, epoch_steps, logit_scale=1.0)
    output = ModelOutput(jnp.asarray(logits, jnp.float32)[:, None], jnp.zeros((1, 4)))
    for epoch, share in ((0, 0.75), (23.9, 0.75), (24.1, 1), (98.9, 1), (99.1, 0.98), (199, 0.98)):
        step = jnp.int32(round(epoch * epoch_steps))
        loss = objective(output, jnp.array([1]), jnp.ones(1, bool), step)
        wanted = share * focal + (1 - share) * softmax  # :295, 308, 327-333
        np.testing.assert_allclose(loss, [wanted], rtol=1e-4, err_msg=str(epoch))


@pytest.mark.nightly
def test_quality_fusion_drops_training_clips_without_a_good_face():
    config, system = published("quality_fusion")
    assert config.data.max_frames == 4096  # training.py:84, 144: all faces of a clip
    for quality, detection, weight in (
        ([25.0, 24.9, 80.0], 0.9, 1), ([24.9, 3.0, -1.0], 0.9, 0),  # training.py:94, 98
        ([80.0], 0.69, 0), ([80.0], 0.7, 1),
    ):  # fmt: skip
        assert trained_on(system, one_clip(quality, detection))[1] == [weight]
    probs = config.fusion.face.train.probs
    assert probs == (0.25, 0, 0.65, 0, 0.1)  # of 1 to 5 faces, training.py:162-167


def test_quality_fusion_weights_evaluated_faces_by_graded_quality():
    quality = np.array([-1, 0, 10, 20, 25, 30, 35, 40, 90], np.float32)
    wanted = 0.9 * quality * [0, 0.2, 0.2, 0.3, 0.3, 0.6, 0.6, 1, 1]  # inference.py:95-104
    weights = fusion.frame_weights(one_clip(quality), "graded")[0]
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_quality_fusion_nets_have_the_layer_sizes_of_the_code():
    hidden = {"mlp1": (), "mlp2": (512,), "mlp3": (), "mlp4": (768,), "mlp5": (1024,)}
    for net, widths in hidden.items():
        sizes = shapes(f"quality_fusion:iqiyi_vid,published,{net}")  # inference.py:200-256
        kernels = [shape for name, shape in sorted(sizes.items()) if name.endswith("dense/kernel")]
        assert kernels == list(itertools.pairwise((512, *widths, 1024)))
        assert sizes["classifier/logits/kernel"] == (1024, 10_035)  # L22
        assert any("norm" in name for name in sizes) == (net not in ("mlp4", "mlp5"))


def test_quality_fusion_scores_five_folds_by_sigmoids():
    config, system = published("quality_fusion", "trainval")
    assert len(ensemble.make_members(config.ensemble.to_dict())) == 5  # training.py:112
    assert config.data.train_splits == ("train", "val")  # training.py:70
    scores = system.score_fn(jnp.array([0.0, 2.0]), jnp.ones(2, bool))
    np.testing.assert_allclose(np.exp(scores), [0.5, 0.880797], rtol=1e-5)  # inference.py:169
    assert system.scores_are_logs


# The iQIYI-VID paper, "iQIYI-VID: A Large Dataset for Multi-modal Person Identification" (no code).


def test_mma_has_the_parameter_shapes_and_settings_of_the_paper():
    sizes = shapes("mma:published,iqiyi_vid")
    assert sizes["attention_map/w_f/kernel"] == (512, 64)  # "D is set to 512 ... 64" (L215)
    # "3 of the 6 features come from face" (L170), "squeezed into a vector" (L184)
    assert sizes["classifier/logits/kernel"] == (6 * 512, 10_035)
    assert sizes["face_map/kernel"][1] == 3 * 512
    for name in ("head", "body", "audio"):  # "did not apply NetVLAD to the other modal" (L254)
        assert sizes[f"{name}_map/kernel"] == (512, 512)
    # "a Batch-normalization (BN) layer after the Fully-connected (FC) layer" (L159)
    clusters = sizes["face_netvlad/centers"][0]
    assert sizes["face_netvlad/assignment/kernel"] == (512, clusters)
    assert sizes["face_netvlad/norm/scale"] == (clusters,)
    maps = {f"{name}_map" for name in ("face", "head", "body", "audio", "attention")}
    assert {name.split("/")[0] for name in sizes} == {*maps, "classifier", "face_netvlad"}
    model = config_of("mma:published,iqiyi_vid").model.to_dict()
    assert model["gamma"] == 0.05 and not model["train_gamma"]  # L215
    assert model["netvlad_norms"] == ("batch",)  # "better to remove the L2 norm" (L159)
    assert (model["attention_form"], model["gram_scale"]) == ("gram", 1.0)  # equation 2 (L176)
    assert model["netvlad_reduce"] == "sum"  # "a weighted sum" (L153)


def test_mma_uses_the_32_best_faces_and_repeats_faces_of_short_clips():
    """A clip with fewer faces repeats random faces (L142)."""
    config = config_of("mma:published,iqiyi_vid")
    assert config.data.crop == "quality"  # the best of the clip, not of a window
    top, face = {"name": "top", "num_frames": 32}, config.fusion.face.to_dict()  # see test_fusion
    assert face == {"train": top, "evaluate": top | {"repeats": "random"}}


def test_mma_trains_three_nets_on_different_parts_of_the_clips():
    """Three models "trained on different partition of the training set" (L252)."""
    spec = config_of("mma:published,iqiyi_vid,ensemble").ensemble.to_dict()
    labels = np.repeat(np.arange(1, 21), 6)
    uses = ensemble.count_clip_uses(ensemble.make_members(spec), labels, spec["folds"], seed=0)
    np.testing.assert_array_equal(uses.sum(axis=0), [2] * 120)  # each clip is left out by one net
    np.testing.assert_array_equal(uses.sum(axis=1), [80] * 3)
