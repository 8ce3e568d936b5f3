"""Datasets by name: `config.data.name` is a key of DATASETS."""

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vidjax import files
from vidjax.data import arrays, synthetic
from vidjax.data.cache import Digests, exclusive
from vidjax.data.clips import SPLITS
from vidjax.data.frame_fields import NonFinite, Origin, Quality, RecordSource
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.synthetic import CALIBRATED, SyntheticOptions
from vidjax.errors import UserError, suggest

if TYPE_CHECKING:  # it imports TensorFlow
    from vidjax.data.records.dataset import Dataset

_LOG = logging.getLogger(__name__)


class DataOptions(NamedTuple):
    """The fields of `config.data` that choose a source.

    Attributes:
      directory: folder of the data; None if not set.
      cache_dir: folder of the cache.
      size: size of a generated dataset.
      seed: seed of a generated dataset.
      generate: False raises NotGenerated instead of generating a dataset, and writes nothing.
      quality: the quality of own features, see `frame_fields.Quality`.
      knobs: what a generated dataset holds more or less of.
    """

    directory: Path | None
    cache_dir: Path
    size: str = "small"
    seed: int = 0
    generate: bool = True
    quality: Quality = "given"
    knobs: SyntheticOptions = CALIBRATED

    @property
    def digests(self) -> Digests:
        """Where digests of files are kept; a check writes none."""
        return Digests(self.cache_dir, self.generate)

    @classmethod
    def of(cls, data: Mapping[str, Any], *, generate: bool = True) -> "DataOptions":
        """Returns the options of the section `data` of a configuration."""
        return cls(
            files.local(data["dir"]) if data["dir"] else None,
            Path(data["cache_dir"] or files.default_cache_dir()).expanduser(),
            data["size"],
            data["seed"],
            generate,
            data["quality"],
            synthetic_options(data),
        )


def synthetic_options(data: Mapping[str, Any]) -> SyntheticOptions:
    """Returns the knobs in the section `data` of a configuration, possibly of another version."""
    return SyntheticOptions(
        **{name: data[name] for name in SyntheticOptions._fields if name in data}
    )


class NotGenerated(FileNotFoundError):
    """A dataset has yet to be generated."""


def open_synthetic(options: DataOptions) -> RecordSource:
    """Returns the built-in dataset as official files, generated at the first call.

    Raises:
      ValueError: a folder is given, which would not be read.
    """
    if options.directory:
        raise UserError(
            f"config.data.dir={options.directory}: config.data.name=synthetic reads no folder\n"
            "to read it: --config.data.name=arrays, or --config.data.name=iqiyi_vid for official "
            "files\nfor the synthetic dataset: --config.data.dir="
        )
    # The source code of the generator is its version: a change cannot be forgotten.
    version = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()[:12]
    root = options.cache_dir / "synthetic"
    turned = "".join(f"-{name}={value:g}" for name, value in options.knobs.changed().items())
    folder = root / f"{options.size}-{options.seed}{turned}-{version}"
    if not folder.exists():
        if not options.generate:
            raise NotGenerated("the synthetic dataset is not made yet: training makes it")
        with exclusive(folder):
            if not folder.exists():
                _LOG.info("making the synthetic dataset in %s", folder)
                with files.atomic_folder(folder) as partial:
                    synthetic.write(
                        partial, size=options.size, seed=options.seed, options=options.knobs
                    )
    return OfficialFiles(folder, digests=options.digests)


def open_iqiyi_vid(options: DataOptions) -> RecordSource:
    """Returns a directory of official files."""
    return OfficialFiles(_directory(options, "official files"), digests=options.digests)


def open_arrays(options: DataOptions) -> RecordSource:
    """Returns a folder of own features, as `vidjax.data.arrays` describes it."""
    folder = _directory(options, "features")
    return arrays.FeatureFolder(folder, quality=options.quality, digests=options.digests)


class Names(NamedTuple):
    """The names in a dataset, as far as the names of its files tell.

    Attributes:
      splits: its splits.
      modalities: modality -> feature width, 0 where only the files would tell; None where only the
        files would tell the names, too.
    """

    splits: Collection[str]
    modalities: Mapping[str, int] | None


def names_of_synthetic(options: DataOptions) -> Names:
    """Returns the names in the built-in dataset, which need not exist."""
    return Names(SPLITS, synthetic.SIZES[options.size].dims)


def names_of_iqiyi_vid(options: DataOptions) -> Names:
    """Returns the names that the official files have."""
    pairs = OfficialFiles(_directory(options, "official files")).names
    return Names({split for _, split in pairs}, {modality: 0 for modality, _ in pairs})


def names_of_arrays(options: DataOptions) -> Names:
    """Returns the splits of a folder of own features."""
    return Names(arrays.FeatureFolder(_directory(options, "features")).splits, None)


class DatasetEntry(NamedTuple):
    """A dataset that `config.data.name` can name.

    Attributes:
      open: opens its source.
      generated: True if `config.data.size` and `seed` determine the clips, not `dir`.
      names: returns the names of its splits and modalities without reading its files; None where
        only the files would tell.
    """

    open: Callable[[DataOptions], RecordSource]
    generated: bool = False
    names: Callable[[DataOptions], Names] | None = None


# To add a dataset, write a function like those above and add a line here.
DATASETS: Mapping[str, DatasetEntry] = {
    "synthetic": DatasetEntry(open_synthetic, generated=True, names=names_of_synthetic),
    "iqiyi_vid": DatasetEntry(open_iqiyi_vid, names=names_of_iqiyi_vid),
    "arrays": DatasetEntry(open_arrays, names=names_of_arrays),
}


def open_source(name: str, options: DataOptions) -> RecordSource:
    """Returns the source of a dataset by name.

    Raises:
      ValueError: an unknown name, or no directory where one is needed.
      FileNotFoundError: no data in the directory.
      NotGenerated: the dataset has yet to be generated, and `options.generate` is False.
    """
    return _entry(name).open(options)


def names(name: str, options: DataOptions) -> Names | None:
    """Returns the splits and modalities of a dataset by name, without reading its files.

    They are None for a dataset that tells no names.

    Raises:
      ValueError: an unknown name, or no directory where one is needed.
      FileNotFoundError: no data in the directory.
    """
    find = _entry(name).names
    return find(options) if find else None


def _entry(name: str) -> DatasetEntry:
    if name not in DATASETS:
        raise UserError(f"config.data.name='{name}': {suggest(name, DATASETS)}")
    return DATASETS[name]


def load_dataset(
    name: str,
    *,
    directory: str | Path | None = None,
    cache_dir: str | Path | None = None,
    size: str = "small",
    seed: int = 0,
    non_finite: NonFinite = "drop",
    quality: Quality = "given",
    knobs: SyntheticOptions = CALIBRATED,
) -> "Dataset":
    """Returns a dataset by name, generated and converted unless the cache has it.

    Args:
      name: a key of DATASETS.
      directory: folder of the official files, or of own features as `vidjax.data.arrays` describes
        them; None for 'synthetic'.
      cache_dir: folder of the cache; None for `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      size: size of the synthetic dataset, 'small' or 'standard'.
      seed: seed of the synthetic dataset.
      non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
        refuses them.
      quality: the quality of own features, see `frame_fields.Quality`.
      knobs: what the synthetic dataset holds more or less of.

    Raises:
      ValueError: an unknown name, no directory, or bad data.
      FileNotFoundError: no data in the directory.
      OSError: the cache cannot be written.
    """
    from vidjax.data.records.dataset import Dataset

    cache_dir = Path(cache_dir or files.default_cache_dir()).expanduser()
    folder = files.local(directory) if directory else None
    options = DataOptions(folder, cache_dir, size, seed, quality=quality, knobs=knobs)
    source = open_source(name, options)
    origin = Origin.of_folder(name, None if is_generated(name) else folder)
    return Dataset.from_source(source, cache_dir=cache_dir, non_finite=non_finite, origin=origin)


def is_generated(name: str) -> bool:
    """Returns True for a dataset that `config.data.size` and `seed` determine."""
    return name in DATASETS and DATASETS[name].generated


def describe(data: Mapping[str, Any]) -> str:
    """Returns the name of a dataset, with size, seed and turned knobs if it is generated.

    Args:
      data: the section `data` of a configuration, possibly of another version.
    """
    name = data.get("name", "")
    if is_generated(name):
        turned = "".join(
            f", {name} {value:g}" for name, value in synthetic_options(data).changed().items()
        )
        return f"{name}, size {data.get('size')}, seed {data.get('seed')}{turned}"
    return name


def _directory(options: DataOptions, content: str) -> Path:
    if options.directory is None:
        raise UserError(f"config.data.dir is not set: name the directory of the {content}")
    return options.directory
