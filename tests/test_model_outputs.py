"""What every model returns beside its logits: the embedding, the attention and its names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.test_models import DIMS, SMALL, eval_output, init_identifier, make_batch, make_model
from vidjax.models.heads import Classifier, CosineClassifier
from vidjax.models.neighbours import NearestNeighbours

MMA_WIDTH = 5 * 8  # three vectors of the face, one of the head, one of the voice
DENSE = {"name": "dense", "layers": ((7, "swish", True, 0.5),)}
COSINE = {**DENSE, "head": "cosine", "logit_scale": 16.0}
COSINE_NET = {"name": "cosine", "embed_dim": 7}
DEEPMEF = {"name": "deepmef", "branch_dims": (6, 4), "hidden_dim": 8}
# specification -> (width of the embedding, number of vectors that attention weighs)
MODELS = {
    "mma": (SMALL, MMA_WIDTH, 5),
    "mma, cosine": ({**SMALL, "head": "cosine", "logit_scale": 16.0}, MMA_WIDTH, 5),
    "mma without attention": ({**SMALL, "attention": False}, MMA_WIDTH, 5),
    "dense": (DENSE, 7, 0),
    "dense, cosine": (COSINE, 7, 0),
    "residual": ({"name": "dense", "backbone": "residual", "width": 9}, 9, 0),
    "deepmef": (DEEPMEF, DIMS["face"] + 2 + 4 + 4, 0),
    "cosine": (COSINE_NET, 7 * len(DIMS), 0),
    "knn": ({"name": "knn"}, DIMS["face"], 0),
    "fallback": (
        {"name": "fallback", "main": DENSE, "other": DENSE, "other_modalities": ("head",)},
        7 + 7,
        0,
    ),
}

ATTENTIVE = ("mma", "mma, cosine")


@functools.partial(jax.jit, static_argnums=0)
def given_to_classifiers(model, frames, clips):
    """Returns the output of a new model, and the inputs [B, D] of its classifiers."""
    inputs = []

    def note(call, args, kwargs, context):
        heads = (Classifier, CosineClassifier, NearestNeighbours)
        if isinstance(context.module, heads) and context.method_name == "__call__":
            inputs.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        output, _ = model.init_with_output(jax.random.key(0), frames, clips, train=False)
    return output, inputs


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_the_embedding_is_what_the_classifier_is_given(name, dtype):
    spec, width, _ = MODELS[name]
    frames, clips = make_batch()
    model = make_model(spec, dtype=dtype)
    output, given = given_to_classifiers(model, frames, clips)
    assert output.embedding.shape == (len(clips.mask), width)
    assert output.embedding.dtype == output.logits.dtype == np.float32
    assert np.isfinite(output.embedding).all()
    if name == "fallback":  # unit vectors, 0 for a model that has no say on a clip
        unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in given]
        judges = np.asarray(output.eval_weight) > 0
        given = [np.concatenate([x * judges[:, i, None] for i, x in enumerate(unit)], axis=1)]
    (vector,) = given
    np.testing.assert_allclose(output.embedding, vector.astype(jnp.float32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_attention_has_the_shape_that_the_names_say(name):
    spec, _, num_vectors = MODELS[name]
    frames, clips = make_batch()
    model = make_model(spec)
    assert len(model.vector_names) == num_vectors
    output, _ = given_to_classifiers(model, frames, clips)
    attention = dict(output.attention or {})
    assert ("attention" in attention) == (name in ATTENTIVE)
    if name in ATTENTIVE:
        weights = np.asarray(attention.pop("attention"))
        assert weights.shape == (len(clips.mask), num_vectors, num_vectors)
        # Column j holds the weights for vector j. They sum to 1, or to 0 if it is missing.
        exists = [frames[key.split()[0]].mask.any(axis=1) for key in model.vector_names]
        exists = np.stack(exists, axis=1) & clips.mask[:, None]
        assert exists.any() and not exists[clips.mask].all()
        np.testing.assert_allclose(weights.sum(axis=1), exists, atol=1e-5)
    for key, share in attention.items():
        modality = key.removeprefix("assignment/")
        mask = frames[modality].mask & clips.mask[:, None]
        assert share.shape[:2] == mask.shape
        np.testing.assert_allclose(np.sum(share, axis=2), mask, atol=1e-5)


def test_the_frames_of_a_padded_row_reach_no_output():
    frames, clips = make_batch()
    model = make_model(SMALL)
    variables = init_identifier(model, frames, clips)
    assert not clips.mask.all()
    changed = {
        name: one._replace(features=np.where(clips.mask[:, None, None], one.features, 9))
        for name, one in frames.items()
    }
    before, after = (eval_output(model, variables, x, clips) for x in (frames, changed))
    jax.tree.map(np.testing.assert_array_equal, before, after)
