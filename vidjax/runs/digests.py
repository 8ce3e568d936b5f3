"""Computes and compares the digests of the data that a run was trained on.

The entry `data` in the manifest of a checkpoint contains digests of the data that the run has read.
A command that reads the data again compares the digests. The entry `trained_on` in the
`metrics.json` of a finished run contains the same digests:

    splits    split -> dict, for every split that the run reads. Its keys are clips (number of
              clips), modalities (list of their names), records (version of the format of stored
              features), and names, features and labels (a sha256 each). If the split has no
              ground truth, labels are null.
    weights   sha256 of the file `config.data.weights`; null if no file is configured
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax.data.dataset import Dataset
from vidjax.runs.config import Config, list_splits
from vidjax.utils import files
from vidjax.utils.errors import UserError, warn

DataDigests = Mapping[str, Any]  # see the module docstring


def hash_data(config: Config, data: Dataset) -> dict[str, Any]:
    """Returns the digests of the data that a run with the configuration `config` reads.

    The keys are `splits` (split -> digests of the clips) and `weights` (the sha256 of the file
    `config.data.weights`, or None without a file).
    """
    of_splits = data.report["splits"]
    weights = config.data.weights
    return {
        "splits": {
            name: of_splits[name]["sha256"]
            for name in dict.fromkeys((*config.data.train_splits, *list_splits(config)))
            if "sha256" in of_splits.get(name, {})
        },
        "weights": files.sha256_file(files.local(weights)) if weights else None,
    }


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns which data of a split have changed: a list of "names", "features" and "labels".

    `before` and `now` are the old and the new digests of the split. Features are compared only if
    the modalities and the version of the format are equal. Otherwise, the digests may differ even
    for equal features, because one digest covers the stored features of all modalities.
    """
    same = all(now.get(key) == before.get(key) for key in ("modalities", "records"))
    kinds = ("names", "features", "labels") if same else ("names", "labels")
    return [kind for kind in kinds if now[kind] != before[kind]]


def describe_difference(
    split: str, before: Mapping[str, Any], now: Mapping[str, Any] | None
) -> str:
    """Returns a phrase such as "val has other labels", or "" if the split has not changed.

    `before` and `now` are the old and the new digests of the split. If the split is missing now,
    `now` is None. If the features cannot be compared, prints a warning.
    """
    if now is None:
        return f"{split} is missing"
    changes = find_changes(before, now)
    if "names" in changes:
        return f"{split} has other clips ({now['clips']:,}, before {before['clips']:,})"
    unknown = "so vidjax cannot check the features: if they have changed, train again"
    if now.get("modalities") != before.get("modalities"):
        warn(f"{split}: the data have other modalities than in the training\n{unknown}")
    elif now.get("records") != before.get("records"):
        warn(f"{split}: the training read the data with another version of vidjax\n{unknown}")
    return f"{split} has other {' and '.join(changes)}" if changes else ""


def check_data(
    workdir: Path,
    own: DataDigests,
    config: Config,
    data: Dataset,
    *,
    trains: bool = True,
    named: bool = True,
) -> None:
    """Raises UserError if `data` are not the data that a run in `workdir` was trained on.

    `own` has the digests of the splits that the run has read. These data must be unchanged:
    - if `trains` is True: all these splits, and the file `config.data.weights`.
    - if `trains` is False: `eval.split`. If `own` has no digest of `eval.split`: nothing if `named`
      is True (the user has given the folder of the data), otherwise one of the splits.
    """
    split = config.eval.split
    names = [split] if not trains and split in own["splits"] else list(own["splits"])
    here = {name: counts.get("sha256") for name, counts in data.report["splits"].items()}
    different = [describe_difference(name, own["splits"][name], here.get(name)) for name in names]
    if trains and own.get("weights") != hash_data(config, data)["weights"]:
        different.append("config.data.weights is another file")
    # A folder that is not `named` is from `config.json`, which is not trusted.
    if not trains and split not in names and (named or not all(different)):
        return
    if any(different):
        remedy, origin = "give the data of the run: --config.data.dir=FOLDER", data.report["data"]
        if origin["name"] == "arrays" and not origin["dir"]:
            remedy = "pass the clips of the run to vidjax.load_data"
        other = "train on these in another folder: --workdir=FOLDER"
        if not trains:
            other = "rank these clips: vidjax rank --input=FOLDER --out=FILE"
        raise UserError(
            f"'{workdir}' was trained on other data: {', '.join(filter(None, different))}\n"
            f"{remedy}\nor {other}"
        )
