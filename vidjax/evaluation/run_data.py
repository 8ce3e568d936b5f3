"""Digests of a run's data, compared wherever the run meets data again.

A checkpoint's manifest has them as `data`, the `metrics.json` of a finished run as `trained_on`:

    splits    split -> {clips: int, modalities: list, names, features, labels: sha256}, of those
              that training reads; labels are null without ground truth
    weights   sha256 of the file `config.data.weights`; null without one
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.errors import UserError
from vidjax.files import sha256_file

Digests = Mapping[str, Any]  # as above
ELSEWHERE = (
    "train on these in another folder: --workdir=FOLDER\n"
    "or go on with the data of the run: --config.data.dir=FOLDER"
)


def digests(config: Config, data: TrainingData) -> dict[str, Any]:
    """Returns the digests of the data that a configuration trains on and evaluates."""
    of_splits = data.report["splits"]
    weights = config.data.weights
    return {
        "splits": {
            name: of_splits[name]["sha256"]
            for name in dict.fromkeys((*config.data.train_splits, config.eval.split))
            if "sha256" in of_splits.get(name, {})
        },
        "weights": sha256_file(Path(weights).expanduser()) if weights else None,
    }


def differences(
    own: Digests, report: Mapping[str, Any], splits: Collection[str] | None = None
) -> str:
    """Describes in a line how the data of a report differ from a run's `own`; '' if they do not."""
    found, here = [], report["splits"]
    for name, before in own["splits"].items():
        now = here.get(name, {}).get("sha256")
        if splits is not None and name not in splits:
            continue
        if now is None:
            found.append(f"{name} is absent")
        elif now["names"] != before["names"]:
            found.append(f"{name} has {_other_clips(before['clips'], now['clips'])}")
        else:
            kinds = ["features", "labels"]
            if now.get("modalities") != before.get("modalities"):  # in the same records
                kinds.remove("features")
                _warn_of_modalities(name)
            what = [kind for kind in kinds if now[kind] != before[kind]]
            found += [f"{name} has other {' and '.join(what)}"] if what else []
    return ", ".join(found)


def _warn_of_modalities(split: str) -> None:
    warnings.warn(
        f"{split}: other modalities lie beside those that the run reads: whether its features are "
        "as they were cannot be told",
        stacklevel=3,
    )


def _other_clips(before: int, now: int) -> str:
    if before == now:
        return f"other clips, {now:,} as before"
    return f"{abs(now - before):,} clips {'more' if now > before else 'fewer'}: {now:,}"


def check_training(workdir: Path, own: Digests | None, config: Config, data: TrainingData) -> None:
    """Refuses to go on with a run on other data; only warns if the run is too old for digests."""
    if own is None:
        _warn_unknown(workdir)
        return
    different = differences(own, data.report)
    if own.get("weights") != digests(config, data)["weights"]:
        different = ", ".join(filter(None, (different, "config.data.weights are others")))
    if different:
        raise UserError(f"'{workdir}' holds a run on other data: now {different}\n{ELSEWHERE}")


def check_finished(
    workdir: Path, results: Mapping[str, Any], config: Config, data: TrainingData
) -> None:
    """Refuses a finished run, with `results` of its metrics.json, on other data than its own."""
    own = results.get("trained_on")
    before, now = (one.get("data", {}).get("digest") for one in (results, data.report))
    if own is None and before is not None:  # an earlier version kept one digest of all splits
        if before == now:
            return
        raise UserError(
            f"'{workdir}' holds a run on other data, or on these as an earlier version read them\n"
            f"{ELSEWHERE}"
        )
    check_training(workdir, own, config, data)


def check_evaluation(
    workdir: Path, manifest: Mapping[str, Any], config: Config, data: TrainingData
) -> None:
    """Refuses to evaluate a split that the run has read, if it now has other data under that name.

    Another split may be of any data. But if the folder of data is the one in `config.json`, which a
    stranger may have written, at least one split of the run must be as it was.
    """
    own, split = manifest.get("data"), config.eval.split
    if own is None:
        _warn_unknown(workdir)
        return
    different = differences(own, data.report, (split,))
    if split not in own["splits"] and config.data.dir == manifest["config"]["data"].get("dir"):
        each = [differences(own, data.report, (name,)) for name in own["splits"]]
        different = ", ".join(each) if config.data.dir and all(each) else ""
    if different:
        raise UserError(
            f"'{workdir}' was trained and measured on other data: now {different}\n"
            "name the data of the run: --config.data.dir=FOLDER\n"
            "or rank these clips: --mode=rank --input=FOLDER --out=FILE"
        )


def check_named(
    workdir: Path, manifest: Mapping[str, Any], config: Config, *, by_user: bool
) -> None:
    """Refuses a data folder that no digest confirms, unless the user (`by_user`) has named it."""
    if "data" not in manifest and config.data.dir and not by_user:
        raise UserError(
            f"'{workdir}' does not tell its training data: an earlier version of vidjax made it\n"
            f"if they are these, confirm it: --config.data.dir={config.data.dir}"
        )


def _warn_unknown(workdir: Path) -> None:
    warnings.warn(
        f"'{workdir}' is a run of an earlier version: whether these are its data cannot be told",
        stacklevel=3,
    )
