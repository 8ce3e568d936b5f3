"""Trains the systems of a blend in a folder, and joins their scores (`config.join.systems`)."""

import copy
import time
from collections.abc import Callable
from typing import Any

from vidjax.data.clips import TrainingData
from vidjax.evaluation import blend
from vidjax.runs import config_io
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, RunFolder, check_resumes, make_and_lock
from vidjax.runs.terminal import say
from vidjax.utils.errors import UserError

Train = Callable[..., tuple[dict[str, Any], bool]]
SET_HERE = ("runs", "finals", "weights", "calibration")  # fields of `config.join`


def train_systems(
    config: Config,
    folder: RunFolder,
    data: TrainingData,
    train: Train,
    *,
    num_devices: int | None = None,
    command: str | None = None,
) -> tuple[dict[str, Any], bool]:
    """Trains each system in folds and on all clips with `train`, and joins their scores.

    The function `train` is `public.train_run`. The folds measure the blend on `config.eval.split`,
    or on the last split of `config.data.train_splits` if the systems are not trained on
    `config.eval.split`. The runs on all clips rank the other splits that are evaluated. Returns the
    metrics on `config.eval.split`, and whether the blend had been finished before.
    """
    began = time.monotonic()
    _check_same_blend(config, folder)
    asked, trained, known = config.eval.split, config.data.train_splits, data.report["splits"]
    _check_labels(config, data)
    measured = asked if asked in trained else trained[-1]
    splits = [*dict.fromkeys((measured, asked, *({"test"} & {*known} - {*trained})))]
    names: dict[bool, list[str]] = {False: [], True: []}
    new = False
    for final in (False, True)[: len(splits)]:
        for number, spec in enumerate(config.join.systems, 1):
            own = config_io.load_system(config, spec, final=final)
            own.eval.split = splits[-1 if final else 0]
            path = folder.path / f"{number}_{own.model.name}{'_all' if final else ''}"
            say(f"{path.name}: {spec}, on {'all clips' if final else 'folds'}")
            with make_and_lock(path):
                run = train(own, RunFolder(path), data, num_devices=num_devices)
            new |= not run[1]
            names[final].append(path.name)
    done = [folder.metrics(folder.paths(split)) if folder.has(CONFIG) else {} for split in splits]
    if all(done) and not new:
        return done[splits.index(asked)], True
    joined, results = copy.deepcopy(config), {}
    joined.join.update(runs=tuple(names[False]), finals=tuple(names[True]))
    for split in splits:
        joined.eval.split = split
        options = {"num_devices": num_devices, "command": command}
        results[split] = blend.blend_runs(joined, folder, lambda _: data, **options)
        joined = folder.config
    return results[asked] | {"seconds": time.monotonic() - began}, False


def _check_same_blend(config: Config, folder: RunFolder) -> None:
    """Raises UserError if a folder contains a blend of another configuration."""
    if not folder.has(CONFIG):
        return
    before = folder.config
    before.eval.split = config.eval.split  # `train_systems` chooses the first split
    for name in SET_HERE:
        before.join[name] = config.join[name]
    check_resumes(folder.path, before, config)


def _check_labels(config: Config, data: TrainingData) -> None:
    """Raises UserError if the blend must learn from a split without ground truth."""
    splits = config.data.train_splits
    for name in splits if config.join.learned else ():
        if not data.split(name).labelled:
            rest = ",".join(x for x in splits if x != name) or "train"
            raise UserError(
                f"config.join.learned: {name} has no ground truth\n"
                f"leave out the split: --config.data.train_splits={rest}"
            )
