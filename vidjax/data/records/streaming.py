"""Endless batches of records in the order of training, read ahead while earlier ones are in use.

The order comes from `vidjax.data.order`. A tf.data pipeline of TensorFlow operations reads the
records at their places and makes the batches. Its threads run no Python code, because a process
that ends during such a call hangs or aborts. Records are batched before they are parsed: one by one
takes three times as long.

TensorFlow is imported and set up here, for TFDS and for SavedModel, too.
"""

import itertools
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vidjax.core.batch import BATCHED, Array, Batch, Frames
from vidjax.data import order
from vidjax.data.clips import BatchPlan, Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.manifest import Records
from vidjax.data.records.record_reader import Reader
from vidjax.data.records.shard_files import check_shard, frame_bytes
from vidjax.utils.errors import UserError

# TensorFlow reads both variables when it is imported. oneDNN would announce itself on stderr.
# Errors arrive as exceptions, not in the log.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Its Keras, which nothing here uses, would write a file into the home folder.
_keras_home = os.environ.get("KERAS_HOME")
os.environ["KERAS_HOME"] = os.devnull
try:
    import tensorflow
finally:
    del os.environ["KERAS_HOME"]
    if _keras_home is not None:
        os.environ["KERAS_HOME"] = _keras_home

# TensorFlow ships no types, and the stubs of type checkers cover half of it.
tf: Any = tensorflow

# The accelerator belongs to JAX: TensorFlow would take all of its memory.
tf.config.set_visible_devices([], "GPU")

AHEAD = 4  # batches that are known to tf.data before they are asked for
READERS = 16  # records of a batch that are read at once: most wait for a file, not for a core
# `decode_raw` pads no float16: the bits pass through an integer of that width.
CARRIERS = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


def train_batches(records: Records, plan: BatchPlan, step: int) -> Iterator[Batch]:
    """Yields batches without end, see `TrainingData.train_batches`."""
    reader = Reader(records, plan.splits)
    rows = plan.batch_size
    shapes = [[rows], [rows], [rows], [rows], [len(plan.windowed), rows]]
    kinds = [tf.int32, tf.int64, tf.int32, tf.bool, tf.int32]
    queue = tf.queue.FIFOQueue(AHEAD, kinds, shapes)
    batches = _pipeline(records, plan, reader, queue).as_numpy_iterator()
    places = _places(records, plan, reader, step)
    # TensorFlow crashes if a queue is freed while a thread waits for it. So it is closed before:
    # with the reader of this stream, or at the end of the process.
    weakref.finalize(reader, queue.close)
    for added in itertools.chain([AHEAD], itertools.repeat(1)):
        try:
            for values in itertools.islice(places, added):
                queue.enqueue(values)
            batch = next(batches)
        except tf.errors.OpError as error:
            for shard in reader.shards:
                check_shard(shard)
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{records.folder}: cannot read the records: {reason}") from error
        yield batch  # outside of `try`: when the process ends, TensorFlow may be gone


def _places(
    records: Records, plan: BatchPlan, reader: Reader, step: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields what tf.data must know of the clips of every step, from `step` on.

    These are: number of the shard [B] int32, first byte of the record in it [B] int64, clip_index
    [B] int32, batch_mask [B] bool, and for each of the M windowed modalities the first frame of the
    window [M, B] int32.
    """
    place_of = np.argsort(reader.clip_index)
    with jax.default_device(_host()):
        lengths = {
            name: jax.numpy.concatenate([records.splits[s].lengths[name] for s in plan.splits])
            for name in plan.windowed
        }

    @jax.jit
    def draw(step: Array, epoch: Array, place: Array) -> tuple[Array, Array, list[Array]]:
        clip_index, batch_mask, drawn = order.draw(plan, step, epoch, place)
        sizes = plan.padded_lengths
        return (
            clip_index,
            batch_mask,
            [
                order.first_frame(drawn[name], lengths[name][clip_index] * batch_mask, sizes[name])
                for name in plan.windowed
            ],
        )

    for number in itertools.count(step):
        position = number * plan.batch_size + np.arange(plan.batch_size)
        epoch, place = (part.astype(np.int32) for part in np.divmod(position, plan.num_places))
        with jax.default_device(_host()):
            drawn = draw(np.int32(number), epoch, place)
            clip_index, batch_mask, first = jax.device_get(drawn)
        found = place_of[clip_index]
        first = np.array(first, np.int32).reshape(-1, len(place))
        yield reader.shard[found], reader.start[found], clip_index, batch_mask, first


def _host() -> Any:
    """Returns the processor of this machine, or an accelerator if jax may use nothing else."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _pipeline(records: Records, plan: BatchPlan, reader: Reader, queue: Any) -> Any:
    """Returns a tf.data dataset of the batches of the clips in `queue`."""
    paths = tf.constant([str(shard.path) for shard in reader.shards])
    keys = [f"frames/{name}/{field}" for name in plan.modalities for field in BATCHED]
    strings = {key: tf.io.FixedLenFeature([], tf.string) for key in keys}

    def read(shard: Any, start: Any) -> Any:
        found = tf.raw_ops.TFRecordDatasetV2(
            filenames=paths[shard][None],
            compression_type="",
            buffer_size=0,
            byte_offsets=start[None],
        )
        record = tf.data.experimental.from_variant(found, tf.TensorSpec([], tf.string))
        return record.take(1).get_single_element()

    def make(shard: Any, start: Any, clip_index: Any, batch_mask: Any, first: Any) -> Batch:
        places = tf.data.Dataset.from_tensor_slices((shard, start))
        found = places.map(read, num_parallel_calls=READERS, deterministic=True)
        serialized = found.batch(plan.batch_size, drop_remainder=True).get_single_element()
        examples = tf.io.parse_example(serialized, strings)
        firsts = dict(zip(plan.windowed, tf.unstack(first), strict=True))
        frames = {}
        for name, size in plan.padded_lengths.items():
            fields = {field: examples[f"frames/{name}/{field}"] for field in BATCHED}
            if plan.examples is not None:
                fields = {key: tf.where(batch_mask, value, "") for key, value in fields.items()}
            best = name in plan.longer and name not in firsts
            modality = records.modalities[name]
            frames[name] = _decode(fields, modality, size, firsts.get(name), best=best)
        return Batch(frames, clip_index, batch_mask)

    batches = tf.data.Dataset.counter().map(lambda _: queue.dequeue())
    return batches.map(make, num_parallel_calls=2, deterministic=True).prefetch(1)


def _decode(
    fields: Mapping[str, Any], modality: Modality, size: int, first: Any, *, best: bool
) -> Frames:
    """Returns Frames [B, size] of B clips; padding is 0.

    Args:
      fields: field -> [B] strings, the bytes of all frames of each clip.
      first: [B] int32, the first frame to take; None takes all frames.
      best: True if a clip of more frames gives its best by quality, as `clips.best_frames`.
    """
    nbytes, dtypes = frame_bytes(modality), {"features": tf.as_dtype(modality.dtype)}
    dtypes |= {name: tf.as_dtype(field.dtype) for name, field in FRAME_FIELDS.items()}
    widths = {field: modality.dim if field == "features" else 1 for field in fields}
    length = tf.strings.length(fields["number"]) // nbytes["number"]

    def read(field: str, strings: Any, length: int | None = None) -> Any:
        raw = tf.io.decode_raw(strings, CARRIERS[dtypes[field].size], fixed_length=length)
        return tf.bitcast(raw, dtypes[field])

    def choose(strings: dict[str, Any]) -> dict[str, Any]:
        quality = read("quality", strings["quality"])
        quality = tf.where(tf.math.is_nan(quality), -np.inf, quality)
        chosen = tf.sort(tf.math.top_k(quality, size).indices)
        found = {}
        for field, content in strings.items():
            frames = tf.reshape(read(field, content), [-1, widths[field]])
            found[field] = tf.reshape(tf.gather(frames, chosen), [-1])
        return found

    decoded = {}
    for field, strings in fields.items():
        if first is not None:
            count = tf.fill(tf.shape(first), size * nbytes[field])
            strings = tf.strings.substr(strings, first * nbytes[field], count)
        decoded[field] = read(field, strings, size * nbytes[field])
    if best:  # one clip at a time: to pad all to the longest would take that many times the memory
        kinds = {field: tf.TensorSpec([size * widths[field]], dtypes[field]) for field in fields}
        rows = tf.where(length > size)[:, 0]
        longer = {field: tf.gather(strings, rows) for field, strings in fields.items()}
        found = tf.map_fn(choose, longer, fn_output_signature=kinds, parallel_iterations=1)
        for field, values in found.items():
            decoded[field] = tf.tensor_scatter_nd_update(decoded[field], rows[:, None], values)
    decoded["features"] = tf.reshape(decoded["features"], [-1, size, modality.dim])
    return Frames(**decoded, mask=tf.sequence_mask(length, size))
