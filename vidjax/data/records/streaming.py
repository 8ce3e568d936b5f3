"""Endless batches of records in the order of training: a tf.data pipeline.

The order comes from `vidjax.data.order`. tf.data calls the reader of records for several batches at
once, and keeps batches ready while earlier ones are in use. Features keep their stored dtype.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vidjax.batch import Array, Batch
from vidjax.data import order
from vidjax.data.clips import BatchPlan
from vidjax.data.records.manifest import Records
from vidjax.data.records.reader import Reader, read_batch
from vidjax.data.records.tensors import tf
from vidjax.errors import UserError

READERS = 2  # batches that are read at once


def train_batches(records: Records, plan: BatchPlan, step: int) -> Iterator[Batch]:
    """Yields batches without end, see `TrainingData.train_batches`."""
    reader = Reader(records, plan.splits)
    rows, sizes = plan.batch_size, plan.padded_lengths
    failures: list[UserError] = []

    def read(places: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
        windows = dict(zip(plan.windowed, first, strict=True))
        try:
            batch = read_batch(reader, records, places, sizes, rows, windows, verify=False)
        except UserError as error:  # tf.data would put it into the words of TensorFlow
            failures.append(error)
            raise
        return jax.tree.leaves(batch)

    none = np.zeros(0, np.int64)
    like, structure = jax.tree.flatten(read_batch(reader, records, none, sizes, rows, verify=False))
    signature = (
        tf.TensorSpec([rows], tf.int64),
        tf.TensorSpec([len(plan.windowed), rows], tf.int32),
    )
    places = tf.data.Dataset.from_generator(
        lambda: _places(records, plan, reader, step), output_signature=signature
    )
    batches = places.map(
        lambda *at: tf.numpy_function(read, at, [x.dtype for x in like]),
        num_parallel_calls=READERS,
        deterministic=True,
    ).prefetch(1)
    values = batches.as_numpy_iterator()
    while True:
        try:
            found = next(values)
        except tf.errors.OpError as error:
            reason = f"{records.folder}: cannot read the records: {error.message[:200]}"
            raise (failures[0] if failures else UserError(reason)) from error
        yield jax.tree.unflatten(structure, found)


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
