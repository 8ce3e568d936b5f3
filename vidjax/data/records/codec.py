"""Writes metadata with which TensorFlow Datasets (TFDS) can read the TFRecord files.

The values of all frames of a clip are stored as one string of bytes per field, because
`tf.train.Example` has no float16, and a list of floats takes several times as long to decode.
vidjax itself does not use the metadata, because `streaming` decodes whole batches much faster.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets

from vidjax.core.batch import BATCHED
from vidjax.data.clips import Modality
from vidjax.data.packed_clips import get_dtype
from vidjax.data.records.shards import NAME, VERSION, Shard

# The type stubs of TFDS are incomplete.
tfds: Any = tensorflow_datasets
tfds.disable_progress_bar()


class PackedFrames(tfds.features.FeatureConnector):
    """Encodes the frames of a clip in one modality for TFDS, as a string of bytes per field."""

    def __init__(self, *, dim: int, dtype: str, doc: Any = None):
        super().__init__(doc=doc)
        self._modality = Modality(dim, dtype)
        self._info = {
            field: tfds.features.TensorInfo(
                shape=(None, dim) if field == "features" else (None,),
                dtype=get_dtype(field, dtype),
            )
            for field in BATCHED
        }

    def get_tensor_info(self) -> dict[str, Any]:
        """Returns the shape and dtype of each decoded field."""
        return self._info

    def get_serialized_info(self) -> dict[str, Any]:
        """Returns the shape and dtype of each encoded field, which is a string."""
        return {field: tfds.features.TensorInfo(shape=(), dtype=np.object_) for field in BATCHED}

    def encode_example(self, example_data: dict[str, np.ndarray]) -> dict[str, bytes]:
        """Returns field -> the little-endian values of all frames of a clip, frame after frame."""
        return {
            field: example_data[field].astype(np.dtype(info.np_dtype).newbyteorder("<")).tobytes()
            for field, info in self._info.items()
        }

    def decode_example(self, tfexample_data: dict[str, Any]) -> dict[str, Any]:
        """Decodes the fields of a clip to tensors with T rows, such as features [T, D]."""
        from vidjax.data.records.streaming import tf

        decoded = {}
        for field, info in self._info.items():
            flat = tf.io.decode_raw(tfexample_data[field], info.tf_dtype)
            decoded[field] = tf.reshape(flat, [-1, *info.shape[1:]])
        return decoded

    def to_json_content(self) -> dict[str, Any]:
        """Returns the arguments with which TFDS makes an equal object."""
        return self._modality._asdict()


def write_info(
    folder: Path, modalities: Mapping[str, Modality], splits: Mapping[str, Sequence[Shard]]
) -> None:
    """Writes metadata with which TFDS can read the TFRecord files of a folder."""
    frames = {
        name: PackedFrames(dim=kind.dim, dtype=kind.dtype) for name, kind in modalities.items()
    }
    features = {
        "clip": tfds.features.Text(),
        "clip_index": tfds.features.Scalar(dtype=np.int64),
        "frames": tfds.features.FeaturesDict(frames),
    }
    # Do not change the name and the module in the metadata: equal data must give equal files.
    module, version = "vidjax.data.iqiyi_vid", tfds.core.Version(VERSION)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(NAME, version, str(folder), module),
        description="Frame features of video clips.",
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )
    info.set_file_format("tfrecord")
    split_infos = []
    for name, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=name, filetype_suffix="tfrecord"
        )
        lengths, size = [shard.records for shard in shards], sum(shard.size for shard in shards)
        split_infos.append(tfds.core.SplitInfo(name, lengths, size, filename_template=template))
    info.set_splits(tfds.core.SplitDict(split_infos))
    info.write_to_directory(folder)
