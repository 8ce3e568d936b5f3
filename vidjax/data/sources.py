"""Opens sources of features: a dataset of `config.data`, a folder, or a dict of arrays."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ml_collections import ConfigDict

from vidjax.data import iqiyi_vid, synthetic
from vidjax.data.arrays import FeatureDict, FeatureFolder
from vidjax.data.cache import cache_folder, exclusive, mark_used
from vidjax.data.frame_fields import NonFinite, Origin, Quality, RecordSource
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.labels import LabelSource
from vidjax.data.packing import Clips
from vidjax.data.synthetic import SyntheticOptions
from vidjax.utils import files
from vidjax.utils.errors import UserError, check_argument, check_entry

if TYPE_CHECKING:  # it imports TensorFlow
    from vidjax.data.records.dataset import Dataset

Section = Mapping[str, Any]  # `config.data`
CacheDir = str | Path | None
_LOG = logging.getLogger(__name__)


def open_synthetic(data: Section, cache_dir: CacheDir) -> RecordSource:
    """Returns the synthetic dataset as official files, generated at the first call."""
    if data["dir"]:
        raise UserError(
            f"config.data.dir={data['dir']}: config.data.name=synthetic does not read a folder\n"
            "to read it: --config.data.name=arrays, or --config.data.name=iqiyi_vid for official "
            "files\nfor the synthetic dataset: --config.data.dir="
        )
    options = _parse_synthetic_options(data)
    # The digest of the source code is the version: any change of the code makes a new dataset.
    version = files.sha256_file(Path(synthetic.__file__))
    key = [data["size"], data["seed"], options._asdict(), version]
    folder = cache_folder(cache_dir, "synthetic", key)
    if not folder.exists():
        with exclusive(folder):
            if not folder.exists():
                _LOG.info("making the synthetic dataset in %s", folder)
                with files.atomic_folder(folder) as partial:
                    synthetic.write(partial, size=data["size"], seed=data["seed"], options=options)
    mark_used(folder)
    return OfficialFiles(folder, cache_dir=cache_dir, origin=Origin("synthetic"))


def open_iqiyi_vid(data: Section, cache_dir: CacheDir) -> RecordSource:
    """Returns the official files in the folder `config.data.dir`."""
    return OfficialFiles(_get_directory(data, "official files"), cache_dir=cache_dir)


def open_arrays(data: Section, cache_dir: CacheDir) -> RecordSource:
    """Returns your own features in the folder `config.data.dir`, see `vidjax.data.arrays`."""
    folder = _get_directory(data, "features")
    return FeatureFolder(folder, quality=data["quality"], cache_dir=cache_dir)


def _get_directory(data: Section, content: str) -> Path:
    if not data["dir"]:
        raise UserError(
            f"config.data.dir is not set: name the folder of the {content}: "
            "--config.data.dir=FOLDER\n"
            "for data in memory, use Python: vidjax.evaluate(workdir, data)"
        )
    return files.local(data["dir"])


# To add a dataset, write a class like `OfficialFiles`, and add a function that opens it here.
DATASETS: Mapping[str, Callable[[Section, CacheDir], RecordSource]] = {
    "synthetic": open_synthetic,
    "iqiyi_vid": open_iqiyi_vid,
    "arrays": open_arrays,
}


def open_source(
    given: Mapping[str, Clips] | str | Path | ConfigDict,
    labels: LabelSource = None,
    *,
    cache_dir: CacheDir = None,
    quality: Quality = "given",
) -> RecordSource:
    """Opens features and labels.

    Args:
      given: the section `config.data`, which replaces all other arguments; a folder of official
        pickles or of your own features; or split -> clip -> modality -> features.
      labels, cache_dir, quality: see `vidjax.load_data`.

    Raises:
      UserError: there are no features, or official pickles come with `labels` or `quality`.
    """
    if isinstance(given, ConfigDict):
        data = cast(Section, given)
        name, cache = data["name"], data["cache_dir"]
        check_entry("config.data.name", name, DATASETS)
        return DATASETS[name](data, Path(cache).expanduser() if cache else None)
    if isinstance(given, Mapping):
        return FeatureDict(given, labels, quality)
    check_argument("load_data: source", given, (str, Path), "a folder, a dict, or a configuration")
    folder = files.local(given)
    if not folder.is_dir() or not iqiyi_vid.find_pickles(folder):
        return FeatureFolder(folder, labels, quality, cache_dir=cache_dir)
    for name, value, default, where in (
        ("labels", labels, None, "train_gt.txt and val_gt.txt"),
        ("quality", quality, "given", "the pickles"),
    ):
        if value != default:
            raise UserError(
                f"{name}: {folder} contains official pickles\n"
                f"leave `{name}` out: it is read from {where}"
            )
    return OfficialFiles(folder, cache_dir=cache_dir)


def load(
    given: Mapping[str, Clips] | str | Path | ConfigDict,
    labels: LabelSource = None,
    *,
    cache_dir: str | Path | None = None,
    non_finite: NonFinite = "drop",
    quality: Quality = "given",
) -> "Dataset":
    """Loads a dataset. If the cache does not have it, it is converted. See `vidjax.load_data`."""
    from vidjax.data.records.conversion import convert
    from vidjax.data.records.dataset import Dataset

    if isinstance(given, ConfigDict):
        data = cast(Section, given)
        cache_dir, non_finite = data["cache_dir"], data["non_finite"]
    source = open_source(given, labels, cache_dir=cache_dir, quality=quality)
    records = convert(source, cache_dir, non_finite=non_finite)
    origin = getattr(source, "origin", Origin(source.kind))
    return Dataset(records, source.read_labels(records.clips), origin=origin)


def read_modalities(data: Section) -> Mapping[str, int]:
    """Returns modality -> feature width, without reading a file.

    The width is 0 if it is unknown. The dict is empty if file names do not contain the modalities.

    Raises:
      UserError: a folder has no features.
    """
    if is_generated(data["name"]):
        return synthetic.SIZES[data["size"]].dims
    return getattr(open_source(cast(ConfigDict, data)), "modalities", {})


def is_generated(name: str) -> bool:
    """Returns True if a dataset is generated (from `config.data.size` and `seed`), not read."""
    return name == "synthetic"


def _parse_synthetic_options(data: Section) -> SyntheticOptions:
    known = {name: data[name] for name in SyntheticOptions._fields if name in data}
    return SyntheticOptions(**known)


def describe(data: Section) -> str:
    """Returns the name of a dataset, and the size, seed and changed options if it is generated."""
    name = data.get("name", "")
    if not is_generated(name):
        return name
    changed = _parse_synthetic_options(data).changed()
    words = "".join(f", {name} {value:g}" for name, value in changed.items())
    return f"{name}, size {data.get('size')}, seed {data.get('seed')}{words}"
