"""Makes training batches from flat files, while the devices work on earlier batches.

A thread reads the files in Python, and chooses the frames of long clips. TensorFlow would take four
times as long for this. More threads would wait for each other, because only one thread of a process
runs Python code at a time. Operations of TensorFlow decode and pad the chosen frames, a whole batch
at a time. The operations call no Python code: if the program ended during a call, it would hang.

All other code imports TensorFlow from this module, because this module sets TensorFlow up.
"""

import collections
import itertools
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vidjax.core.batch import BATCHED, Batch, Frames
from vidjax.data.clips import BatchPlan, DrawnClips, Modality, choose_frames
from vidjax.data.packed_clips import Reader, get_dtype
from vidjax.utils.errors import UserError

# Read by the import of TensorFlow. They hide its log and a message of oneDNN: errors are raised.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Keras is not used here. Its import would take seconds, and write a file to the home folder.
_modules: Any = sys.modules
_hides_keras = _modules.setdefault("keras", None) is None
try:
    import tensorflow
finally:
    if _hides_keras:
        del _modules["keras"]

# TensorFlow has no types, and its type stubs are incomplete.
tf: Any = tensorflow

# Only JAX uses the accelerator, because TensorFlow would take all of its memory.
tf.config.set_visible_devices([], "GPU")

NUM_AHEAD = 2  # number of batches that are read in advance, and that wait for TensorFlow
# `decode_raw` cannot pad float16, so the bits are decoded as an integer of the same size.
CARRIER_TYPES = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


def train_batches(
    reader: Reader, modalities: Mapping[str, Modality], plan: BatchPlan, drawn: Iterator[DrawnClips]
) -> Iterator[Batch]:
    """Yields the training batches of `plan` without end.

    `reader` reads the clips from files. `modalities` is modality -> width and dtype of its
    features. `drawn` has the clips of each training step.
    """
    rows, keys = plan.batch_size, [(name, field) for name in plan.modalities for field in BATCHED]
    kinds = [tf.int32, tf.bool, *(tf.string for _ in keys)]
    queue = tf.queue.FIFOQueue(NUM_AHEAD, kinds, [[rows]] * len(kinds))
    batches = _make_pipeline(modalities, plan, queue).as_numpy_iterator()
    read = _read_ahead(_read_batches(reader, plan, drawn))
    # TensorFlow crashes if a queue is freed while a thread waits for it. So the queue is closed
    # when the reader is freed, or at the end of the process.
    weakref.finalize(reader, _close, queue)
    for added in itertools.chain([NUM_AHEAD], itertools.repeat(1)):
        try:
            for values in itertools.islice(read, added):
                queue.enqueue(values)
            batch = next(batches)
        except tf.errors.OpError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"TensorFlow cannot make a batch: {reason}") from error
        yield batch  # outside `try`, because TensorFlow may be unloaded when the process ends


def _close(queue: Any) -> None:
    with tf.init_scope():  # works even while TensorFlow traces a function
        queue.close()


def _read_batches(
    reader: Reader, plan: BatchPlan, drawn: Iterator[DrawnClips]
) -> Iterator[tuple[Any, ...]]:
    """Yields a tuple for each training step in `drawn`.

    The tuple begins with `clip_index` [B] and `batch_mask` [B]. A list of B byte strings follows
    for each pair of a modality and a field, such as `quality`. Each byte string has the values of
    the field in the chosen frames of one clip.
    """
    for clip_index, batch_mask, first in drawn:
        read = reader.read(clip_index[batch_mask], plan.modalities)
        empty = [b""] * int(np.sum(~batch_mask))
        strings = []
        for name, size in plan.padded_lengths.items():
            chosen = [*choose_frames(read[name]["quality"], size, first.get(name))]
            for arrays in read[name].values():
                pairs = zip(arrays, chosen, strict=True)
                strings.append([values[frames].tobytes() for values, frames in pairs] + empty)
        yield (clip_index, batch_mask, *strings)


def _read_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Yields all items of the endless iterator `batches`. A thread computes items in advance."""
    with ThreadPoolExecutor(1) as thread:
        waiting = collections.deque(thread.submit(next, batches) for _ in range(NUM_AHEAD))
        while True:
            batch = waiting.popleft().result()
            waiting.append(thread.submit(next, batches))
            yield batch


def _make_pipeline(modalities: Mapping[str, Modality], plan: BatchPlan, queue: Any) -> Any:
    """Returns a `tf.data.Dataset` that makes a batch of each element of `queue`.

    An element is a tuple that `_read_batches` has made.
    """

    # The functions have no control flow for TensorFlow, and AutoGraph warns in Python 3.13.
    @tf.autograph.experimental.do_not_convert
    def make(clip_index: Any, batch_mask: Any, *strings: Any) -> Batch:
        given, frames = iter(strings), {}
        for name, size in plan.padded_lengths.items():
            dim, dtype = modalities[name]
            raw = {field: next(given) for field in BATCHED}
            length = tf.strings.length(raw["number"]) // get_dtype("number", dtype).itemsize
            decoded = {
                field: _decode(content, get_dtype(field, dtype), size * (dim if i == 0 else 1))
                for i, (field, content) in enumerate(raw.items())
            }
            decoded["features"] = tf.reshape(decoded["features"], [-1, size, dim])
            frames[name] = Frames(**decoded, mask=tf.sequence_mask(length, size))
        return Batch(frames, clip_index, batch_mask)

    dequeue = tf.autograph.experimental.do_not_convert(lambda _: queue.dequeue())
    batches = tf.data.Dataset.counter().map(dequeue)
    batches = batches.map(make, num_parallel_calls=2, deterministic=True).prefetch(1)
    options = tf.data.Options()
    # Nothing is left to tune, and a thread that tunes can delay the end by up to a minute.
    options.autotune.enabled = False
    return batches.with_options(options)


def _decode(strings: Any, dtype: np.dtype, count: int) -> Any:
    """Decodes B strings of bytes to an array [B, count] of `dtype`, padded with zeros."""
    size = count * dtype.itemsize
    raw = tf.io.decode_raw(strings, CARRIER_TYPES[dtype.itemsize], fixed_length=size)
    return tf.bitcast(raw, tf.as_dtype(dtype))
