"""Compares `CONFIG:published` with numbers of the publications and their code."""

import jax
import numpy as np
import pytest

from tests.helpers import published
from tests.helpers.made_frames import make_frames
from vidjax.core import ensemble, fusion

pytestmark = pytest.mark.slow

# The iQIYI-VID paper, "iQIYI-VID: A Large Dataset for Multi-modal Person Identification" (no code).


def of_the_paper(words=""):
    """Returns `mma.py:published` at its full size, as nested dicts."""
    return published.config_of(f"mma:published,iqiyi_vid,{words}").to_dict()


def test_mma_parameters():
    shapes = published.shapes("mma:published,iqiyi_vid")
    assert shapes["attention_map/w_f/kernel"] == (512, 64)  # "D is set to 512 ... 64" (L215)
    # "3 of the 6 features come from face" (L170), "squeezed into a vector" (L184)
    assert shapes["classifier/logits/kernel"] == (6 * 512, 10_035)
    assert shapes["face_map/kernel"][1] == 3 * 512
    for name in ("head", "body", "audio"):  # "did not apply NetVLAD to the other modal" (L254)
        assert shapes[f"{name}_map/kernel"] == (512, 512)
    # "a Batch-normalization (BN) layer after the Fully-connected (FC) layer" (L159)
    clusters = shapes["face_netvlad/centers"][0]
    assert shapes["face_netvlad/assignment/kernel"] == (512, clusters)
    assert shapes["face_netvlad/norm/scale"] == (clusters,)
    parts = {"attention_map", "classifier", "face_netvlad"}
    parts |= {f"{name}_map" for name in ("face", "head", "body", "audio")}
    assert {name.split("/")[0] for name in shapes} == parts


def test_mma_values():
    model = of_the_paper()["model"]
    assert model["gamma"] == 0.05 and not model["train_gamma"]  # L215
    assert model["netvlad_norms"] == ("batch",)  # "better to remove the L2 norm" (L159)
    assert (model["attention_form"], model["gram_scale"]) == ("gram", 1.0)  # equation 2 (L176)
    assert model["netvlad_reduce"] == "sum"  # "a weighted sum" (L153)


def test_mma_faces():
    """The 32 best of a clip; random ones again where there are fewer (L142)."""
    config = of_the_paper()
    assert config["data"]["crop"] == "quality"  # of the clip, not of a window
    frames = make_frames([40, 5, 32, 0], max_frames=40)
    best = np.sort(np.argsort(-frames.quality[0])[:32])
    for phase, rng in (("train", jax.random.key(0)), ("evaluate", None)):
        found = fusion.make_fusion(config["fusion"]["face"][phase])(rng, frames)
        assert found.features.shape[1] == 32 and not found.mask[3].any()
        np.testing.assert_array_equal(found.number[0], 10 * best)
        np.testing.assert_array_equal(found.number[2], 10 * np.arange(32))
        times = np.bincount(np.asarray(found.number[1]) // 10, minlength=5)
        assert times.min() >= 1 and times.max() > 7  # in turn, none is there more than 7 times


def test_mma_ensemble():
    """Three models "trained on different partition of the training set" (L252)."""
    spec = of_the_paper("ensemble")["ensemble"]
    members = ensemble.make_members(spec)
    assert len(members) == 3
    labels = np.repeat(np.arange(1, 21), 6)
    uses = ensemble.count_clip_uses(members, labels, spec["folds"], seed=0)
    np.testing.assert_array_equal(uses.sum(axis=0), 2)  # every clip is left out by one
    np.testing.assert_array_equal(uses.sum(axis=1), 80)
