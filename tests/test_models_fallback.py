"""The fallback: who is trained on which clip, and who answers for it."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.made_models import (
    DIMS,
    eval_logits,
    eval_output,
    init_identifier,
    make_batch,
    make_model,
    train_logits,
    train_output,
)
from vidjax.core import fusion
from vidjax.models import identifier
from vidjax.utils.errors import UserError

MAIN = {"name": "dense", "layers": ((8, "relu", True, 0.0),)}
OTHER = {"name": "dense", "layers": ((6, "swish", True, 0.0),)}
BARE = {"name": "dense", "layers": ()}
SPEC = {"name": "fallback", "main": MAIN, "other": OTHER, "other_modalities": ("head",)}


def weights_oracle(frames, batch_mask, *, measure, threshold, scale=0.95, shares=(0.2, 0.8)):
    """Clip by clip: (main, other) in training, and in evaluation."""
    train, evaluate = [], []
    for b, real in enumerate(batch_mask):
        face = [t for t, flag in enumerate(frames["face"].mask[b]) if flag and real]
        head = [t for t, flag in enumerate(frames["head"].mask[b]) if flag and real]
        train.append((float(bool(face)), float(bool(head))))
        if measure == "norm":
            measures = [np.linalg.norm(frames["face"].features[b, t].astype(float)) for t in face]
        else:
            measures = [frames["face"].quality[b, t] for t in face]
        if not head:
            evaluate.append((1, 0))
        elif not face:
            evaluate.append((0, scale))
        elif sum(measures) / len(measures) < threshold:
            evaluate.append(shares)
        else:
            evaluate.append((1, 0))
    return train, evaluate


@pytest.mark.parametrize(
    ("options", "kinds"),
    quick_first(
        [
            ({"measure": "norm", "threshold": 2.4}, {(1, 0), (0, 0.95), (0.2, 0.8)}),
            ({"measure": "quality", "threshold": 50.0}, {(1, 0), (0, 0.95), (0.2, 0.8)}),
            ({"measure": "norm", "threshold": 0.0}, {(1, 0), (0, 0.95)}),
        ]
    ),
)
def test_weights_match_a_loop(options, kinds):
    frames, clips = make_batch()
    clips = clips._replace(measure=fusion.mean_measure(frames["face"], options["measure"]))
    model = make_model(SPEC, main=BARE, other=BARE, **options)
    out = eval_output(model, init_identifier(model, frames, clips), frames, clips)
    assert out.logits.shape == (8, 2, 5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(out)} == {"float32"}
    train, evaluate = weights_oracle(frames, clips.mask, **options)
    assert set(evaluate) == kinds
    np.testing.assert_array_equal(out.train_weight, train)
    np.testing.assert_allclose(out.eval_weight, evaluate, rtol=1e-6)


@pytest.mark.slow
def test_each_model_is_what_it_would_be_alone_on_the_clips_it_sees():
    frames, clips = make_batch()
    model = make_model(SPEC)
    variables = init_identifier(model, frames, clips)
    out, new = train_output(model, variables, frames, clips, jax.random.key(5))
    evaluated = eval_output(model, variables, frames, clips)
    alone = {
        "main": (make_model(MAIN), "face"),
        "other": (
            identifier.make_identifier(
                OTHER, modalities={"head": DIMS["head"]}, num_classes=5, num_clips=6
            ),
            "head",
        ),
    }
    for branch, (name, (part, modality)) in enumerate(alone.items()):
        own = {collection: tree[name] for collection, tree in variables.items()}
        seen = clips.mask & frames[modality].mask.any(axis=1)
        rows = clips._replace(mask=seen)
        logits, part_new = train_logits(part, own, frames, rows, seed=5)
        np.testing.assert_allclose(out.logits[:, branch][seen], logits[seen], atol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            part_new["batch_stats"],
            new["batch_stats"][name],
        )
        logits = eval_logits(part, own, frames, clips)
        np.testing.assert_allclose(evaluated.logits[:, branch], logits, atol=1e-6)


def test_the_main_model_may_see_less_than_everything():
    frames, clips = make_batch()
    model = make_model(SPEC, main_modalities=("face",), other_modalities=("audio", "head"))
    params = jax.eval_shape(lambda: init_identifier(model, frames, clips))["params"]
    shapes = {name: params[name]["backbone"]["layer_0"]["dense"]["kernel"].shape for name in params}
    assert shapes == {"main": (6, 8), "other": (9, 6)}


def test_a_part_that_is_fitted_in_passes_of_its_own_is_refused():
    for part in ("main", "other"):
        options: dict[str, Any] = {part: {"name": "plda"}}
        with pytest.raises(UserError, match=r"PLDAIdentifier needs separate passes"):
            make_model(SPEC, **options)


def test_scale_of_the_logits_is_that_of_both():
    cosine = {"head": "cosine", "logit_scale": 30.0}
    model = make_model(SPEC, main={**MAIN, **cosine}, other={**OTHER, **cosine})
    assert model.logit_scale == 30
    assert make_model(SPEC).logit_scale == 1
    for spec, scale in (({"name": "mma"}, 1), ({"name": "knn", "logit_scale": 8.0}, 8)):
        assert make_model(spec).logit_scale == scale
    assert make_model({"name": "deepmef"}).logit_scale == 30
