"""Keeps the clips of a dataset on the devices (GPU, TPU or CPU) during training, if they fit.

The host draws the clips of several training steps at once. The devices then run these steps without
the host. A step reads only the features of the frames that the model uses.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices
from vidjax.core.batch import BATCHED, Array, Batch, Frames, LazyFeatures, Packed
from vidjax.data.clips import (
    BatchPlan,
    DrawnClips,
    EvalPlan,
    Modality,
    Split,
    choose_best_frames,
    draw_clips,
    make_batch,
    make_eval_plan,
    split_blocks,
)
from vidjax.data.dataset import Dataset
from vidjax.data.packed_clips import FRAME_FIELDS, get_dtype
from vidjax.utils import machine

PHASES = ("train", "eval")
# Bytes of a frame without its feature.
SCALAR_BYTES = sum(np.dtype(field.dtype).itemsize for field in FRAME_FIELDS.values())
DRAWN_CLIPS = 1 << 18  # number of clips that are drawn at once, at most
CHUNK_BYTES = 32 << 20  # bytes that are copied to the devices at once


def count_steps(plan: BatchPlan) -> int:
    """Returns the largest number of training steps that one call of `draw_steps` can draw."""
    return max(1, DRAWN_CLIPS // plan.batch_size)


def draw_steps(plan: BatchPlan, step: int, count: int) -> DrawnClips:
    """Draws the clips of `count` training steps, beginning with `step`.

    Each array is padded with zeros to [S, B]. S is `count_steps(plan)`, and B is the batch size.
    The shape does not depend on `count`, so all calls of a training use one compiled program.
    """
    padding = (0, count_steps(plan) - count), (0, 0)
    drawn = draw_clips(plan, step, count)
    return jax.tree.map(lambda rows: np.pad(rows.reshape(count, -1), padding), drawn)


def gather_batch(
    clips: Mapping[str, Packed],
    clip_index: Array,
    batch_mask: Array,
    first: Mapping[str, Array],
    *,
    sizes: Iterable[tuple[str, int]],
    lazy: bool = True,
) -> Batch:
    """Makes a batch of B clips from clips on the devices.

    Args:
      clips: modality -> the joined frames of all clips. The last frame is zeros, for padding.
      clip_index: [B] int32, the indices of the clips.
      batch_mask: [B] bool, False for rows that stay empty.
      first: modality -> [B] int32, the first frame that is taken from each clip. If a modality is
        missing, clips are taken from their beginning.
      sizes: pairs of a modality and the number of frames of a padded clip.
      lazy: True if features become LazyFeatures, which are read only when a model uses them.
    """
    rows = clip_index, batch_mask
    frames = {
        name: gather_frames(clips[name], *rows, size, first.get(name, 0), lazy=lazy)
        for name, size in sizes
    }
    return Batch(frames, *rows)


def gather_frames(
    clips: Packed,
    clip_index: Array,
    batch_mask: Array,
    size: int,
    first: Array | int = 0,
    *,
    lazy: bool = True,
) -> Frames:
    """Returns the frames of B clips in a modality, padded to [B, size].

    Args:
      clips: the joined frames of all clips. The last frame is zeros, for padding.
      clip_index: [B] int32, the indices of the B clips.
      batch_mask: [B] bool, False for rows that stay empty.
      size: the number of frames of a padded clip, and the most frames taken from a clip.
      first: [B] int32, the first frame that is taken from each clip.
      lazy: True if features become LazyFeatures, which are read only when a model uses them.
    """
    start = clips.start[clip_index] + first
    length = jnp.where(batch_mask, jnp.minimum(clips.length[clip_index], size), 0)
    place = jnp.arange(size, dtype=jnp.int32)
    mask = place < length[:, None]  # [B, T]
    index = jnp.where(mask, start[:, None] + place, len(clips.number) - 1)
    quality, detection, number = (
        _take(values, index) for values in (clips.quality, clips.detection, clips.number)
    )
    features = LazyFeatures(clips.features, index) if lazy else _take(clips.features, index)
    return Frames(features, quality, detection, number, mask)  # pyright: ignore[reportArgumentType]


def _take(values: Array, index: Array) -> Array:
    """Returns `values[index]` without a check that the indices are in range."""
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds")


class ResidentPlan(NamedTuple):
    """The clips that are copied to the devices, and the memory that they need."""

    train_splits: tuple[str, ...]  # names of the training splits, as in `BatchPlan.splits`
    splits: tuple[str, ...]  # names of the training splits and of the splits to evaluate
    num_frames: Mapping[str, int]  # modality -> number of frames, including the copies of `best`
    # (split, phase, modality) -> T, where the phase is 'train' or 'eval'. If a clip has more than T
    # frames, this phase uses a copy of its T frames of the highest quality.
    best: Mapping[tuple[str, str, str], int]
    nbytes: int  # number of bytes of all frames
    modalities: Mapping[str, Modality]


def make_resident_plan(data: Dataset, plan: BatchPlan, eval_splits: Sequence[str]) -> ResidentPlan:
    """Plans which clips are copied to the devices, and computes the memory that they need.

    `plan` describes the training batches. `eval_splits` are the splits to evaluate.
    """
    splits = {name: data.split(name) for name in dict.fromkeys([*plan.splits, *eval_splits])}
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
    modalities = {name: data.modalities[name] for name in plan.modalities}
    return ResidentPlan(plan.splits, tuple(splits), num_frames, best, nbytes, modalities)


def shape_frames(modality: Modality, *axes: int) -> list[Any]:
    """Returns a `jax.ShapeDtypeStruct` for each field in BATCHED, for frames on a device.

    The shape of features is [*axes, D]. The shape of other fields, such as `quality`, is [*axes].
    """
    shapes = {"features": (*axes, modality.dim)}
    dtypes = {field: get_dtype(field, modality.dtype) for field in BATCHED}
    return [
        jax.ShapeDtypeStruct(shapes.get(field, axes), jax.dtypes.canonicalize_dtype(dtype))
        for field, dtype in dtypes.items()
    ]


def find_least_free_bytes(mesh: Mesh) -> float:
    """Returns the free memory, in bytes, of the local device with the least free memory."""
    free = []
    for device in mesh.local_devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    # Devices that are emulated on a CPU share the memory of the host equally.
    return min(free) if free else machine.free_bytes() / mesh.size


class Resident:
    """Clips of a dataset that are copied to the devices.

    Attributes:
      identities: the names of the classes. Label c of a clip means `identities[c - 1]`.
      train: modality -> the joined frames of the training clips. The last frame is zeros, for
        padding.
    """

    def __init__(self, data: Dataset, layout: ResidentPlan, mesh: Mesh):
        self._data, self._mesh = data, mesh
        self.identities = data.identities
        gather = functools.partial(gather_batch, lazy=False)
        self._gather = devices.jit(
            gather, mesh, static_argnames="sizes", out_shardings=devices.row_layout(mesh)
        )
        fillers = {
            name: _Filler(layout.num_frames[name], modality, mesh)
            for name, modality in layout.modalities.items()
        }
        # Each table is [2, N]: the first frame and the number of frames of each clip.
        tables = {
            (split, phase, name): np.zeros((2, len(data.split(split).clips)), np.int32)
            for split, phase, name in itertools.product(layout.splits, PHASES, fillers)
        }
        for split in layout.splits:
            for clip_index, chunk in data.packed(split, list(fillers)):
                for name, packed in chunk.items():
                    fields = [np.asarray(getattr(packed, field)) for field in BATCHED]
                    begin = fillers[name].append(fields)
                    for phase in PHASES:
                        key = (split, phase, name)
                        limit = layout.best.get(key, len(packed.quality))
                        tables[key][:, clip_index] = packed.start + begin, packed.length
                        for row in np.flatnonzero(packed.length > limit).tolist():
                            clip = slice(packed.start[row], packed.start[row] + packed.length[row])
                            best = choose_best_frames(np.asarray(packed.quality[clip]), limit)
                            best = fillers[name].append([values[clip][best] for values in fields])
                            tables[key][:, clip_index[row]] = best, limit
        frames = {name: filler.finish() for name, filler in fillers.items()}

        def locate(splits: Sequence[str], phase: str) -> dict[str, Packed]:
            """Returns modality -> the frames of the clips of `splits`, as arrays on the devices.

            `phase` is `train` or `eval`. The frames that are kept of a long clip depend on it.
            """
            located = {}
            for name, fields in frames.items():
                table = np.concatenate([tables[split, phase, name] for split in splits], axis=1)
                located[name] = Packed(*fields, *devices.replicate(mesh, tuple(table)))
            return located

        self.train = locate(layout.train_splits, "train")
        self._eval = {split: locate([split], "eval") for split in layout.splits}

    def split(self, name: str) -> Split:
        """Returns the clips and labels of a split."""
        return self._data.split(name)

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of `plan` once. See `ClipSource`.

        Within a group of clips of similar length, the clips are sorted by name. If the split or a
        modality is not on the devices, the clips are read from disk.
        """
        if plan.split not in self._eval or not set(plan.modalities) <= set(self._eval[plan.split]):
            yield from self._data.eval_batches(plan, rows=rows)
            return
        for bucket, places in split_blocks(plan.bucket, rows):
            _, *index = make_batch({}, places.astype(np.int32), rows)
            index = devices.put(index, devices.row_layout(self._mesh))
            sizes = tuple((name, plan.padded_lengths[name][bucket]) for name in plan.modalities)
            yield self._gather(self._eval[plan.split], *index, {}, sizes=sizes)


class _Filler:
    """Fills arrays on the devices with frames, in chunks, so that the host needs little memory."""

    def __init__(self, num_frames: int, modality: Modality, mesh: Mesh):
        """Allocates arrays for `num_frames` frames of a modality, and a last frame of zeros."""
        self._mesh = mesh
        shapes = shape_frames(modality, num_frames + 1)
        rows = max(1, CHUNK_BYTES // (modality.dim * shapes[0].dtype.itemsize))
        self._waiting = self._done = 0  # frames in the chunk, and frames on the devices
        self._arrays: list[Array] = []
        if num_frames < rows:  # the chunk becomes the arrays, so no program is compiled
            self._chunk = [np.zeros(x.shape, x.dtype) for x in shapes]
            return
        self._chunk = [np.empty((rows, *x.shape[1:]), x.dtype) for x in shapes]
        layout = devices.replicated_layout(mesh)
        make = jax.jit(lambda: [jnp.zeros(x.shape, x.dtype) for x in shapes], out_shardings=layout)
        self._arrays = make()

    def append(self, fields: Sequence[np.ndarray]) -> int:
        """Appends n frames, and returns the index of the first of these frames.

        `fields` has an array [n, ...] for each field, in the order of BATCHED.
        """
        begin = self._done + self._waiting
        taken, count = 0, len(fields[0])
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
        """Copies the frames that wait in the chunk to the devices."""
        part = [chunk[: self._waiting] for chunk in self._chunk]
        part = devices.replicate(self._mesh, part)
        self._arrays = _put(self._arrays, part, np.int32(self._done))
        jax.block_until_ready(self._arrays)  # the next frames overwrite the chunk
        self._done += self._waiting
        self._waiting = 0

    def finish(self) -> Sequence[Array]:
        """Copies the last chunk, and returns the arrays of all frames."""
        if not self._arrays:
            return devices.replicate(self._mesh, self._chunk)
        if self._waiting:
            self._flush()
        return self._arrays


@functools.partial(jax.jit, donate_argnums=0)
def _put(arrays: Sequence[Array], part: Sequence[Array], at: Array) -> list[Array]:
    return [
        jax.lax.dynamic_update_slice_in_dim(whole, piece, at, axis=0)
        for whole, piece in zip(arrays, part, strict=True)
    ]
