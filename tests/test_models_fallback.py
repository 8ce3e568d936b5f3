"""The fallback: who is trained on which clip, who answers for it, and which clips are poor."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.batches import real_frames
from tests.helpers.small_runs import shrunk
from vidjax.core import fusion
from vidjax.models import identifier
from vidjax.training import plan as plan_lib

MAIN = {"name": "dense", "layers": ((8, "relu", True, 0.0),)}
OTHER = {"name": "dense", "layers": ((6, "swish", True, 0.0),)}
SPEC = {"name": "fallback", "main": MAIN, "other": OTHER, "other_modalities": ("head",)}


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "threshold"), [("norm", 2.4), ("quality", 50.0)])
def test_fallback_weights_match_a_loop_over_clips(measure, threshold):
    """Each clip has weights (main, other) in training and in evaluation."""
    frames, clips = made.make_batch()
    face, head = frames["face"], frames["head"]
    clips = clips._replace(measure=fusion.mean_measure(face, measure))
    bare = {"name": "dense", "layers": ()}
    model = made.make_model(SPEC, main=bare, other=bare, measure=measure, threshold=threshold)
    out = made.eval_output(model, made.init_identifier(model, frames, clips), frames, clips)
    assert out.logits.shape == (8, 2, 5)
    train, evaluate = [], []
    norms = np.linalg.norm(face.features.astype(float), axis=2)
    for b, real in enumerate(clips.mask):
        has_face, has_head = (real & part.mask[b].any() for part in (face, head))
        train.append((has_face, has_head))
        measures = norms[b] if measure == "norm" else face.quality[b]
        if has_head and not has_face:
            evaluate.append((0, 0.95))
        elif has_head and measures[face.mask[b]].mean() < threshold:
            evaluate.append((0.2, 0.8))
        else:
            evaluate.append((1, 0))
    assert set(evaluate) == {(1, 0), (0, 0.95), (0.2, 0.8)}
    np.testing.assert_array_equal(out.train_weight, train)
    np.testing.assert_allclose(out.eval_weight, evaluate, rtol=1e-6)


@pytest.mark.slow
def test_each_branch_equals_a_separate_model_on_its_clips():
    frames, clips = made.make_batch()
    model = made.make_model(SPEC)
    variables = made.init_identifier(model, frames, clips)
    out, new = made.train_output(model, variables, frames, clips, jax.random.key(5))
    evaluated = made.eval_output(model, variables, frames, clips)
    sizes: Any = {"modalities": {"head": made.DIMS["head"]}, "num_classes": 5, "num_clips": 6}
    other = identifier.make_identifier(OTHER, **sizes)
    alone = (("main", made.make_model(MAIN), "face"), ("other", other, "head"))
    for branch, (name, part, modality) in enumerate(alone):
        own = {collection: tree[name] for collection, tree in variables.items()}
        seen = clips.mask & frames[modality].mask.any(axis=1)
        logits, part_new = made.train_logits(part, own, frames, clips._replace(mask=seen), seed=5)
        np.testing.assert_allclose(out.logits[:, branch][seen], logits[seen], atol=1e-6)
        close = functools.partial(np.testing.assert_allclose, atol=1e-6)
        jax.tree.map(close, part_new["batch_stats"], new["batch_stats"][name])
        logits = made.eval_logits(part, own, frames, clips)
        np.testing.assert_allclose(evaluated.logits[:, branch], logits, atol=1e-6)


def test_main_model_may_use_only_some_modalities():
    frames, clips = made.make_batch()
    model = made.make_model(SPEC, main_modalities=("face",), other_modalities=("audio", "head"))
    params = jax.eval_shape(lambda: made.init_identifier(model, frames, clips))["params"]
    shapes = {name: params[name]["backbone"]["layer_0"]["dense"]["kernel"].shape for name in params}
    assert shapes == {"main": (6, 8), "other": (9, 6)}


DEEPMEF = "configs/deepmef.py:iqiyi_vid,face,audio"


def threshold(config, data):
    return (plan_lib.make_plan(config, data).task.settings or {}).get("threshold")


def test_fallback_threshold_is_a_quantile_of_the_training_clips(data):
    """The measure uses all features, although each member of `views` sees only a part."""
    words = ("--config.model.threshold_share=0.2", "--config.ensemble.views=3")
    both = "--config.data.train_splits=train,val"
    for splits, config in {
        ("train",): shrunk(*words, spec=DEEPMEF),
        ("train", "val"): shrunk(*words, both, spec=f"{DEEPMEF},trainval"),
    }.items():
        norms = [
            np.linalg.norm(frames.features.astype(np.float64), axis=-1).mean()
            for split in splits
            for _, frames in real_frames(data, split)
            if len(frames.features)
        ]
        wanted = np.sort(norms)[int(0.2 * len(norms))]
        assert threshold(config, data) == pytest.approx(wanted, rel=1e-6)


def test_models_without_a_threshold_share_have_no_fitted_threshold(data):
    absolute, share = "--config.model.threshold=2.5", "--config.model.threshold_share=0"
    for config in (shrunk(), shrunk(absolute, share, spec=DEEPMEF)):
        assert threshold(config, data) is None
    with pytest.raises(ValueError, match="set one of them to 0"):
        threshold(shrunk(absolute, spec=DEEPMEF), data)
