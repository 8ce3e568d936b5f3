"""A run as one function of arrays, frames in and scores out, and made-up frames to compare it by.

The function is what a file of another runtime holds: fusion, net, all members and their mean. Its
inputs are float32 or bool arrays named MODALITY_FIELD, B clips padded to T frames, see `FIELDS`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vidjax.core import ensemble, fusion
from vidjax.core.batch import Array, Batch, Frames
from vidjax.data.clips import MAX_EVAL_FRAMES
from vidjax.evaluation import eval_step
from vidjax.evaluation.predict import Predictor
from vidjax.evaluation.scoring import keep_best
from vidjax.models.system import System
from vidjax.utils.errors import UserError

# Field of a modality's frames -> dtype. `mask` is True for real frames, False for padding.
FIELDS = {"features": np.float32, "quality": np.float32, "detection": np.float32, "mask": np.bool_}
BATCH = "B"
OUTPUTS: tuple[str, ...] = ("scores", "embeddings")  # [B, C] and [B, D], float32
TOLERANCE = 1e-5  # of a difference, as a part of the largest of 1 and the value
LENGTHS = (5, 1, 9, 3)  # frames of the made-up clips
BESIDE_ONE = 6  # frames of another one, whose last modality has one
LARGEST = 1 << 31  # bytes of a file with a program: protocol and flat buffers hold no more

Inputs = Mapping[str, Array]
Member = tuple[Any, Any, Array]  # parameters, other collections, view
Outputs = dict[str, Array]
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # symbolic where a size may vary


def input_shapes(run: Predictor) -> Shapes:
    """Returns the inputs of `outputs` by name, with the symbols B and T_MODALITY.

    A clip's frames of a modality are T_MODALITY long. Runs that judge frames one by one, with
    `after_fusion=examples`, want one length T for all modalities.
    """
    one_length = run.system.frame_is_example
    scope = jax.export.SymbolicScope()
    shapes = {}
    for name, width in run.modalities.items():
        frames = "T" if one_length else f"T_{symbol(name)}"
        dims = jax.export.symbolic_shape(f"{BATCH}, {frames}", scope=scope)
        for field, dtype in FIELDS.items():
            shape = (*dims, width) if field == "features" else dims
            shapes[f"{name}_{field}"] = jax.ShapeDtypeStruct(shape, dtype)
    return shapes


def of_members(run: Predictor) -> Callable[[Inputs], Outputs]:
    """Returns `outputs` of a run with all its members as a function of arrays of any size."""
    return functools.partial(outputs, run, members(run))


def outputs(run: Predictor, members: Sequence[Member], inputs: Inputs) -> Outputs:
    """Returns the scores [B, C] and the embeddings [B, D] of a run that has these weights."""
    batch = as_batch(run, inputs)
    if run.system.frame_is_example:
        fused = _fuse_alone(run.system, batch.frames)
        fusions = {name: lambda *_, one=one: one for name, one in fused.items()}
        run = run._replace(system=run.system._replace(fuse_eval=fusions))
    return {
        "scores": _scores(run, members, batch),
        "embeddings": _embeddings(run, members, batch),
    }


def symbol(name: str) -> str:
    """Returns the name of a modality with only letters, digits and _."""
    return "".join(x if x.isascii() and x.isalnum() else "_" for x in name)


def as_batch(run: Predictor, inputs: Inputs) -> Batch:
    """Returns the batch of the inputs, B clips that all exist."""
    frames = {}
    for name in run.modalities:
        features, quality, detection, mask = (inputs[f"{name}_{field}"] for field in FIELDS)
        if run.config.data.quality == "norm":
            quality = jnp.linalg.norm(features, axis=-1)
        number = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
        frames[name] = Frames(features, quality, detection, number, _best_frames(quality, mask))
    rows = next(iter(frames.values())).mask.shape[0]
    return Batch(frames, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))


def _best_frames(quality: Array, mask: Array) -> Array:
    """Returns the mask [B, T] of the frames that a run reads, see `ClipSource.eval_batches`."""
    least = jnp.finfo(jnp.float32).min
    ordered = jnp.where(jnp.isnan(quality), least, jnp.maximum(quality, least))

    def drop(_: Array, mask: Array) -> Array:
        order = jnp.argsort(jnp.where(mask, -ordered, jnp.inf), axis=1, stable=True)
        return mask & (jnp.argsort(order, axis=1) < MAX_EVAL_FRAMES)

    # One round or none, as ONNX has loops here and no choice: short clips are not sorted.
    long = jnp.any(jnp.sum(mask, axis=1) > MAX_EVAL_FRAMES)
    return jax.lax.fori_loop(0, long.astype(jnp.int32), drop, mask)


def _fuse_alone(system: System, frames: Mapping[str, Frames]) -> dict[str, Frames]:
    """Fuses frames of clips as a run fuses each clip alone, where frames are examples.

    There a modality is padded by its own length. So its only frame is repeated beside all frames of
    another, see `System.to_examples`. Here all modalities are padded to one length.
    """
    fused = {name: fuse(None, frames[name]) for name, fuse in system.fuse_eval.items()}
    padded = [name for name in fused if fused[name].mask.shape[1] == frames[name].mask.shape[1]]
    if len(padded) < 2:
        return fused
    for name in padded:  # the n-th real frames are one example
        order = jnp.argsort(~frames[name].mask, axis=1, stable=True)
        fused[name] = fusion.map_fields(lambda x, to=order: fusion.take(x, to), fused[name])
    several = {name: jnp.sum(frames[name].mask, axis=1, keepdims=True) > 1 for name in padded}
    exists = jnp.any(jnp.stack([fused[name].mask & several[name] for name in padded]), axis=0)
    for name in padded:
        alone = exists.any(axis=1, keepdims=True) & ~several[name]

        def repeat(x: Array, where: Array = alone) -> Array:
            return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 2)), x[:, :1], x)

        repeated = fusion.map_fields(repeat, fused[name])
        fused[name] = repeated._replace(mask=repeated.mask & (exists | ~alone))
    return fused


def members(run: Predictor) -> list[Member]:
    """Returns parameters, other collections and view of each member."""
    weights = run.params, run.model_state
    return [
        (*jax.device_get(ensemble.take(weights, number)), jnp.int32(member.view))
        for number, member in enumerate(run.training_sets.members)
    ]


def _scores(run: Predictor, members: Sequence[Member], batch: Batch) -> Array:
    """Returns the mean scores of all members, [B, C], as `ModelScorer` computes them."""
    system, count = run.system, len(run.identities)
    each = [
        eval_step.eval_step(system, params, state, view, batch)[:, 1 : 1 + count]
        for params, state, view in members
    ]
    scores = each[0]
    if len(each) > 1:
        total = eval_step.no_scores(scores, logs=system.scores_are_logs)
        for one in each:
            total = eval_step.add_scores(total, one, jnp.ones(scores.shape[0], scores.dtype))
        scores = eval_step.mean_scores(total)
    top = cast(int, run.config.eval.top_classes)
    return keep_best(scores, top) if 0 < top < count else scores


def _embeddings(run: Predictor, members: Sequence[Member], batch: Batch) -> Array:
    """Returns the unit vectors [B, D] of `Predictor.embed`."""
    parts = [
        eval_step.embed_step(run.system, params, state, view, batch)
        for params, state, view in members
    ]
    vectors = jnp.concatenate(parts, axis=1)
    norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(norms > 0, norms, 1.0)


class MadeUp(NamedTuple):
    """Made-up clips, as inputs of the function and as a run takes them, and the run's answers."""

    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def made_up(run: Predictor, seed: int = 0, padding: int = 2) -> MadeUp:
    """Returns random clips of LENGTHS frames: the second one lacks all modalities but the last.

    Where frames are examples, another clip has a single frame of the last of several modalities.
    What a run answers for it alone is expected.

    Args:
      run: the run whose answers are returned.
      seed: of the random numbers.
      padding: number of frames by which arrays are longer than the longest clip.
    """
    rng, inputs = np.random.default_rng(seed), {}
    names, longest = list(run.modalities), max(LENGTHS) + padding
    uneven = run.system.frame_is_example and len(names) > 1
    lengths = np.array([*LENGTHS, BESIDE_ONE] if uneven else LENGTHS)
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
    named = [(f"made up by vidjax export {row}", clip) for row, clip in enumerate(clips)]
    requests = [dict(part) for part in (named[: len(LENGTHS)], named[len(LENGTHS) :]) if part]
    expected = {
        "scores": np.concatenate([run.scores(one) for one in requests]),
        "embeddings": np.concatenate([run.embed(one) for one in requests]),
    }
    return MadeUp(inputs, expected)


def difference(found: Mapping[str, ArrayLike], expected: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference of the outputs in `found`, inf if they differ in kind.

    A difference is a part of the value, or absolute for values below 1. Infinite values are equal
    or not.
    """
    worst = 0.0
    for name, given in found.items():
        value, wanted = np.asarray(given, np.float64), np.asarray(expected[name], np.float64)
        if value.shape != wanted.shape or np.isnan(value).any():
            return float("inf")
        finite = np.isfinite(wanted)
        if not np.array_equal(value[~finite], wanted[~finite]):
            return float("inf")
        gap = np.abs(value[finite] - wanted[finite])
        worst = max(worst, float(np.max(gap / np.maximum(1, np.abs(wanted[finite])), initial=0.0)))
    return worst


def check(
    what: str, run: Predictor, answer: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
) -> float:
    """Compares a loaded model with the run on made-up clips; returns the largest difference.

    Batches of one and of several clips, of two lengths, are compared.

    Raises:
      UserError: they differ by more than TOLERANCE.
    """
    worst = 0.0
    for seed, padding in enumerate((2, 0)):
        made = made_up(run, seed, padding)
        worst = max(worst, difference(answer(made.inputs), made.expected))
        single = {name: value[2:3] for name, value in made.inputs.items()}
        wanted = {name: value[2:3] for name, value in made.expected.items()}
        worst = max(worst, difference(answer(single), wanted))
    check_tolerance(what, worst)
    return worst


def check_tolerance(what: str, worst: float) -> None:
    """Raises UserError if a difference is larger than TOLERANCE."""
    if not worst <= TOLERANCE:
        raise UserError(
            f"{what}: its scores differ from ours by {worst:.1e}, more than {TOLERANCE:.0e}\n"
            "nothing was written: choose another format"
        )
