"""How the frames of a clip are stored in a record; the one place that sets TensorFlow up.

Every field of a modality is one bytes string: `tf.train.Example` has no float16, and a ragged float
list decodes several times slower. `PackedFrames` reads clip by clip, for TFDS; `parse_batch` and
`decode_batch` read whole batches, much faster.
"""

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax import files
from vidjax.batch import Frames
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS, STORED
from vidjax.data.records.manifest import NAME, VERSION, SplitRecords
from vidjax.data.records.shard_files import Shard, encoded_size, varint_size
from vidjax.errors import UserError

# TensorFlow reads both variables when it is imported. It only moves records here, without need of
# oneDNN, which would announce itself on stderr. Errors arrive as exceptions, not in the log.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Its Keras, which nothing here uses, would write a file into the home folder.
_keras_home = os.environ.get("KERAS_HOME")
os.environ["KERAS_HOME"] = os.devnull
_collecting = gc.isenabled()
gc.disable()  # what is imported stays, and collecting meanwhile takes a third of the seconds
try:
    import tensorflow
    import tensorflow_datasets
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"records of features need the package '{error.name}': pip install 'vidjax[train]'",
        name=error.name,
    ) from error
finally:
    del os.environ["KERAS_HOME"]
    if _keras_home is not None:
        os.environ["KERAS_HOME"] = _keras_home
    if _collecting:
        if not gc.get_freeze_count():
            gc.freeze()  # and it becomes old at once: the next collections would visit all of it,
            gc.unfreeze()  # one generation after another
        gc.enable()

# TensorFlow ships no types, and the stubs of type checkers cover half of it.
tf: Any = tensorflow
tfds: Any = tensorflow_datasets

# The accelerator belongs to JAX: TensorFlow would take all of its memory.
tf.config.set_visible_devices([], "GPU")
tfds.disable_progress_bar()


# Fields that reach a batch: those of Frames. A Batch has no boxes.
DECODED = tuple(name for name in Frames._fields if name in STORED)
# `decode_raw` has no float16 kernel of fixed length: bits pass through an integer of that width.
CARRIERS = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


class PackedFrames(tfds.features.FeatureConnector):
    """The frames of one clip and modality, stored as bytes: features [T, D] and FRAME_FIELDS."""

    def __init__(self, *, dim: int, dtype: str, doc: Any = None):
        super().__init__(doc=doc)
        self._modality = Modality(dim, dtype)
        self._info = {
            "features": tfds.features.TensorInfo(shape=(None, dim), dtype=np.dtype(dtype))
        }
        for name, field in FRAME_FIELDS.items():
            shape = (None,) if field.width == 1 else (None, field.width)
            info = tfds.features.TensorInfo(shape=shape, dtype=np.dtype(field.dtype))
            self._info[name] = info

    def get_tensor_info(self) -> dict[str, Any]:
        """Returns shape and dtype of every field for the reader."""
        return self._info

    def get_serialized_info(self) -> dict[str, Any]:
        """Returns shape and dtype of every field in the record: one string each."""
        return {field: tfds.features.TensorInfo(shape=(), dtype=np.object_) for field in STORED}

    def encode_example(self, example_data: dict[str, np.ndarray]) -> dict[str, bytes]:
        """Returns the T >= 0 frames of a clip as bytes; ValueError unless shape and dtype fit."""
        encoded = {}
        num_frames = len(example_data["features"])
        for field, info in self._info.items():
            array = np.asarray(example_data[field])
            wanted = (num_frames, *info.shape[1:])
            if array.shape != wanted:
                raise UserError(f"{field}: got shape {array.shape}, wanted {wanted}")
            dtype = np.dtype(info.np_dtype)
            if not np.can_cast(array.dtype, dtype, "safe"):
                raise UserError(f"{field}: {array.dtype} does not fit {dtype} exactly")
            encoded[field] = array.astype(dtype.newbyteorder("<"), copy=False).tobytes()
        return encoded

    def decode_example(self, tfexample_data: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of one clip as tensors of the announced shapes."""
        decoded = {}
        for field, info in self._info.items():
            flat = tf.io.decode_raw(tfexample_data[field], info.tf_dtype)
            decoded[field] = tf.reshape(flat, [-1, *info.shape[1:]])
        return decoded

    def to_json_content(self) -> dict[str, Any]:
        """Returns the arguments of `__init__`, from which TFDS makes this connector again."""
        return self._modality._asdict()


def parse_batch(
    serialized: Any, modalities: Sequence[str]
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Returns clip_index [B] int32 and modality -> field -> [B] strings of bytes of B records.

    An empty string in `serialized` [B] reads as clip 0 without frames.
    """
    features: dict[str, Any] = {"clip_index": tf.io.FixedLenFeature([], tf.int64, 0)}
    for name in modalities:
        for field in DECODED:
            features[f"frames/{name}/{field}"] = tf.io.FixedLenFeature([], tf.string, "")
    examples = tf.io.parse_example(serialized, features)
    fields = {
        name: {field: examples[f"frames/{name}/{field}"] for field in DECODED}
        for name in modalities
    }
    return tf.cast(examples["clip_index"], tf.int32), fields


def _kinds(modality: Modality) -> dict[str, tuple[Any, int]]:
    """Returns field -> the TensorFlow dtype that carries its bits, and the bytes of one frame."""
    size = np.dtype(modality.dtype).itemsize
    kinds = {"features": (CARRIERS[size], size * modality.dim)}
    for name, field in FRAME_FIELDS.items():
        dtype = np.dtype(field.dtype)
        kinds[name] = tf.as_dtype(dtype), dtype.itemsize * field.width
    return kinds


def _num_frames(fields: Mapping[str, Any]) -> Any:
    """Returns [B] int32, the number of frames of each clip."""
    return tf.strings.length(fields["number"]) // np.dtype(FRAME_FIELDS["number"].dtype).itemsize


def record_sizes(split: SplitRecords, modalities: Mapping[str, Modality]) -> np.ndarray:
    """Returns [N] int64, the bytes of the record of each clip of a split, by clip index."""
    count = len(split.clips)
    names = [len(clip.encode("utf-8", "surrogateescape")) for clip in split.clips]
    sizes = {"clip": np.array(names), "clip_index": varint_size(np.arange(count))}
    for name, modality in modalities.items():
        length = split.lengths.get(name, np.zeros(count)).astype(np.int64)
        for field, (_, frame_bytes) in _kinds(modality).items():
            sizes[f"frames/{name}/{field}"] = length * frame_bytes
    return encoded_size(sizes)


def windows(fields: Mapping[str, Any], modality: Modality, size: int, first: Any) -> dict[str, Any]:
    """Returns field -> [B] strings of at most `size` frames, from frame `first` [B] int32 on."""
    count = tf.fill(tf.shape(first), size)
    return {
        field: tf.strings.substr(fields[field], first * frame_bytes, count * frame_bytes)
        for field, (_, frame_bytes) in _kinds(modality).items()
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
    kinds = _kinds(modality)
    decoded = {
        field: tf.io.decode_raw(strings, kinds[field][0], fixed_length=size * kinds[field][1])
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
    carriers = {field: _kinds(modality)[field][0] for field in fields}

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


def write_info(
    folder: Path, modalities: Mapping[str, Modality], splits: Mapping[str, Sequence[Shard]]
) -> None:
    """Writes what TFDS needs to read the shards of `folder`; OSError if the disk is full."""
    frames = {
        name: PackedFrames(dim=kind.dim, dtype=kind.dtype) for name, kind in modalities.items()
    }
    features = {
        "clip": tfds.features.Text(),
        "clip_index": tfds.features.Scalar(dtype=np.int64),
        "frames": tfds.features.FeaturesDict(frames),
    }
    # A change of name or module would make other files of the same data.
    module, version = "vidjax.data.iqiyi_vid", tfds.core.Version(VERSION)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(NAME, version, str(folder), module),
        description="Frame features of video clips.",
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )
    info.set_file_format("tfrecord")
    found = []
    for name, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=name, filetype_suffix="tfrecord"
        )
        lengths, size = [one.records for one in shards], sum(one.size for one in shards)
        found.append(tfds.core.SplitInfo(name, lengths, size, filename_template=template))
    info.set_splits(tfds.core.SplitDict(found))
    try:
        info.write_to_directory(folder)
    except tf.errors.OpError as error:
        full = isinstance(error, tf.errors.ResourceExhaustedError)
        raise files.disk_error(folder, full=full) from error
