"""Clips that stay on the devices, as flat arrays of frames.

A training step reads only the frames that its fusion chooses. The devices compute each batch from
(seed, step): several steps run without the host, and a resumed run needs only its step.
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
    choose_best_frames,
    make_eval_plan,
    split_blocks,
)
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.order import choose_first_frame, draw_batch_clips
from vidjax.utils import machine
from vidjax.utils.errors import UserError

PHASES = ("train", "eval")
MAX_MEMORY_SHARE = 0.5  # share of the free memory that clips may take
# Bytes of a resident frame without its feature.
SCALAR_BYTES = sum(np.dtype(FRAME_FIELDS[name].dtype).itemsize for name in BATCHED[1:])
CHUNK_BYTES = 32 << 20  # copied to the devices at once


def draw_batch(clips: Mapping[str, Packed], plan: BatchPlan, step: Array) -> Batch:
    """Returns the B clips of a training step, see `order.draw_batch_clips`, with LazyFeatures.

    Args:
      clips: modality -> Packed of N clips. The last frame is zeros and serves as padding.
      step: [] int32, number of the step, from 0.
    """
    position = step * plan.batch_size + jnp.arange(plan.batch_size, dtype=jnp.int32)
    drawn = draw_batch_clips(plan, step, position // plan.num_places, position % plan.num_places)
    frames = {
        name: gather_frames(clips[name], *drawn[:2], size, drawn.windows.get(name))
        for name, size in plan.padded_lengths.items()
    }
    return Batch(frames, drawn.clip_index, drawn.batch_mask)


def gather_frames(
    clips: Packed,
    clip_index: Array,
    batch_mask: Array,
    size: int,
    window: Array | None = None,
    *,
    lazy: bool = True,
) -> Frames:
    """Returns Frames [B, size] of B clips.

    Args:
      clips: N clips of a modality. The last frame is zeros and serves as padding.
      clip_index: [B] int32, the clips to take.
      batch_mask: [B] bool, False for rows that stay empty.
      size: T.
      window: [B] float32, the random windows (see `choose_first_frame`); None: the first T frames.
      lazy: True for LazyFeatures, which are gathered after a fusion has chosen frames.
    """
    first, length = clips.start[clip_index], clips.length[clip_index]
    if window is not None:
        first += choose_first_frame(window, length, size)
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
    """Returns values[index]; the index must be valid."""
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds")


class ResidentPlan(NamedTuple):
    """The clips and frames that will be resident on the devices.

    Attributes:
      train_splits: the training splits; `clip_index` counts through their clips, in order.
      splits: the training splits and the split to evaluate.
      modalities: the names of the modalities.
      num_frames: modality -> number of frames, including the copies of `best`.
      best: (split, phase, modality) -> T, where the phase is `train` or `eval`. In this phase, a
        clip of more than T frames is reduced to its best T frames, which are stored as a copy.
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


def make_resident_plan(data: TrainingData, plan: BatchPlan, eval_split: str) -> ResidentPlan:
    """Plans which clips are resident. Only the lengths of the clips are read."""
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
    """Estimates the bytes that a training step needs on a device, in addition to the state.

    The estimate counts, as float32, the batch, the fused frames and their gradients; the logits,
    losses and their gradients; and the gradients and updates of the parameters. The parameters and
    the state of the optimiser are already on the device.

    Args:
      params: bytes of the parameters.
      columns: number of class columns.
    """
    frames = sum(plan.padded_lengths[name] * (4 * width + SCALAR_BYTES)
                 for name, width in layout.widths.items())  # fmt: skip
    return 3 * plan.batch_size * (frames + 4 * columns) / mesh.size + 2 * params


def choose_mode(
    mode: str, layout: ResidentPlan, mesh: Mesh, num_drawn: int, taken: float = 0
) -> str:
    """Returns `resident` or `streaming`.

    Args:
      mode: `config.data.mode`. With `auto`, the free memory decides.
      num_drawn: the number of clips in all batches of the run.
      taken: bytes of a training step, see `step_bytes`.

    Raises:
      UserError: the mode is `resident`, and an int32 cannot count the clips or frames.
    """
    too_many = max(num_drawn, *layout.num_frames.values()) >= 2**31 - 1
    if mode == "resident" and too_many:
        raise UserError(
            f"config.data.mode='resident': {num_drawn:,} clips to draw and "
            f"{max(layout.num_frames.values()):,} frames are too many for an int32\n"
            "use --config.data.mode=streaming"
        )
    if mode != "auto":
        return mode
    return (
        "streaming"
        if too_many or layout.nbytes > MAX_MEMORY_SHARE * (find_least_free_bytes(mesh) - taken)
        else "resident"
    )


def find_least_free_bytes(mesh: Mesh) -> float:
    """Returns the free bytes of the fullest local device.

    On a CPU, the free memory of the host is divided by the number of emulated devices.
    """
    free = []
    for device in mesh.local_devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(free) if free else machine.free_bytes() / mesh.size


class Resident:
    """A `ClipSource` that keeps the clips of some splits on the devices.

    Attributes:
      train: modality -> Packed of the training clips in the order of `clip_index`. The last frame
        is zeros, and is used as padding.
    """

    def __init__(self, data: TrainingData, layout: ResidentPlan, mesh: Mesh):
        """Copies the clips of the layout to the devices. Raises UserError for damaged records."""
        self._data, self._mesh = data, mesh
        self.identities = data.identities
        self._gathered = jax.jit(
            gather_modalities, static_argnames="sizes", out_shardings=devices.row_layout(mesh)
        )
        fillers = {
            name: _Filler(layout.num_frames[name], data.modalities[name], mesh)
            for name in layout.modalities
        }
        # Each table is [2, N]: the first frame and the number of frames of each clip.
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
                            best = fillers[name].append(_select_best_frames(packed, row, limit))
                            tables[key][:, clip_index[row]] = best, limit
        frames = {name: filler.finish() for name, filler in fillers.items()}

        def locate(splits: Sequence[str], phase: str) -> dict[str, Packed]:
            """Returns modality -> Packed of the clips of `splits` in a phase."""
            located = {}
            for name, packed in frames.items():
                table = np.concatenate([tables[split, phase, name] for split in splits], axis=1)
                start, length = devices.replicate(mesh, tuple(table))
                located[name] = packed._replace(start=start, length=length)
            return located

        self.train = locate(layout.train_splits, "train")
        self._eval = {split: locate([split], "eval") for split in layout.splits}

    def split(self, name: str) -> Split:
        """Returns a split of the dataset."""
        return self._data.split(name)

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks on the devices; see `ClipSource`.

        Within a bucket, clips are sorted by name. If the split or a modality is not resident, all
        frames are read from the dataset.
        """
        if plan.split not in self._eval or not set(plan.modalities) <= set(self._eval[plan.split]):
            yield from self._data.eval_batches(plan, rows=rows)
            return
        for bucket, clips in split_blocks(plan.bucket, rows):
            clip_index = np.pad(clips.astype(np.int32), (0, rows - len(clips)))
            batch_mask = np.arange(rows) < len(clips)
            clip_index = devices.put(clip_index, devices.row_layout(self._mesh))
            batch_mask = devices.put(batch_mask, devices.row_layout(self._mesh))
            clips = [self._eval[plan.split][name] for name in plan.modalities]
            sizes = tuple(plan.padded_lengths[name][bucket] for name in plan.modalities)
            frames = self._gathered(clips, clip_index, batch_mask, sizes=sizes)
            yield Batch(dict(zip(plan.modalities, frames, strict=True)), clip_index, batch_mask)


def gather_modalities(
    clips: Sequence[Packed], clip_index: Array, batch_mask: Array, sizes: tuple[int, ...]
) -> list[Frames]:
    """Returns the Frames of B clips in each modality, see `gather_frames`."""
    return [
        gather_frames(packed, clip_index, batch_mask, size, lazy=False)
        for packed, size in zip(clips, sizes, strict=True)
    ]


def _select_best_frames(packed: Packed, row: int, count: int) -> Packed:
    """Returns the best `count` frames of a clip, in time order."""
    clip = slice(packed.start[row], packed.start[row] + packed.length[row])
    chosen = choose_best_frames(np.asarray(packed.quality[clip]), count)
    return _make_flat_arrays([getattr(packed, name)[clip][chosen] for name in BATCHED])


def _make_flat_arrays(fields: Sequence[Array]) -> Packed:
    """Returns Packed with empty `start` and `length`; `fields` are the arrays of BATCHED."""
    empty = np.empty(0, np.int32)
    return Packed(**dict(zip(BATCHED, fields, strict=True)), start=empty, length=empty)


class _Filler:
    """Fills flat arrays on the devices, from the front. The host needs memory for a chunk."""

    def __init__(self, num_frames: int, modality: Modality, mesh: Mesh):
        """Allocates `num_frames` frames of a modality, and another frame of zeros."""
        self._mesh = mesh
        dtype = np.dtype(modality.dtype)
        scalars = [((), np.dtype(FRAME_FIELDS[name].dtype)) for name in BATCHED[1:]]
        fields = [((modality.dim,), dtype), *scalars]
        rows = max(1, CHUNK_BYTES // (modality.dim * dtype.itemsize))
        self._waiting = self._done = 0  # frames in the chunk, and on the devices
        self._arrays: list[Array] = []
        if num_frames < rows:  # the chunk becomes the arrays, so no program is compiled
            self._chunk = [np.zeros((num_frames + 1, *shape), dtype) for shape, dtype in fields]
            return
        self._chunk = [np.empty((rows, *shape), dtype) for shape, dtype in fields]
        zeros = jax.jit(
            lambda: [
                jnp.zeros((num_frames + 1, *shape), jax.dtypes.canonicalize_dtype(dtype))
                for shape, dtype in fields
            ],
            out_shardings=devices.replicated_layout(mesh),
        )
        self._arrays = zeros()

    def append(self, packed: Packed) -> int:
        """Appends frames, and returns the index of the first."""
        fields = [getattr(packed, name) for name in BATCHED]
        begin = self._done + self._waiting
        taken, count = 0, len(packed.quality)
        while taken < count:
            added = min(count - taken, len(self._chunk[0]) - self._waiting)
            for chunk, field in zip(self._chunk, fields, strict=True):
                chunk[self._waiting : self._waiting + added] = field[taken : taken + added]
            self._waiting += added
            taken += added
            if self._waiting == len(self._chunk[0]):
                self._flush()
        return begin

    def _flush(self) -> None:
        part = [chunk[: self._waiting] for chunk in self._chunk]
        part = devices.replicate(self._mesh, part)
        self._arrays = _put(self._arrays, part, np.int32(self._done))
        jax.block_until_ready(self._arrays)  # the next frames overwrite the chunk
        self._done += self._waiting
        self._waiting = 0

    def finish(self) -> Packed:
        """Returns Packed of all frames, with empty `start` and `length`."""
        if not self._arrays:
            return _make_flat_arrays(devices.replicate(self._mesh, self._chunk))
        if self._waiting:
            self._flush()
        return _make_flat_arrays(self._arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _put(arrays: Sequence[Array], part: Sequence[Array], at: Array) -> list[Array]:
    return [
        jax.lax.dynamic_update_slice_in_dim(whole, piece, at, axis=0)
        for whole, piece in zip(arrays, part, strict=True)
    ]
