"""What `CONFIG:published` computes, beside numbers of the publications and their code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import published
from tests.helpers.made_frames import make_frames
from vidjax.core import ensemble, fusion
from vidjax.core.batch import ClipInfo, Frames
from vidjax.models import identifier

# The iQIYI-VID paper, "iQIYI-VID: A Large Dataset for Multi-modal Person Identification" (no code).


def of_the_paper(words=""):
    """Returns `mma.py:published` at its full size, as nested dicts."""
    return published.config_of(f"mma:published,iqiyi_vid,{words}").to_dict()


def fused(phase, rng, frames):
    return fusion.make_fusion(of_the_paper()["fusion"]["face"][phase])(rng, frames)


def test_mma_parameters():
    shapes = published.shapes("mma:published,iqiyi_vid")
    assert shapes["attention_map/w_f/kernel"] == (512, 64)  # "D is set to 512 ... 64" (L215)
    assert not [name for name in shapes if name.startswith("attention_map") and "w_f/k" not in name]
    # "3 of the 6 features come from face" (L170), "squeezed into a vector" (L184)
    assert shapes["classifier/logits/kernel"] == (6 * 512, 10_035)
    assert shapes["face_map/kernel"][1] == 3 * 512
    for name in ("head", "body", "audio"):  # "did not apply NetVLAD to the other modal" (L254)
        assert shapes[f"{name}_map/kernel"] == (512, 512)
    # "a Batch-normalization (BN) layer after the Fully-connected (FC) layer" (L159)
    clusters = shapes["face_netvlad/centers"][0]
    assert shapes["face_netvlad/assignment/kernel"] == (512, clusters)
    assert shapes["face_netvlad/norm/scale"] == (clusters,)
    assert {name.split("/")[0] for name in shapes} == {
        "attention_map", "classifier", "face_netvlad",
        *(f"{name}_map" for name in ("face", "head", "body", "audio")),
    }  # fmt: skip


def test_mma_values():
    model = of_the_paper()["model"]
    assert model["gamma"] == 0.05 and not model["train_gamma"]  # L215
    assert model["netvlad_norms"] == ("batch",)  # "better to remove the L2 norm" (L159)
    assert (model["attention_form"], model["gram_scale"]) == ("gram", 1.0)  # equation 2 (L176)
    assert model["netvlad_reduce"] == "sum"  # "a weighted sum" (L153)


def test_mma_faces():
    """The 32 best of a clip; random ones again where there are fewer (L142)."""
    frames = make_frames([40, 5, 32, 0], max_frames=40)
    draws = [fused("train", jax.random.key(seed), frames) for seed in (0, 1)]
    test = fused("evaluate", None, frames)
    best = np.sort(np.argsort(-frames.quality[0])[:32])
    for found in (*draws, test):
        assert found.features.shape[1] == 32
        np.testing.assert_array_equal(found.number[0], 10 * best)
        np.testing.assert_array_equal(found.number[2], 10 * np.arange(32))
        times = np.bincount(np.asarray(found.number[1]) // 10, minlength=5)
        assert times.min() >= 1 and times.max() > 7  # in turn, none is there more than 7 times
        assert not found.mask[3].any()
    assert (np.asarray(draws[0].number[1]) != draws[1].number[1]).any()
    np.testing.assert_array_equal(test.number, fused("evaluate", None, frames).number)
    assert of_the_paper()["data"]["crop"] == "quality"  # of the clip, not of a window


def test_mma_ensemble():
    """Three models "trained on different partition of the training set" (L252)."""
    spec = of_the_paper("ensemble")["ensemble"]
    members = ensemble.make_members(spec)
    assert len(members) == 3
    labels = np.repeat(np.arange(1, 21), 6)
    uses = ensemble.partition(members, labels, spec["folds"], seed=0)
    np.testing.assert_array_equal(uses.sum(axis=0), 2)  # every clip is left out by one
    np.testing.assert_array_equal(uses.sum(axis=1), 80)


def test_mma_pooling_takes_a_share_of_a_false_vector():
    """Average pooling takes a quarter of one of four (L47); concatenation takes all of it."""
    frames = {"face": make_frames([1], max_frames=1), "head": make_frames([1], max_frames=1)}
    clips = ClipInfo(np.zeros(1, np.int32), np.ones(1, bool))
    false = {**frames, "head": jax.tree.map(jnp.asarray, frames["head"])}
    false["head"] = Frames(-false["head"].features, *false["head"][1:])
    moved = {}
    for joined in ("concat", "mean"):
        spec = {"name": "mma", "embed_dim": 4, "attention": False, "netvlad": (), "joined": joined}
        model: Any = identifier.make_identifier(
            spec, modalities={"face": 6, "head": 6}, num_classes=3, num_clips=1
        )
        variables = model.init(jax.random.key(0), frames, clips, train=False)
        one, other = (
            model.apply(variables, given, clips, train=False).embedding for given in (frames, false)
        )
        moved[joined] = float(jnp.linalg.norm(one - other))
    assert moved["mean"] == pytest.approx(moved["concat"] / 4, rel=1e-5)
