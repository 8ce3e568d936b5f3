"""Checks runs and configurations for the command `vidjax check`.

Checks either the checkpoints and the data of a run, or a configuration and its data. A check is a
function that returns a summary, or raises an error if it finds a fault.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from vidjax.runs import checkpoint, config as config_lib, config_io
from vidjax.runs.config import Config
from vidjax.runs.run_folder import RunFolder
from vidjax.training import public
from vidjax.utils import messages


def list_checks(workdir: Path, overrides: Sequence[str] = ()) -> dict[str, Callable[[], str]]:
    """Returns the checks of a run in the folder `workdir`, name of a check -> function.

    A function checks a checkpoint or the data of the run, and returns a summary. `overrides` are
    words such as `--config.data.dir=PATH`. Raises UserError if the folder contains no run.
    """
    run, checks = public.open_run(workdir), dict[str, Callable[[], str]]()
    # A blend has runs in folds and, if `vidjax train` has made it, runs on all clips.
    parts = dict.fromkeys((*run.list_runs(final=False), *run.list_runs()))
    for path in parts or [workdir]:
        name = f"{messages.relative_path(path)}: " if parts else ""
        for step in checkpoint.list_folders(path):
            folder = path / "checkpoints" / str(step)
            checks[f"{name}checkpoint {step}"] = partial(_check_checkpoint, folder)
        config = config_io.override(public.open_run(path).config, overrides)
        checks[f"{name}run"] = partial(_check_run, config, path)
    return checks


def _check_checkpoint(folder: Path) -> str:
    count = len(checkpoint.verify(folder)["files"])
    return f"{messages.count(count, 'file')} with the right sha256"


def _check_run(config: Config, workdir: Path) -> str:
    from vidjax.evaluation import trained_runs
    from vidjax.runs import digests

    with warnings.catch_warnings(action="ignore"):  # other checks report damaged checkpoints
        run = trained_runs.find_run(config, RunFolder(workdir))
    for prefer in ("latest", "best"):
        checkpoint.warn_of_lost(workdir, prefer)
    data, manifest = public.load_data(config), run.manifest
    digests.check_data(workdir, manifest["data"], config, data)
    counts = _count_clips(data.report["splits"])
    unchecked = "ranking.txt, metrics.json, report.html and other results are not checked"
    return f"step {manifest['step']:,} and its data: {counts}; {unchecked}"


def check_data(config: Config) -> str:
    """Checks a configuration, its model and its data. Returns the numbers of clips as text.

    Raises UserError if training with the configuration would fail.
    """
    from vidjax.training import plan
    from vidjax.training.dry_run import dry_run

    config_lib.check(config)
    dry_run(config)
    data, finals = public.load_data(config), (False, True)
    systems = [
        config_io.load_system(config, x, final=y) for x in config.join.systems for y in finals
    ]
    for own in systems or [config]:
        plan.make_plan(own, data)
    return _count_clips(data.report["splits"])


def _count_clips(splits: Mapping[str, Mapping[str, int]]) -> str:
    counts = {name: messages.count(split["clips"], "clip") for name, split in splits.items()}
    return ", ".join(f"{name} {clips}" for name, clips in counts.items())
