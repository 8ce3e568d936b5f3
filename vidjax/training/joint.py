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

    The function `train` is `public.train_run`. The folds measure the blend, and the runs on all
    clips rank the split test. Returns the content of `metrics.json`, and whether the blend had been
    finished before.
    """
    began = time.monotonic()
    _check_same_blend(config, folder)
    has_test = "test" in data.report["splits"]
    names: dict[bool, list[str]] = {False: [], True: []}
    new = False
    for final in (False, True)[: 1 + has_test]:
        for number, spec in enumerate(config.join.systems, 1):
            own = config_io.load_system(config, spec, final=final)
            path = folder.path / f"{number}_{own.model.name}{'_all' if final else ''}"
            say(f"{path.name}: {spec}, on {'all clips' if final else 'folds'}")
            with make_and_lock(path):
                run = train(own, RunFolder(path), data, num_devices=num_devices)
            new |= not run[1]
            names[final].append(path.name)
    splits = [config.eval.split, *(["test"] if has_test else [])]
    done = [folder.metrics(folder.paths(split)) if folder.has(CONFIG) else {} for split in splits]
    if all(done) and not new:
        return done[0], True
    joined = copy.deepcopy(config)
    joined.join.update(runs=tuple(names[False]), finals=tuple(names[True]))
    options = {"num_devices": num_devices, "command": command}
    results = blend.blend_runs(joined, folder, lambda _: data, **options)
    if has_test:
        joined = folder.config
        joined.eval.split = "test"
        blend.blend_runs(joined, folder, lambda _: data, **options)
    return results | {"seconds": time.monotonic() - began}, False


def _check_same_blend(config: Config, folder: RunFolder) -> None:
    """Raises UserError if a folder contains a blend of another configuration."""
    if not folder.has(CONFIG):
        return
    before = folder.config
    for name in SET_HERE:
        before.join[name] = config.join[name]
    check_resumes(folder.path, before, config)
