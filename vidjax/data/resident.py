"""Clips that stay on the devices: flat arrays of frames, gathered by index.

A training step reads only the frames that its fusion draws. A batch is a function of (seed, step),
computed on the devices: several steps run without the host, and a run that resumes needs nothing
but its step.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices
from vidjax.core.batch import BATCHED, Array, Batch, Frames, LazyFeatures, Packed
from vidjax.data.clips import (
    BatchPlan,
    EvalPlan,
    Modality,
    Split,
    TrainingData,
    best_frames,
    blocks_of,
    make_eval_plan,
)
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.order import draw, first_frame
from vidjax.utils import machine
from vidjax.utils.errors import UserError

PHASES = ("train", "eval")
MAX_MEMORY_SHARE = 0.5  # share of the free memory that clips may take
# Bytes of a resident frame beside its feature.
SCALAR_BYTES = sum(np.dtype(FRAME_FIELDS[name].dtype).itemsize for name in BATCHED[1:])
CHUNK_BYTES = 32 << 20  # bytes that are copied to the devices at once


def draw_batch(clips: Mapping[str, Packed], plan: BatchPlan, step: Array) -> Batch:
    """Returns the batch of a training step: the B clips of `order.draw`, features as LazyFeatures.

    Args:
      clips: modality -> Packed of N clips; the last frame is zeros and stands for padding.
      step: [] int32, number of the step, from 0.
    """
    position = step * plan.batch_size + jnp.arange(plan.batch_size, dtype=jnp.int32)
    drawn = draw(plan, step, position // plan.num_places, position % plan.num_places)
    frames = {
        name: frames_of(clips[name], *drawn[:2], size, drawn.windows.get(name))
        for name, size in plan.padded_lengths.items()
    }
    return Batch(frames, drawn.clip_index, drawn.batch_mask)


def frames_of(
    clips: Packed,
    clip_index: Array,
    batch_mask: Array,
    size: int,
    drawn: Array | None = None,
    *,
    lazy: bool = True,
) -> Frames:
    """Returns Frames [B, size] of B clips.

    Args:
      clips: N clips of one modality; the last frame is zeros and stands for padding.
      clip_index: [B] int32, the clips to take.
      batch_mask: [B] bool; a clip where it is False has no frames.
      size: T.
      drawn: [B] float32, see `first_frame` of a window; None takes the first T frames.
      lazy: True for LazyFeatures, which are gathered once a fusion has chosen frames.
    """
    first, length = clips.start[clip_index], clips.length[clip_index]
    if drawn is not None:
        first += first_frame(drawn, length, size)
    length = jnp.where(batch_mask, jnp.minimum(length, size), 0)
    place = jnp.arange(size, dtype=jnp.int32)
    mask = place < length[:, None]  # [B, T]
    index = jnp.where(mask, first[:, None] + place, len(clips.number) - 1)
    quality, detection, number = (
        _take(values, index) for values in (clips.quality, clips.detection, clips.number)
    )
    features = LazyFeatures(clips.features, index) if lazy else _take(clips.features, index)
    return Frames(features, quality, detection, number, mask)  # pyright: ignore[reportArgumentType]


def _take(values: Array, index: Array) -> Array:
    """Returns values[index] for an index that is valid."""
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds")


class ResidentPlan(NamedTuple):
    """The clips and frames that are to be resident on the devices.

    Attributes:
      train_splits: the training splits; `clip_index` numbers the clips of all, split by split.
      splits: the training splits and the split to evaluate.
      num_frames: modality -> number of frames, including the copies of `best`.
      best: (split, phase, modality) -> T, where the phase is `train` or `eval`. In that phase, a
        clip of more than T frames is reduced to its best T, which are stored as a copy.
      nbytes: bytes of all frames.
      widths: modality -> D.
    """

    train_splits: tuple[str, ...]
    splits: tuple[str, ...]
    modalities: tuple[str, ...]
    num_frames: Mapping[str, int]
    best: Mapping[tuple[str, str, str], int]
    nbytes: int
    widths: Mapping[str, int]


def plan_resident(data: TrainingData, plan: BatchPlan, eval_split: str) -> ResidentPlan:
    """Plans which clips are resident, from the lengths of the clips alone."""
    splits = {name: data.split(name) for name in dict.fromkeys([*plan.splits, eval_split])}
    best = {}
    for split in splits.values():
        eval_lengths = make_eval_plan(split, plan.modalities).padded_lengths
        for name in plan.modalities:
            best[split.name, "eval", name] = eval_lengths[name][-1]
            if split.name in plan.splits and plan.crop == "quality":
                best[split.name, "train", name] = plan.padded_lengths[name]
    num_frames = {
        name: sum(int(split.lengths[name].sum(dtype=np.int64)) for split in splits.values())
        for name in plan.modalities
    }
    for (split, _, name), limit in best.items():
        num_frames[name] += int(np.sum(splits[split].lengths[name] > limit)) * limit
    nbytes = 0
    for name, count in num_frames.items():
        dim, dtype = data.modalities[name]
        nbytes += count * (dim * np.dtype(dtype).itemsize + SCALAR_BYTES)
    widths = {name: data.modalities[name].dim for name in plan.modalities}
    layout = (plan.splits, tuple(splits), plan.modalities, num_frames, best, nbytes, widths)
    return ResidentPlan(*layout)


def step_bytes(
    layout: ResidentPlan, plan: BatchPlan, params: int, columns: int, mesh: Mesh
) -> float:
    """Returns an estimate of the bytes that a training step takes on a device beside the state.

    These are, as float32, the batch, the fused frames and their gradients; logits, losses and their
    gradients; and the gradients and updates of `params` bytes of parameters. The state, with that
    of the optimiser, lies on the device already.
    """
    frames = sum(plan.padded_lengths[name] * (4 * width + SCALAR_BYTES)
                 for name, width in layout.widths.items())  # fmt: skip
    return 3 * plan.batch_size * (frames + 4 * columns) / mesh.size + 2 * params


def choose_mode(
    mode: str, layout: ResidentPlan, mesh: Mesh, num_drawn: int, taken: float = 0
) -> str:
    """Returns `resident` or `streaming`; the free memory decides for `auto`.

    `mode` is `config.data.mode`; `num_drawn` counts the clips in all batches of the run; `taken` is
    `step_bytes`. ValueError for `resident` with more clips or frames than an int32 counts.
    """
    too_many = max(num_drawn, *layout.num_frames.values()) >= 2**31 - 1
    if mode == "resident" and too_many:
        raise UserError(
            f"config.data.mode='resident': {num_drawn:,} clips to draw and "
            f"{max(layout.num_frames.values()):,} frames are more than an int32 counts"
        )
    if mode != "auto":
        return mode
    return (
        "streaming"
        if too_many or layout.nbytes > MAX_MEMORY_SHARE * (free_bytes(mesh) - taken)
        else "resident"
    )


def free_bytes(mesh: Mesh) -> float:
    """Returns the free bytes of the fullest local device; emulated devices share the host's."""
    free = []
    for device in mesh.local_devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(free) if free else machine.free_bytes() / mesh.size


class Resident:
    """Splits of a dataset on the devices; a `ClipSource`.

    `train` is modality -> Packed of the training clips, by `clip_index`; the last frame is zeros.
    """

    def __init__(self, data: TrainingData, layout: ResidentPlan, mesh: Mesh):
        """Reads every clip of the layout once; ValueError for damaged records."""
        self._data, self._mesh = data, mesh
        self.identities = data.identities
        self._gathered = jax.jit(
            gathered, static_argnames="sizes", out_shardings=devices.by_rows(mesh)
        )
        fillers = {
            name: _Filler(layout.num_frames[name], data.modalities[name], mesh)
            for name in layout.modalities
        }
        # Each [2, N]: first frame and number of frames of every clip.
        tables = {
            (split, phase, name): np.zeros((2, len(data.split(split).clips)), np.int32)
            for split, phase, name in itertools.product(layout.splits, PHASES, layout.modalities)
        }
        for split in layout.splits:
            for clip_index, chunk in data.packed(split, layout.modalities):
                for name, packed in chunk.items():
                    begin = fillers[name].append(packed)
                    for phase in PHASES:
                        key = (split, phase, name)
                        limit = layout.best.get(key, len(packed.quality))
                        tables[key][:, clip_index] = packed.start + begin, packed.length
                        for row in np.flatnonzero(packed.length > limit).tolist():
                            best = fillers[name].append(_best_frames(packed, row, limit))
                            tables[key][:, clip_index[row]] = best, limit
        frames = {name: filler.finish() for name, filler in fillers.items()}

        def locate(splits: Sequence[str], phase: str) -> dict[str, Packed]:
            """Returns modality -> Packed of the clips of `splits`, as used in a phase."""
            located = {}
            for name, packed in frames.items():
                table = np.concatenate([tables[split, phase, name] for split in splits], axis=1)
                start, length = devices.replicate(mesh, tuple(table))
                located[name] = packed._replace(start=start, length=length)
            return located

        self.train = locate(layout.train_splits, "train")
        self._eval = {split: locate([split], "eval") for split in layout.splits}

    def split(self, name: str) -> Split:
        """Returns one split of the dataset."""
        return self._data.split(name)

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks on the devices; see `ClipSource`.

        Within a bucket, clips are ordered by name. Splits and modalities that are not resident are
        read from the dataset.
        """
        if plan.split not in self._eval or not set(plan.modalities) <= set(self._eval[plan.split]):
            yield from self._data.eval_batches(plan, rows=rows)
            return
        for bucket, clips in blocks_of(plan.bucket, rows):
            clip_index = np.pad(clips.astype(np.int32), (0, rows - len(clips)))
            batch_mask = np.arange(rows) < len(clips)
            clip_index = devices.put(clip_index, devices.by_rows(self._mesh))
            batch_mask = devices.put(batch_mask, devices.by_rows(self._mesh))
            clips = [self._eval[plan.split][name] for name in plan.modalities]
            sizes = tuple(plan.padded_lengths[name][bucket] for name in plan.modalities)
            frames = self._gathered(clips, clip_index, batch_mask, sizes=sizes)
            yield Batch(dict(zip(plan.modalities, frames, strict=True)), clip_index, batch_mask)


def gathered(
    clips: Sequence[Packed], clip_index: Array, batch_mask: Array, sizes: tuple[int, ...]
) -> list[Frames]:
    """Returns `frames_of` B clips with their features gathered, modality by modality."""
    return [
        frames_of(packed, clip_index, batch_mask, size, lazy=False)
        for packed, size in zip(clips, sizes, strict=True)
    ]


def _best_frames(packed: Packed, row: int, count: int) -> Packed:
    """Returns the best `count` frames of one clip, in time order."""
    clip = slice(packed.start[row], packed.start[row] + packed.length[row])
    chosen = best_frames(np.asarray(packed.quality[clip]), count)
    return _flat([getattr(packed, name)[clip][chosen] for name in BATCHED])


def _flat(fields: Sequence[Array]) -> Packed:
    """Returns Packed with empty `start` and `length`, from one array per field of BATCHED."""
    none = np.empty(0, np.int32)
    return Packed(**dict(zip(BATCHED, fields, strict=True)), start=none, length=none)


class _Filler:
    """Fills flat arrays on the devices from the front; the host holds one chunk at a time."""

    def __init__(self, num_frames: int, modality: Modality, mesh: Mesh):
        """Allocates `num_frames` frames of a modality, and one more of zeros."""
        self._mesh = mesh
        dtype = np.dtype(modality.dtype)
        scalars = [((), np.dtype(FRAME_FIELDS[name].dtype)) for name in BATCHED[1:]]
        fields = [((modality.dim,), dtype), *scalars]
        rows = max(1, CHUNK_BYTES // (modality.dim * dtype.itemsize))
        self._chunk = [np.empty((rows, *shape), dtype) for shape, dtype in fields]
        self._held = self._done = 0
        zeros = jax.jit(
            lambda: [
                jnp.zeros((num_frames + 1, *shape), jax.dtypes.canonicalize_dtype(dtype))
                for shape, dtype in fields
            ],
            out_shardings=devices.replicated(mesh),
        )
        self._arrays = zeros()

    def append(self, packed: Packed) -> int:
        """Appends the frames of some clips and returns the index of the first."""
        fields = [getattr(packed, name) for name in BATCHED]
        begin = self._done + self._held
        taken, count = 0, len(packed.quality)
        while taken < count:
            added = min(count - taken, len(self._chunk[0]) - self._held)
            for chunk, field in zip(self._chunk, fields, strict=True):
                chunk[self._held : self._held + added] = field[taken : taken + added]
            self._held += added
            taken += added
            if self._held == len(self._chunk[0]):
                self._flush()
        return begin

    def _flush(self) -> None:
        part = [chunk[: self._held] for chunk in self._chunk]
        part = devices.replicate(self._mesh, part)
        self._arrays = _put(self._arrays, part, np.int32(self._done))
        jax.block_until_ready(self._arrays)  # before the chunk is overwritten
        self._done += self._held
        self._held = 0

    def finish(self) -> Packed:
        """Returns Packed of all frames, with empty `start` and `length`."""
        if self._held:
            self._flush()
        return _flat(self._arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _put(arrays: Sequence[Array], part: Sequence[Array], at: Array) -> list[Array]:
    return [
        jax.lax.dynamic_update_slice_in_dim(whole, piece, at, axis=0)
        for whole, piece in zip(arrays, part, strict=True)
    ]
