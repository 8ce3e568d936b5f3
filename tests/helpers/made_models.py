"""Small models and made-up clips, and functions that initialise, train and evaluate a model."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.nn import initializers

from tests.helpers.made_frames import make_frames
from vidjax.core.batch import ClipInfo
from vidjax.models import build_system

DIMS = {"face": 6, "head": 5, "audio": 4}
SMALL = {"name": "mma", "embed_dim": 8, "gram_dim": 4, "num_clusters": 3}


def make_batch(dtype="float16"):
    """Returns the frames of 6 clips and 2 rows of padding, and their `ClipInfo`.

    The padding has random values, which must have no effect.
    """
    lengths = [4, 0, 1, 2, 0, 3, 2, 2], [1, 2, 0, 3, 0, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]
    frames = {
        name: make_frames(lengths_of, max_frames=4, dim=dim, dtype=dtype)
        for (name, dim), lengths_of in zip(DIMS.items(), lengths, strict=True)
    }
    clips = ClipInfo(
        index=np.array([3, 1, 2, 0, 4, 5, 0, 0], np.int32),
        labels=np.array([1, 2, 1, 4, 3, 0, 4, 4], np.int32), mask=np.arange(8) < 6,
    )  # fmt: skip
    return frames, clips


def make_model(spec=SMALL, dtype="float32", num_classes=5, **options):
    return build_system.make_identifier(
        {**spec, **options}, modalities=DIMS, num_classes=num_classes, num_clips=6, dtype=dtype
    )


@functools.partial(jax.jit, static_argnums=0)
def train_output(model, variables, frames, clips, rng):
    """Returns the output of a model in training, and the variables that it changed."""
    rngs = {"dropout": rng, "modality_dropout": rng}
    mutable = [name for name in variables if name != "params"]
    return model.apply(variables, frames, clips, train=True, rngs=rngs, mutable=mutable)


def train_logits(model, variables, frames, clips, seed=5):
    """Returns the logits [B, K] of a model in training, and the variables that it changed."""
    output, new = train_output(model, variables, frames, clips, jax.random.key(seed))
    return output.logits[:, 0], new


@functools.partial(jax.jit, static_argnums=0)
def eval_output(model, variables, frames, clips):
    return model.apply(variables, frames, clips, train=False)


def eval_logits(model, variables, frames, clips):
    return eval_output(model, variables, frames, clips).logits[:, 0]


def randomised(params):
    """Returns parameters plus random numbers, because initial values of 0 and 1 hide mistakes."""
    rng = np.random.default_rng(3)
    params = jax.tree.map(np.asarray, params)
    return jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(p.dtype), params)


@contextlib.contextmanager
def zero_draws():
    """Draws of initial parameters give 0: programs that draw numbers are slow to compile."""
    draws = SimpleNamespace(
        normal=lambda key, shape, dtype, **_: jnp.zeros(shape, dtype),
        truncated_normal=lambda key, low, high, shape, dtype, **_: jnp.zeros(shape, dtype),
        uniform=lambda key, shape, dtype, *_, **__: jnp.zeros(shape, dtype),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initializers, "random", draws)
        yield


# Without compilation, this takes seconds.
@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def init(model, *args, train=None):
    """Returns the initial variables of a model, with 0 instead of random parameters."""
    options = {} if train is None else {"train": train}
    with zero_draws():
        return model.init(jax.random.key(0), *args, **options)


init_identifier = functools.partial(init, train=False)
