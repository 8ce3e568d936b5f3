"""The fallback: who is trained on which clip, and who answers for it."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from vidjax.core import fusion
from vidjax.models import identifier

MAIN = {"name": "dense", "layers": ((8, "relu", True, 0.0),)}
OTHER = {"name": "dense", "layers": ((6, "swish", True, 0.0),)}
SPEC = {"name": "fallback", "main": MAIN, "other": OTHER, "other_modalities": ("head",)}


def weights_oracle(frames, batch_mask, *, measure, threshold, scale=0.95, shares=(0.2, 0.8)):
    """Clip by clip: (main, other) in training, and in evaluation."""
    train, evaluate = [], []
    face, head = frames["face"], frames["head"]
    for b, real in enumerate(batch_mask):
        has_face, has_head = (real & one.mask[b].any() for one in (face, head))
        train.append((has_face, has_head))
        if measure == "norm":
            measures = np.linalg.norm(face.features[b].astype(float), axis=1)
        else:
            measures = face.quality[b]
        if has_head and not has_face:
            evaluate.append((0, scale))
        elif has_head and measures[face.mask[b]].mean() < threshold:
            evaluate.append(shares)
        else:
            evaluate.append((1, 0))
    return train, evaluate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kinds"),
    quick_first(
        [
            ({"measure": "norm", "threshold": 2.4}, {(1, 0), (0, 0.95), (0.2, 0.8)}),
            ({"measure": "quality", "threshold": 50.0}, {(1, 0), (0, 0.95), (0.2, 0.8)}),
            ({"measure": "norm", "threshold": 0.0}, {(1, 0), (0, 0.95)}),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_weights_match_a_loop(options, kinds):
    frames, clips = made.make_batch()
    clips = clips._replace(measure=fusion.mean_measure(frames["face"], options["measure"]))
    bare = {"name": "dense", "layers": ()}
    model = made.make_model(SPEC, main=bare, other=bare, **options)
    out = made.eval_output(model, made.init_identifier(model, frames, clips), frames, clips)
    assert out.logits.shape == (8, 2, 5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(out)} == {"float32"}
    train, evaluate = weights_oracle(frames, clips.mask, **options)
    assert set(evaluate) == kinds
    np.testing.assert_array_equal(out.train_weight, train)
    np.testing.assert_allclose(out.eval_weight, evaluate, rtol=1e-6)


@pytest.mark.slow
def test_each_model_is_what_it_would_be_alone_on_the_clips_it_sees():
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
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            part_new["batch_stats"],
            new["batch_stats"][name],
        )
        logits = made.eval_logits(part, own, frames, clips)
        np.testing.assert_allclose(evaluated.logits[:, branch], logits, atol=1e-6)


def test_the_main_model_may_see_less_than_everything():
    frames, clips = made.make_batch()
    model = made.make_model(SPEC, main_modalities=("face",), other_modalities=("audio", "head"))
    params = jax.eval_shape(lambda: made.init_identifier(model, frames, clips))["params"]
    shapes = {name: params[name]["backbone"]["layer_0"]["dense"]["kernel"].shape for name in params}
    assert shapes == {"main": (6, 8), "other": (9, 6)}
