"""The protocol of frames that can become records; numpy only."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vidjax import files
from vidjax.data.frame_fields import NonFinite, PackedClips

# Split -> parts of its clips, each of them modality -> clips, as `pack` returns them.
Unpacked = Mapping[str, Sequence[Mapping[str, PackedClips]]]


class Origin(NamedTuple):
    """The origin of a dataset, as results name it.

    Attributes:
      name: a key of `vidjax.data.load.DATASETS`.
      dir: absolute path of the folder; None for generated clips and for arrays in memory.
    """

    name: str
    dir: str | None = None

    @classmethod
    def of_folder(cls, name: str, folder: str | Path | None) -> "Origin":
        """Returns the origin of a dataset in a folder; None for a dataset without one."""
        return cls(name, str(files.absolute(folder)) if folder else None)


class RecordSource(Protocol):
    """Frames that can become records, and their labels.

    A dataset is one class of this kind and one line in `vidjax.data.load.DATASETS`.
    """

    @property
    def kind(self) -> str:
        """Subfolder of the cache for its records."""
        ...

    @property
    def place(self) -> str:
        """Folder or name, for messages."""
        ...

    @property
    def title(self) -> str:
        """What is converted, for the log and `--mode=check`."""
        ...

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a JSON value that differs from any other content's: the cache key."""
        ...

    def file_of(self, modality: str, split: str) -> Path:
        """Returns the file of some frames, for messages and the report."""
        ...

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        """Reads all frames; the parts of a split share no clip, and agree in width and dtype.

        Args:
          scratch: a folder for flat files, which outlives the arrays.
          non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
            refuses them.
        """
        ...

    def truth(self, clips: Mapping[str, Collection[str]]) -> Mapping[str, Mapping[str, str]]:
        """Returns labelled split -> clip -> identity.

        Args:
          clips: split -> names of its clips.
        """
        ...
