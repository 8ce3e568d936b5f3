"""The TFDS builder that writes flat clips as TFRecord shards."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax import files
from vidjax.data.clips import Modality
from vidjax.data.records.codec import PackedFrames, tf, tfds
from vidjax.data.records.manifest import VERSION
from vidjax.data.records.staging import ShardTask, StagedSplit, shard_bounds, shard_tasks


class FrameRecords(tfds.core.ShardBasedBuilder):
    """Records of frames: clip name, clip index and the packed frames of each modality.

    It gets whole shards rather than a stream to shuffle: the shuffler of TFDS holds up to 1 GB and
    writes the rest to disk once more. `stage` has ordered the records already.
    """

    VERSION = tfds.core.Version(VERSION)
    # TFDS writes both into the files: a change would make other files of the same data.
    name = "iqiyi_vid"
    __module__ = "vidjax.data.iqiyi_vid"

    def __init__(
        self,
        *,
        modalities: Mapping[str, Modality],
        staged: Mapping[str, StagedSplit],
        write_shards: Callable[[Sequence[ShardTask]], None],
        scratch: Path,
        data_dir: Path,
    ):
        """Makes the builder that has `write_shards` write `staged` under `data_dir`."""
        self._modalities = modalities
        self._staged = staged
        self._write_shards = write_shards
        self._scratch = scratch
        super().__init__(data_dir=data_dir)

    def _info(self) -> Any:
        frames = {
            name: PackedFrames(dim=modality.dim, dtype=modality.dtype)
            for name, modality in self._modalities.items()
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Frame features of video clips.",
            features=tfds.features.FeaturesDict(
                {
                    "clip": tfds.features.Text(),
                    "clip_index": tfds.features.Scalar(dtype=np.int64),
                    "frames": tfds.features.FeaturesDict(frames),
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[ShardTask]]:
        del dl_manager
        tasks = {}
        for name, split in self._staged.items():
            shards = shard_bounds(split, self._modalities)
            paths = self._get_filename_template(name).sharded_filepaths(num_shards=len(shards))
            scratch = self._scratch / name
            tasks[name] = shard_tasks(split, self._modalities, [*map(Path, paths)], scratch)
        return tasks

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes all shards of all splits by one call of `write_shards`.

        TFDS would write them one after another. Its Beam pipeline has a step for each shard, which
        the local runner takes in turn, and runs again for every split, over all splits before it.
        """
        del download_config
        tasks = self._shard_iterators_per_split(dl_manager)
        self._write_shards([task for shards in tasks.values() for task in shards])
        splits = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[len(task.clips) for task in shards],
                num_bytes=sum(task.path.stat().st_size for task in shards),
                filename_template=self._get_filename_template(name),
            )
            for name, shards in tasks.items()
        ]
        self.info.set_splits(tfds.core.SplitDict(splits))

    def download_and_prepare(self, **options: Any) -> None:
        """Writes all shards and what TFDS needs to read them.

        Raises:
          OSError: the disk is full or cannot be written.
        """
        try:
            super().download_and_prepare(**options)
        except tf.errors.OpError as error:
            full = isinstance(error, tf.errors.ResourceExhaustedError)
            raise files.disk_error(self._scratch, full=full) from error
