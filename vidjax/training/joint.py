"""Trains a blend: trains the systems `config.join.systems`, and joins their scores."""

import time
from collections.abc import Callable
from typing import Any

from vidjax.core import devices
from vidjax.data.dataset import Dataset
from vidjax.evaluation import analysis, trained_runs
from vidjax.runs import config_io, digests, results
from vidjax.runs.config import Config
from vidjax.runs.run_folder import JOIN, RunFolder, make_and_lock, name_systems
from vidjax.runs.versions import collect_versions
from vidjax.utils import distributed
from vidjax.utils.errors import UserError
from vidjax.utils.terminal import say


def train_systems(
    config: Config,
    folder: RunFolder,
    data: Dataset,
    train: Callable[[Config, RunFolder, Dataset], object],
    *,
    num_devices: int | None = None,
    command: str | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains the systems `config.join.systems` in a folder, and joins their scores (a blend).

    `train` (`public.train_run`) trains each system in folds, and each net scores only clips that it
    was not trained on. If `config.eval.split`, the split `test` or a split in `config.eval.splits`
    has no training clips, `train` also trains each system on all clips, for the scores of these
    splits. All these splits are ranked.

    For `command` and `began`, see `public.train_run`. Returns the metrics on `config.eval.split`,
    name -> value. Raises UserError if a split lacks labels that training or `eval.splits` needs.
    """
    began = time.monotonic() if began is None else began
    asked, trained, known = config.eval.split, config.data.train_splits, data.report["splits"]
    _check_labels(config, data)
    trained_runs.check_labelled(config, data)
    measured = asked if asked in trained else trained[-1]
    found = {"test"} & {*known} - {*trained}
    splits = [*dict.fromkeys((measured, asked, *found, *config.eval.splits))]
    others = [*found, *(split for split in splits if split not in trained)]
    distributed.barrier()  # waits until all processes have read the old files
    if distributed.is_first():
        folder.write_config(config)
        (folder.path / JOIN).unlink(missing_ok=True)  # the numbers are learned again
    for final in (False, True)[: 1 + bool(others)]:
        names = name_systems(config, final=final)
        for spec, path in zip(config.join.systems, map(folder.path.joinpath, names), strict=True):
            own = config_io.load_system(config, spec, final=final)
            own.eval.split = others[0] if final else measured
            say(f"{path.name}: trains {spec} on {'all clips' if final else 'folds'}")
            with make_and_lock(path):
                train(own, RunFolder(path), data)
    mesh = devices.make_mesh(num_devices)
    evaluated = analysis.score_splits(config, folder, None, lambda _: data, mesh, *splits)
    about: dict[str, Any] = {
        "seed": config.seed,
        "date": results.now(),
        "seconds": time.monotonic() - began,
        "finished": True,
        "trained_on": digests.hash_data(config, data),
        "versions": collect_versions(),
        **({"command": command} if command else {}),
    }
    return analysis.write_results(folder, config, evaluated, about)[asked]


def _check_labels(config: Config, data: Dataset) -> None:
    """Raises UserError if the weights of the blend would be learned on clips without labels."""
    splits = config.data.train_splits
    for name in splits if config.join.learned else ():
        if not data.split(name).labelled:
            rest = ",".join(x for x in splits if x != name) or "train"
            raise UserError(
                f"config.join.learned=True needs labels, but the split {name} has none\n"
                f"leave out the split: --config.data.train_splits={rest}"
            )
