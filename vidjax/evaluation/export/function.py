"""Turns a trained run into a function of arrays, and compares exported functions with the run.

The function computes scores and embeddings with the fusion of frames and all nets of the ensemble.
Its inputs are the frames of B clips, padded to T frames: arrays with the names MODALITY_FIELD, such
as `face_features`. FIELDS lists the fields.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vidjax.core import fusion
from vidjax.core.batch import Array, Batch, Frames
from vidjax.data.clips import MAX_EVAL_FRAMES
from vidjax.evaluation import eval_step
from vidjax.evaluation.predict import Predictor
from vidjax.evaluation.scoring import keep_best
from vidjax.models.build_system import System
from vidjax.utils.errors import UserError

# Field of a modality's frames -> dtype. `mask` is True for real frames, False for padding.
FIELDS = {"features": np.float32, "quality": np.float32, "detection": np.float32, "mask": np.bool_}
BATCH = "B"
LENGTHS = (5, 1, 9, 3)  # numbers of frames of the random clips
UNEVEN_LENGTH = 6  # frames of an additional clip, whose last modality has a single frame
TOLERANCE = 1e-5  # largest allowed difference, relative to max(1, |value|)
LARGEST = 1 << 31  # largest file with a program, the limit of protocol buffers and flat buffers

Inputs = Mapping[str, Array]
Member = tuple[Any, Any, Array]  # parameters, other Flax collections, `view` of the member
Outputs = dict[str, Array]
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # B and T are symbols


def input_shapes(run: Predictor) -> Shapes:
    """Returns the inputs of an exported run, name -> shape and dtype.

    The numbers of clips and of frames are symbols of `jax.export`, so an exported function accepts
    any number. Each modality has its own number of frames. But if the run classifies single frames
    (`after_fusion=examples`), all modalities have the same number.
    """
    same_length = run.model.system.frame_is_example
    scope = jax.export.SymbolicScope()
    shapes = {}
    for name, width in run.modalities.items():
        word = name.replace("_", "__").replace("-", "_m")  # `-` is not allowed in a symbol
        frames = "T" if same_length else f"T_{word}"
        dims = jax.export.symbolic_shape(f"{BATCH}, {frames}", scope=scope)
        for field, dtype in FIELDS.items():
            shape = (*dims, width) if field == "features" else dims
            shapes[f"{name}_{field}"] = jax.ShapeDtypeStruct(shape, dtype)
    return shapes


def make_function(run: Predictor) -> Callable[[Inputs], Outputs]:
    """Returns the function to export: `compute_outputs` with the weights of the run."""
    return functools.partial(compute_outputs, run, get_members(run))


def compute_outputs(run: Predictor, members: Sequence[Member], inputs: Inputs) -> Outputs:
    """Computes the outputs of B clips: `scores` [B, C] and `embeddings` [B, D], both float32.

    C is the number of identities, and D the length of an embedding. `inputs` are name -> array, see
    `input_shapes`. `members` are the weights, see `get_members`. `run` has the settings. The
    weights in `run` are not used.
    """
    batch = make_batch(run, inputs)
    if run.model.system.frame_is_example:
        fused = _fuse_clips(run.model.system, batch.frames)
        fusions = {name: lambda *_, frames=frames: frames for name, frames in fused.items()}
        system = run.model.system._replace(fuse_eval=fusions)
        run = dataclasses.replace(run, model=run.model._replace(system=system))
    return {
        "scores": _compute_scores(run, members, batch),
        "embeddings": _compute_embeddings(run, members, batch),
    }


def make_batch(run: Predictor, inputs: Inputs) -> Batch:
    """Makes a batch of B clips from the inputs, name -> array, see `input_shapes`."""
    frames = {}
    for name in run.modalities:
        features, quality, detection, mask = (inputs[f"{name}_{field}"] for field in FIELDS)
        if run.config.data.quality == "norm":
            quality = jnp.linalg.norm(features, axis=-1)
        number = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
        frames[name] = Frames(
            features, quality, detection, number, _mask_best_frames(quality, mask)
        )
    rows = next(iter(frames.values())).mask.shape[0]
    return Batch(frames, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))


def _mask_best_frames(quality: Array, mask: Array) -> Array:
    """Returns `mask` [B, T], in which at most 512 frames of each clip stay True.

    These are the frames of the highest `quality` [B, T].
    """
    least = jnp.finfo(jnp.float32).min
    ordered = jnp.where(jnp.isnan(quality), least, jnp.maximum(quality, least))

    def drop(_: Array, mask: Array) -> Array:
        order = jnp.argsort(jnp.where(mask, -ordered, jnp.inf), axis=1, stable=True)
        return mask & (jnp.argsort(order, axis=1) < MAX_EVAL_FRAMES)

    # A loop of 0 or 1 rounds replaces a conditional, which `onnx_graph` does not support.
    long = jnp.any(jnp.sum(mask, axis=1) > MAX_EVAL_FRAMES)
    return jax.lax.fori_loop(0, long.astype(jnp.int32), drop, mask)


def _fuse_clips(system: System, frames: Mapping[str, Frames]) -> dict[str, Frames]:
    """Fuses the frames of B clips, modality -> frames, with the functions `system.fuse_eval`."""
    # If a modality of a clip has a single frame, a run combines this frame with every frame of the
    # other modalities. `System.to_examples` recognises a single frame by the length of its array.
    # But here all modalities are padded to the same length, so single frames are repeated.
    fused = {name: fuse(None, frames[name]) for name, fuse in system.fuse_eval.items()}
    padded = [name for name in fused if fused[name].mask.shape[1] == frames[name].mask.shape[1]]
    if len(padded) < 2:
        return fused
    for name in padded:  # the n-th real frames of all modalities form an example
        order = jnp.argsort(~frames[name].mask, axis=1, stable=True)
        fused[name] = fusion.map_fields(lambda x, to=order: fusion.take(x, to), fused[name])
    several = {name: jnp.sum(frames[name].mask, axis=1, keepdims=True) > 1 for name in padded}
    exists = jnp.any(jnp.stack([fused[name].mask & several[name] for name in padded]), axis=0)
    for name in padded:
        is_single = exists.any(axis=1, keepdims=True) & ~several[name]

        def repeat(x: Array, where: Array = is_single) -> Array:
            return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 2)), x[:, :1], x)

        repeated = fusion.map_fields(repeat, fused[name])
        fused[name] = repeated._replace(mask=repeated.mask & (exists | ~is_single))
    return fused


def get_members(run: Predictor) -> list[Member]:
    """Returns `TrainedModel.member(number)` of each member of a run, as arrays of numpy."""
    count = len(run.model.training_sets.members)
    return [jax.device_get(run.model.member(number)) for number in range(count)]


def _compute_scores(run: Predictor, members: Sequence[Member], batch: Batch) -> Array:
    """Computes the mean scores [B, C] of all members, like `scoring.score_blocks`."""
    system, count = run.model.system, len(run.identities)
    each = [
        eval_step.eval_step(system, params, state, view, batch)[:, 1 : 1 + count]
        for params, state, view in members
    ]
    if len(each) == 1:
        return keep_best(system, each[0])
    weights = [jnp.ones(scores.shape[0], scores.dtype) for scores in each]
    total = eval_step.collect_scores(each, weights, logs=system.scores_are_logs)
    return keep_best(system, eval_step.mean_scores(total))


def _compute_embeddings(run: Predictor, members: Sequence[Member], batch: Batch) -> Array:
    """Computes the embeddings [B, D], like `Predictor.embed`."""
    parts = [
        eval_step.embed_step(run.model.system, params, state, view, batch)
        for params, state, view in members
    ]
    vectors = jnp.concatenate(parts, axis=1)
    norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(norms > 0, norms, 1.0)


class RandomClips(NamedTuple):
    """Random clips, and the outputs that an exported run must compute for them."""

    inputs: dict[str, np.ndarray]  # name -> array, see `input_shapes`
    expected: dict[str, np.ndarray]  # name of an output -> array


def make_random_clips(run: Predictor, seed: int = 0, padding: int = 2) -> RandomClips:
    """Makes random clips, and computes the outputs of a run for these clips.

    `padding` is the number of padded frames after the longest clip. To test missing modalities, one
    clip has only the last modality of the run.
    """
    # The run scores the additional clip in a separate call. Padding to the length of other clips
    # would hide that it has a single frame.
    rng, inputs = np.random.default_rng(seed), {}
    names, longest = list(run.modalities), max(LENGTHS) + padding
    uneven = run.model.system.frame_is_example and len(names) > 1
    lengths = np.array([*LENGTHS, UNEVEN_LENGTH] if uneven else LENGTHS)
    clips: list[dict[str, Any]] = [{} for _ in lengths]
    for name, width in run.modalities.items():
        shape = (len(lengths), longest)
        real = np.arange(longest) < lengths[:, None]
        real[1] &= name == names[-1]
        if uneven and name == names[-1]:
            real[-1, 1:] = False
        values = {
            "features": rng.normal(size=(*shape, width)).astype(np.float32),
            "quality": rng.uniform(0, 100, shape).astype(np.float32),
            "detection": rng.uniform(0.5, 1, shape).astype(np.float32),
        }
        for field, value in values.items():
            value[~real] = 0
            inputs[f"{name}_{field}"] = value
        inputs[f"{name}_mask"] = real
        for row in np.flatnonzero(real.any(axis=1)):
            clips[row][name] = {field: value[row][real[row]] for field, value in values.items()}
    named = [(f"random clip {row} of vidjax export", clip) for row, clip in enumerate(clips)]
    requests = [dict(part) for part in (named[: len(LENGTHS)], named[len(LENGTHS) :]) if part]
    expected = {
        "scores": np.concatenate([run.scores(request) for request in requests]),
        "embeddings": np.concatenate([run.embed(request) for request in requests]),
    }
    return RandomClips(inputs, expected)


def difference(outputs: Mapping[str, ArrayLike], expected: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference between outputs and expected outputs, both name -> array.

    For expected values above 1 in magnitude, the difference is relative. Otherwise, it is absolute.
    If shapes differ, an output is NaN, or an infinite value differs, returns inf.
    """
    worst = 0.0
    for name, output in outputs.items():
        value, target = np.asarray(output, np.float64), np.asarray(expected[name], np.float64)
        if value.shape != target.shape or np.isnan(value).any():
            return float("inf")
        finite = np.isfinite(target)
        if not np.array_equal(value[~finite], target[~finite]):
            return float("inf")
        gap = np.abs(value[finite] - target[finite])
        worst = max(worst, float(np.max(gap / np.maximum(1, np.abs(target[finite])), initial=0.0)))
    return worst


def check(
    format_name: str,
    run: Predictor,
    predict: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
) -> float:
    """Compares an exported model with the run on random clips; returns the largest difference.

    `predict` computes the outputs of the exported model. Batches of one and of several clips are
    compared, with and without padded frames. Raises UserError if the difference is too large.
    """
    worst = 0.0
    for seed, padding in enumerate((2, 0)):
        several = make_random_clips(run, seed, padding)
        for clips in (several, jax.tree.map(lambda rows: rows[2:3], several)):
            worst = max(worst, difference(predict(clips.inputs), clips.expected))
    if not worst <= TOLERANCE:
        raise UserError(
            f"--format={format_name}: nothing was exported, because the outputs differ from vidjax "
            f"by {worst:.1e}, more than {TOLERANCE:.0e}\nchoose another format"
        )
    return worst
