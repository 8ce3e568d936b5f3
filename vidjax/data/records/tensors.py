"""Parses and pads batches of records in TensorFlow; the one place that sets it up."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vidjax.batch import BATCHED
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.shard_files import frame_bytes

# TensorFlow reads both variables when it is imported. It only moves records here, without need of
# oneDNN, which would announce itself on stderr. Errors arrive as exceptions, not in the log.
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

# `decode_raw` has no float16 kernel of fixed length: bits pass through an integer of that width.
CARRIERS = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


def parse_batch(
    serialized: Any, modalities: Sequence[str]
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Returns clip_index [B] int32 and modality -> field -> [B] strings of bytes of B records.

    An empty string in `serialized` [B] reads as clip 0 without frames.
    """
    features: dict[str, Any] = {"clip_index": tf.io.FixedLenFeature([], tf.int64, 0)}
    for name in modalities:
        for field in BATCHED:
            features[f"frames/{name}/{field}"] = tf.io.FixedLenFeature([], tf.string, "")
    examples = tf.io.parse_example(serialized, features)
    fields = {
        name: {field: examples[f"frames/{name}/{field}"] for field in BATCHED}
        for name in modalities
    }
    return tf.cast(examples["clip_index"], tf.int32), fields


def _carriers(modality: Modality) -> dict[str, Any]:
    """Returns field -> the TensorFlow dtype that carries its bits."""
    carriers = {name: tf.as_dtype(field.dtype) for name, field in FRAME_FIELDS.items()}
    return {"features": CARRIERS[np.dtype(modality.dtype).itemsize], **carriers}


def _num_frames(fields: Mapping[str, Any]) -> Any:
    """Returns [B] int32, the number of frames of each clip."""
    return tf.strings.length(fields["number"]) // np.dtype(FRAME_FIELDS["number"].dtype).itemsize


def windows(fields: Mapping[str, Any], modality: Modality, size: int, first: Any) -> dict[str, Any]:
    """Returns field -> [B] strings of at most `size` frames, from frame `first` [B] int32 on."""
    count = tf.fill(tf.shape(first), size)
    return {
        field: tf.strings.substr(fields[field], first * nbytes, count * nbytes)
        for field, nbytes in frame_bytes(modality).items()
        if field in fields
    }


def decode_batch(
    fields: Mapping[str, Any], modality: Modality, size: Any, *, best: bool
) -> dict[str, Any]:
    """Returns the frames of B clips in one modality, padded to T = `size`, an int or scalar tensor.

    Features are [B, T * D] integers of the same width; quality, detection and number [B, T]; mask
    [B, T] bool. If a clip may have more than T frames, `best` must be True: it gives its best T by
    quality.
    """
    carriers, nbytes = _carriers(modality), frame_bytes(modality)
    decoded = {
        field: tf.io.decode_raw(strings, carriers[field], fixed_length=size * nbytes[field])
        for field, strings in fields.items()
    }
    lengths = _num_frames(fields)
    if best:
        rows = tf.where(lengths > size)[:, 0]
        decoded = tf.cond(
            tf.size(rows) > 0,
            lambda: _put_best(decoded, fields, modality, size, rows),
            lambda: decoded,
        )
    return {**decoded, "mask": tf.sequence_mask(lengths, size)}


def _put_best(
    decoded: Mapping[str, Any], fields: Mapping[str, Any], modality: Modality, size: Any, rows: Any
) -> dict[str, Any]:
    """Returns `decoded` with the best frames of the clips in `rows`, which are longer than T."""
    carriers = {field: dtype for field, dtype in _carriers(modality).items() if field in fields}

    def choose(strings: dict[str, Any]) -> dict[str, Any]:
        raw = {field: tf.io.decode_raw(s, carriers[field]) for field, s in strings.items()}
        worst = tf.fill(tf.shape(raw["quality"]), -np.inf)
        quality = tf.where(tf.math.is_nan(raw["quality"]), worst, raw["quality"])
        best = tf.sort(tf.math.top_k(quality, size).indices)  # where quality ties, the earlier
        return {
            field: tf.reshape(tf.gather(tf.reshape(flat, [tf.size(quality), -1]), best), [-1])
            for field, flat in raw.items()
        }

    # One clip at a time: padding them all to the longest would take its length times B of memory.
    chosen = tf.map_fn(
        choose,
        {field: tf.gather(strings, rows) for field, strings in fields.items()},
        fn_output_signature={f: tf.TensorSpec([None], dtype) for f, dtype in carriers.items()},
        parallel_iterations=1,
    )
    return {
        field: tf.tensor_scatter_nd_update(decoded[field], rows[:, None], chosen[field])
        for field in fields
    }
