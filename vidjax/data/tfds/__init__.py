"""The iQIYI-VID dataset for TensorFlow Datasets (TFDS), and training batches by tf.data.

After `import vidjax.data.tfds`, the call `tfds.load("iqiyi_vid")` works. The module `streaming`
makes training batches. Only this folder contains `import tensorflow`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets

from vidjax.core.batch import BATCHED
from vidjax.data.dataset import Dataset
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.packed_clips import get_dtype
from vidjax.data.store import convert

tfds: Any = tensorflow_datasets  # the type stubs of TFDS are incomplete


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):  # type: ignore[misc]
    """Selects the modalities of the clips in the TFDS dataset, and the dtype of their features.

    Attributes:
      modalities: the names of the modalities. If the folder has no file of a modality, all clips
        have 0 frames in this modality.
      dtype: the dtype of features. float32 stores all values of float16 and int8 without loss.
    """

    modalities: tuple[str, ...] = ("face", "head", "body", "scene", "audio")
    dtype: str = "float32"


class IqiyiVid(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """The builder for TFDS, which reads a folder of official files. An example is a clip.

    An example has the name, the identity, and the frames of the clip. A distractor or an unlabelled
    clip has the identity "". In each modality, the T frames have features [T, D], quality scores
    [T], detection scores [T] and frame numbers [T].
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [Config(name="official")]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The manual_dir is the folder of the official files, such as face_train.pickle."
    )

    def _info(self) -> Any:
        def describe(field: str) -> Any:
            shape = (None, None) if field == "features" else (None,)
            dtype = get_dtype(field, self.builder_config.dtype).type
            return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

        frames = {field: describe(field) for field in BATCHED}
        features = {
            "clip": tfds.features.Text(),
            "identity": tfds.features.Text(),
            "frames": dict.fromkeys(self.builder_config.modalities, frames),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Features of the frames of video clips, and the person of each clip.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        source = OfficialFiles(dl_manager.manual_dir)
        store = convert(source)
        data = Dataset(store, source.read_labels(store.clips), origin=source.origin)
        return {name: self._generate_examples(data, name) for name in store.splits}

    def _generate_examples(self, data: Dataset, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        dtype, clips, people = self.builder_config.dtype, data.split(split), ("", *data.identities)
        kinds = {field: get_dtype(field, dtype) for field in BATCHED}
        empty = {f: np.zeros((0, 0) if f == "features" else 0, kind) for f, kind in kinds.items()}
        known = [name for name in self.builder_config.modalities if name in clips.lengths]
        for numbers, packed in data.packed(split, known):
            for row, clip in enumerate(numbers.tolist()):
                frames = dict.fromkeys(self.builder_config.modalities, empty)
                for name, x in packed.items():
                    rows = slice(x.start[row], x.start[row] + x.length[row])
                    fields = {f: np.asarray(getattr(x, f)[rows]) for f in BATCHED}
                    frames[name] = {f: v.astype(kinds[f], copy=False) for f, v in fields.items()}
                name, identity = clips.clips[clip], people[clips.labels[clip]]
                yield name, {"clip": name, "identity": identity, "frames": frames}
