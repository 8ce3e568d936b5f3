"""Frames of made-up clips, and padding with random values."""

import jax
import numpy as np

from vidjax.core.batch import Frames


def make_frames(lengths, *, max_frames, dim=6, seed=0, dtype="float16"):
    """Returns random frames of B clips: features [B, max_frames, dim]. Frame t has number 10 t."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max_frames)
    mask = np.arange(max_frames) < np.asarray(lengths)[:, None]
    return Frames(
        features=(rng.standard_normal((*shape, dim)) * mask[..., None]).astype(dtype),
        quality=np.where(mask, rng.uniform(1, 100, shape), 0).astype(np.float32),
        detection=np.where(mask, rng.uniform(0.5, 1, shape), 1).astype(np.float32),
        number=np.where(mask, 10 * np.arange(max_frames), 0).astype(np.int32),
        mask=mask,
    )


def pad(frames, count):
    """Returns frames with `count` more frames per clip, which are masked and have random values."""
    clips, dim = len(frames.mask), frames.features.shape[-1]
    garbage = make_frames([count] * clips, max_frames=count, dim=dim, seed=9)
    garbage = garbage._replace(mask=np.zeros_like(garbage.mask))
    return jax.tree.map(lambda a, b: np.concatenate([a, b.astype(a.dtype)], 1), frames, garbage)


def one_hot_frames(quality, detection=1.0, *, padding=3, dtype="float16"):
    """Returns a clip whose frame t is the t-th unit vector. A mean then shows the frame weights."""
    length = len(quality)
    total = length + padding
    return Frames(
        features=np.eye(total, length, dtype=dtype)[None],
        quality=np.pad(np.array([quality], np.float32), ((0, 0), (0, padding))),
        detection=np.pad(np.broadcast_to(np.float32(detection), length), (0, padding))[None],
        number=np.arange(total, dtype=np.int32)[None],
        mask=np.arange(total)[None] < length,
    )
