"""Makes training batches from TFRecord files, while the devices work on earlier batches.

A thread reads the records in Python. TensorFlow would take four times as long, and more threads
would wait for each other, because only one thread of a process runs Python code at a time. Then
operations of TensorFlow parse a whole batch, in a third of the time for single records. TensorFlow
calls no Python code, because a process that ends during such a call hangs or aborts.

All code that uses TensorFlow imports it from this module, which sets it up.
"""

import collections
import itertools
import os
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vidjax.core.batch import BATCHED, Array, Batch, Frames
from vidjax.data import order
from vidjax.data.clips import BatchPlan, Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.manifest import Records
from vidjax.data.records.record_reader import Reader
from vidjax.data.records.shard_files import check_shard, count_frame_bytes
from vidjax.utils.errors import UserError

# Read by the import of TensorFlow. They hide its log and a message of oneDNN: errors are raised.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Keras is not used here, but its import would write a file to the home folder.
_keras_home = os.environ.get("KERAS_HOME")
os.environ["KERAS_HOME"] = os.devnull
try:
    import tensorflow
finally:
    del os.environ["KERAS_HOME"]
    if _keras_home is not None:
        os.environ["KERAS_HOME"] = _keras_home

# TensorFlow has no types, and its type stubs are incomplete.
tf: Any = tensorflow

# Only JAX uses the accelerator, because TensorFlow would take all of its memory.
tf.config.set_visible_devices([], "GPU")

NUM_AHEAD = 2  # number of batches that are read in advance, and that wait for TensorFlow
# `decode_raw` cannot pad float16, so the bits are decoded as an integer of the same size.
CARRIER_TYPES = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


def train_batches(records: Records, plan: BatchPlan, step: int) -> Iterator[Batch]:
    """Yields the training batches of `plan` without end, beginning with the batch of `step`."""
    reader = Reader(records, plan.splits)
    rows = plan.batch_size
    shapes = [[rows], [rows], [rows], [len(plan.windowed), rows]]
    kinds = [tf.string, tf.int32, tf.bool, tf.int32]
    queue = tf.queue.FIFOQueue(NUM_AHEAD, kinds, shapes)
    batches = _make_pipeline(records, plan, queue).as_numpy_iterator()
    read = _read_records(records, plan, reader, step)
    # TensorFlow crashes if a queue is freed while a thread waits for it. So the queue is closed
    # when the reader is freed, or at the end of the process.
    weakref.finalize(reader, _close, queue)
    for added in itertools.chain([NUM_AHEAD], itertools.repeat(1)):
        try:
            for values in itertools.islice(read, added):
                queue.enqueue(values)
            batch = next(batches)
        except tf.errors.OpError as error:
            for shard in reader.shards:
                check_shard(shard)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{records.folder}: TensorFlow cannot read the converted data: {reason}\n"
                "delete this folder to convert again"
            ) from error
        yield batch  # outside `try`, because TensorFlow may be unloaded when the process ends


def _close(queue: Any) -> None:
    with tf.init_scope():  # works even while TensorFlow traces a function
        queue.close()


def _read_records(
    records: Records, plan: BatchPlan, reader: Reader, step: int
) -> Iterator[tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]]:
    """Yields for each step its B records, and the last three arrays of `_locate_clips`."""
    located = _locate_clips(records, plan, reader, step)

    def read_next() -> tuple[list[bytes], Any]:
        places, *others = next(located)  # on a CPU, this may wait for the end of a training step
        return reader.read(places, whole=False), others

    with ThreadPoolExecutor(1) as thread:
        waiting = collections.deque(thread.submit(read_next) for _ in range(NUM_AHEAD))
        while True:
            messages, others = waiting.popleft().result()
            waiting.append(thread.submit(read_next))
            yield (messages, *others)


def _locate_clips(
    records: Records, plan: BatchPlan, reader: Reader, step: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Draws the clips of each training step, beginning with `step`.

    Yields four arrays for each step: the number of each record in `reader`, [B] int64; clip_index
    [B] int32; batch_mask [B] bool; and the first frame of the window of each clip, [M, B] int32,
    in the M modalities of `plan.windowed`.
    """
    place_of_clip = np.argsort(reader.clip_index)
    with jax.default_device(_get_host_device()):
        lengths = {
            name: jax.numpy.concatenate([records.splits[s].lengths[name] for s in plan.splits])
            for name in plan.windowed
        }

    @jax.jit
    def draw(step: Array, epoch: Array, place: Array) -> tuple[Array, Array, list[Array]]:
        clip_index, batch_mask, drawn = order.draw_batch_clips(plan, step, epoch, place)
        first = []
        for name in plan.windowed:
            length, size = lengths[name][clip_index] * batch_mask, plan.padded_lengths[name]
            first.append(order.choose_first_frame(drawn[name], length, size))
        return clip_index, batch_mask, first

    for number in itertools.count(step):
        position = number * plan.batch_size + np.arange(plan.batch_size)
        epoch, place = (part.astype(np.int32) for part in np.divmod(position, plan.num_places))
        with jax.default_device(_get_host_device()):
            drawn = draw(np.int32(number), epoch, place)
            clip_index, batch_mask, first = jax.device_get(drawn)
        first = np.array(first, np.int32).reshape(-1, len(place))
        yield place_of_clip[clip_index], clip_index, batch_mask, first


def _get_host_device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _make_pipeline(records: Records, plan: BatchPlan, queue: Any) -> Any:
    """Returns a `tf.data.Dataset` that makes a batch of each element of `queue`."""
    keys = [f"frames/{name}/{field}" for name in plan.modalities for field in BATCHED]
    strings = {key: tf.io.FixedLenFeature([], tf.string) for key in keys}

    # The functions have no control flow for TensorFlow, and AutoGraph warns in Python 3.13.
    @tf.autograph.experimental.do_not_convert
    def make(messages: Any, clip_index: Any, batch_mask: Any, first: Any) -> Batch:
        examples = tf.io.parse_example(messages, strings)
        firsts = dict(zip(plan.windowed, tf.unstack(first), strict=True))
        frames = {}
        for name, size in plan.padded_lengths.items():
            fields = {field: examples[f"frames/{name}/{field}"] for field in BATCHED}
            if plan.epoch_clips is not None:
                fields = {key: tf.where(batch_mask, value, "") for key, value in fields.items()}
            best = name in plan.longer and name not in firsts
            modality = records.modalities[name]
            frames[name] = _decode(fields, modality, size, firsts.get(name), best=best)
        return Batch(frames, clip_index, batch_mask)

    dequeue = tf.autograph.experimental.do_not_convert(lambda _: queue.dequeue())
    batches = tf.data.Dataset.counter().map(dequeue)
    return batches.map(make, num_parallel_calls=2, deterministic=True).prefetch(1)


def _decode(
    fields: Mapping[str, Any], modality: Modality, size: int, first: Any, *, best: bool
) -> Frames:
    """Decodes the frames of B clips to arrays with `size` frames per clip, padded with zeros.

    `fields` is field -> [B] strings, the bytes of all frames of each clip. `first` [B] int32 is the
    first frame to take from each clip. None takes the first `size` frames. If `best` is True, clips
    of more than `size` frames are cut to the frames of the highest quality, in time order.
    """
    nbytes, dtypes = count_frame_bytes(modality), {"features": tf.as_dtype(modality.dtype)}
    dtypes |= {name: tf.as_dtype(field.dtype) for name, field in FRAME_FIELDS.items()}
    widths = {field: modality.dim if field == "features" else 1 for field in fields}
    length = tf.strings.length(fields["number"]) // nbytes["number"]

    def read(field: str, strings: Any, length: int | None = None) -> Any:
        raw = tf.io.decode_raw(strings, CARRIER_TYPES[dtypes[field].size], fixed_length=length)
        return tf.bitcast(raw, dtypes[field])

    def choose(strings: dict[str, Any]) -> dict[str, Any]:
        quality = read("quality", strings["quality"])
        quality = tf.where(tf.math.is_nan(quality), -np.inf, quality)
        chosen = tf.sort(tf.math.top_k(quality, size).indices)
        values = {}
        for field, content in strings.items():
            frames = tf.reshape(read(field, content), [-1, widths[field]])
            values[field] = tf.reshape(tf.gather(frames, chosen), [-1])
        return values

    decoded = {}
    for field, strings in fields.items():
        if first is not None:
            count = tf.fill(tf.shape(first), size * nbytes[field])
            strings = tf.strings.substr(strings, first * nbytes[field], count)
        decoded[field] = read(field, strings, size * nbytes[field])
    if best:  # clip by clip, because padding all clips to the longest takes too much memory
        kinds = {field: tf.TensorSpec([size * widths[field]], dtypes[field]) for field in fields}
        rows = tf.where(length > size)[:, 0]
        longer = {field: tf.gather(strings, rows) for field, strings in fields.items()}
        chosen = tf.map_fn(choose, longer, fn_output_signature=kinds, parallel_iterations=1)
        for field, values in chosen.items():
            decoded[field] = tf.tensor_scatter_nd_update(decoded[field], rows[:, None], values)
    decoded["features"] = tf.reshape(decoded["features"], [-1, size, modality.dim])
    return Frames(**decoded, mask=tf.sequence_mask(length, size))
