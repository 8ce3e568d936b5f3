"""Opens datasets: a dataset that a configuration names, a folder, or a dict of arrays."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from vidjax.data import iqiyi_vid, synthetic
from vidjax.data.arrays import FeatureDict, FeatureFolder
from vidjax.data.checks import check_folder
from vidjax.data.clips import FileSource, Origin
from vidjax.data.dataset import Dataset
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.labels import LabelSource
from vidjax.data.packed_clips import Quality
from vidjax.data.packing import Clips
from vidjax.data.store import cache_folder, convert, fill, make_store
from vidjax.data.synthetic import SyntheticOptions
from vidjax.utils import files
from vidjax.utils.errors import UserError, check_argument, check_entry

Section = Mapping[str, Any]  # the section `data` of a configuration
CacheDir = str | Path | None
_LOG = logging.getLogger(__name__)


def open_synthetic(data: Section, cache_dir: CacheDir) -> FileSource:
    """Opens the synthetic dataset. The first call generates its files in the cache.

    `data` is the section `data` of a configuration.
    """
    if data["dir"]:
        raise UserError(
            f"config.data.dir={data['dir']} would be ignored, because config.data.name=synthetic\n"
            "to read the folder, add --config.data.name=arrays (or iqiyi_vid for iQIYI-VID)\n"
            "for the synthetic dataset, empty the field: --config.data.dir="
        )
    options = _parse_synthetic_options(data)
    # The key contains a digest of the source code, because other code makes another dataset.
    version = files.sha256_file(Path(synthetic.__file__))
    key = [data["size"], data["seed"], options._asdict(), version]
    folder = cache_folder(cache_dir, "synthetic", key)

    def write(partial: Path) -> None:
        _LOG.info("making the synthetic dataset in %s", folder)
        synthetic.write(partial, size=data["size"], seed=data["seed"], options=options)

    fill(folder, write)
    return OfficialFiles(folder, cache_dir=cache_dir, origin=Origin("synthetic"))


def open_iqiyi_vid(data: Section, cache_dir: CacheDir) -> FileSource:
    """Opens the official iQIYI-VID files in the folder `data.dir` of a configuration."""
    return OfficialFiles(_get_directory(data, "iQIYI-VID files"), cache_dir=cache_dir)


def open_arrays(data: Section, cache_dir: CacheDir) -> FileSource:
    """Opens the user's own features in the folder `data.dir` of a configuration."""
    folder = _get_directory(data, "features")
    return FeatureFolder(folder, quality=data["quality"], cache_dir=cache_dir)


def _get_directory(data: Section, content: str) -> Path:
    if not data["dir"]:
        raise UserError(
            f"config.data.dir is not set: name the folder of the {content} with "
            "--config.data.dir=FOLDER\n"
            "if the data are in memory, pass them in Python, as in vidjax.train(config, data)"
        )
    folder = files.local(data["dir"])
    check_folder(folder, f"name the folder of the {content} with --config.data.dir=FOLDER")
    return folder


# To add a dataset, write a class like `OfficialFiles`, and add a function that opens it here.
DATASETS: Mapping[str, Callable[[Section, CacheDir], FileSource]] = {
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
) -> FileSource | FeatureDict:
    """Opens a dataset, without reading its features.

    `given` is a folder of iQIYI-VID pickles, a folder of a user's own features, or a dict, split ->
    clip -> modality -> features. For the other arguments, see `vidjax.load_data`. `given` may also
    be the section `data` of a configuration. Then the other arguments are ignored.
    """
    if isinstance(given, ConfigDict):
        data = cast(Section, given)
        name, cache = data["name"], data["cache_dir"]
        check_entry("config.data.name", name, DATASETS)
        return DATASETS[name](data, files.local(cache) if cache else None)
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
                f"load_data: `{name}` would be ignored, because {folder} contains pickles of "
                f"iQIYI-VID\nleave `{name}` out: vidjax reads {name} from {where}"
            )
    return OfficialFiles(folder, cache_dir=cache_dir)


def load(
    given: Mapping[str, Clips] | str | Path | ConfigDict,
    labels: LabelSource = None,
    *,
    cache_dir: str | Path | None = None,
    quality: Quality = "given",
) -> Dataset:
    """Loads a dataset. The first call stores files in the cache. See `vidjax.load_data`."""
    if isinstance(given, ConfigDict):
        cache_dir = cast(Section, given)["cache_dir"]
    source = open_source(given, labels, cache_dir=cache_dir, quality=quality)
    if isinstance(source, FeatureDict):
        store = make_store(source, source.read())
    else:
        store = convert(source, cache_dir)
    origin = getattr(source, "origin", Origin(source.kind))
    return Dataset(store, source.read_labels(store.clips), origin=origin)


def read_modalities(data: Section) -> Mapping[str, int]:
    """Returns modality -> feature width of a dataset, without reading features.

    `data` is the section `data` of a configuration. For pickles of iQIYI-VID, each width is 0
    (unknown). For a folder of a user's own features, returns {}.
    """
    if data["name"] == "synthetic":
        return synthetic.SIZES[data["size"]].dims
    return getattr(open_source(cast(ConfigDict, data)), "modalities", {})


def _parse_synthetic_options(data: Section) -> SyntheticOptions:
    known = {name: data[name] for name in SyntheticOptions._fields if name in data}
    return SyntheticOptions(**known)


def describe(data: Section) -> str:
    """Returns the name of a dataset. If it is synthetic, adds size, seed and non-default options.

    `data` is the section `data` of a configuration.
    """
    name = data.get("name", "")
    if name != "synthetic":
        return name
    options, usual = _parse_synthetic_options(data)._asdict(), synthetic.CALIBRATED._asdict()
    words = "".join(f", {name} {x:g}" for name, x in options.items() if x != usual[name])
    seed = f", data seed {data['seed']}" if data.get("seed") else ""
    return f"{name}, size {data.get('size')}{seed}{words}"
