"""Endless batches of records in the order of training, read ahead while earlier ones are in use.

The order comes from `vidjax.data.order`. Python threads make the batches, and a tf.data pipeline
yields them from a queue. The threads of TensorFlow run no Python code, because a process that ends
during such a call hangs or aborts. Features keep their stored dtype.
"""

import collections
import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vidjax.batch import Array, Batch
from vidjax.data import order
from vidjax.data.clips import BatchPlan
from vidjax.data.records.manifest import Records
from vidjax.data.records.reader import Reader, read_batch
from vidjax.data.records.tensors import tf

AHEAD = 4  # batches that are read at once, before they are asked for


def train_batches(records: Records, plan: BatchPlan, step: int) -> Iterator[Batch]:
    """Yields batches without end, see `TrainingData.train_batches`."""
    reader = Reader(records, plan.splits)
    rows, sizes = plan.batch_size, plan.padded_lengths

    def make(places: np.ndarray, first: np.ndarray) -> Batch:
        windows = dict(zip(plan.windowed, first, strict=True))
        return read_batch(reader, records, places, sizes, rows, windows, verify=False)

    none = np.zeros(0, np.int64)
    like, structure = jax.tree.flatten(read_batch(reader, records, none, sizes, rows, verify=False))
    queue = tf.queue.FIFOQueue(1, [x.dtype for x in like], [x.shape for x in like])
    values = (
        tf.data.Dataset.counter()
        .map(lambda _: queue.dequeue(), num_parallel_calls=1)
        .prefetch(1)
        .as_numpy_iterator()
    )
    waiting: collections.deque[Future[Batch]] = collections.deque()
    is_finalizing = sys.is_finalizing  # the name of a module may be gone at the end
    try:
        with ThreadPoolExecutor(AHEAD) as threads:
            for places, first in _places(records, plan, reader, step):
                waiting.append(threads.submit(make, places, first))
                if len(waiting) == AHEAD:
                    queue.enqueue(jax.tree.leaves(waiting.popleft().result()))
                    yield jax.tree.unflatten(structure, next(values))
    finally:
        # TensorFlow crashes if a queue is freed while a thread waits for it. At the end of the
        # process its modules are gone, and nothing is freed any more.
        if not is_finalizing():
            queue.close()


def _places(
    records: Records, plan: BatchPlan, reader: Reader, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the places [B] int64 of the clips of every step, from `step` on, and their windows.

    These are the first frame of each of the M windowed modalities, [M, B] int32.
    """
    place_of = np.argsort(reader.clip_index)
    with jax.default_device(_host()):
        lengths = {
            name: jax.numpy.concatenate([records.splits[s].lengths[name] for s in plan.splits])
            for name in plan.windowed
        }

    @jax.jit
    def draw(step: Array, epoch: Array, place: Array) -> tuple[Array, list[Array]]:
        clip_index, drawn = order.draw(plan, step, epoch, place)
        sizes = plan.padded_lengths
        return clip_index, [
            order.first_frame(drawn[name], lengths[name][clip_index], sizes[name])
            for name in plan.windowed
        ]

    for number in itertools.count(step):
        position = number * plan.batch_size + np.arange(plan.batch_size)
        epoch, place = (part.astype(np.int32) for part in np.divmod(position, plan.num_clips))
        with jax.default_device(_host()):
            clip_index, first = jax.device_get(draw(np.int32(number), epoch, place))
        yield place_of[clip_index], np.array(first, np.int32).reshape(-1, len(place))


def _host() -> Any:
    """Returns the processor of this machine, or an accelerator if jax may use nothing else."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
