"""The configuration of a run: its file, and which changes are allowed and kept when it resumes.

`changes.jsonl` has a line per resumption: {step: int, changes: {field: [old value, new value]}}.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax import config_io, files
from vidjax.config import CHANGEABLE, MOVABLE, Config, within
from vidjax.errors import UserError
from vidjax.run import formats
from vidjax.run import results as results_lib

FILE = "changes.jsonl"
# Fields and groups that may change after the last step: the run is evaluated again.
AFTERWARDS = (*MOVABLE, "eval")

Changes = dict[str, tuple[Any, Any]]  # field -> (before, now)


def write_config(workdir: Path, config: Config) -> None:
    """Writes `config.json` with absolute paths and no `data.cache_dir`, for `load_workdir`."""
    config = absolute(config)
    config.data.cache_dir = None
    files.write_text(workdir / "config.json", config_io.to_json(config))


def absolute(config: Config) -> Config:
    """Returns a copy of a configuration whose data, cache and weights are absolute paths."""
    config = copy.deepcopy(config)
    for field in ("dir", "cache_dir", "weights"):
        if config.data[field]:
            config.data[field] = str(files.absolute(config.data[field]))
    return config


def changes(workdir: Path, old: Config, new: Config) -> Changes:
    """Returns the fields that change on resuming; ValueError unless they may (`resume.allow`)."""
    allowed = tuple(new.resume.allow)
    changed = config_lib.differences(absolute(old), absolute(new))
    for name in ("resume.allow", "data.cache_dir"):  # no run keeps them
        changed.pop(name, None)
    refused = {
        name: pair
        for name, pair in _without_recorded(workdir, changed).items()
        if not within(name, (*MOVABLE, *allowed))
    }
    if refused:
        hint = "use another workdir, or the configuration of that run"
        if all(within(name, CHANGEABLE) for name in refused) and not _is_over(workdir, refused):
            hint = (
                f"to resume with the change: --config.resume.allow={','.join((*allowed, *refused))}"
            )
        raise UserError(
            f"'{workdir}' holds a run with another configuration\n{describe(refused)}\n{hint}"
        )
    return changed


def refuse_relabelling(workdir: Path, changed: Changes) -> None:
    """Raises ValueError if fields that shape the training change after its last step.

    The weights would stay, but the run's files would say that the new values made them.
    """
    trained = {name: pair for name, pair in changed.items() if not within(name, AFTERWARDS)}
    if trained:
        raise UserError(
            f"'{workdir}' is trained to its last step: nothing can change any more\n"
            f"{describe(trained)}\nuse another workdir, or train on: --config.num_epochs=N"
        )


def _is_over(workdir: Path, changed: Changes) -> bool:
    """Returns True if a run is finished, no more epochs are asked for, and its training changes."""
    finished = results_lib.read_metrics(workdir).get("finished")
    trained = any(not within(name, AFTERWARDS) for name in changed)
    return bool(finished) and trained and "num_epochs" not in changed


def spoilt(workdir: Path, saved: Mapping[str, Any]) -> Changes:
    """Returns how `config.json` differs from `saved`, but for movable and recorded fields."""
    old = config_io.from_json(json.dumps(saved))
    changed = config_lib.differences(old, config_io.load_workdir(workdir))
    changed = _without_recorded(workdir, changed)
    ignored = (*MOVABLE, "resume.allow")
    return {name: pair for name, pair in changed.items() if not within(name, ignored)}


def record(workdir: Path, step: int, changed: Changes) -> None:
    """Warns of changes and adds them to `changes.jsonl`."""
    if not changed:
        return
    warnings.warn(f"values changed from step {step} on: {describe(changed)}", stacklevel=2)
    line = json.dumps({"step": step, "changes": changed}) + "\n"
    before = _read(workdir).decode()
    if not before.endswith(line):  # else a process recorded it and stopped before its first step
        files.write_text(workdir / FILE, before + line)


def _read(workdir: Path) -> bytes:
    path = workdir / FILE
    return files.read_bytes(path, files.LOG_BYTES) if files.exists(path) else b""


def describe(changed: Changes) -> str:
    """Returns changes as one line of at most 300 characters."""
    text = ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
    return text[:300]


def _without_recorded(workdir: Path, changed: Changes) -> Changes:
    """Returns the changes that `changes.jsonl` does not record yet."""
    path = workdir / FILE
    recorded: dict[str, list[Any]] = {}
    for number, line in enumerate(_read(workdir).splitlines(), start=1):
        try:
            value: Any = files.parse_line(line)
        except ValueError as error:
            raise UserError(
                f"'{path}' is damaged: line {number}: {error}\ndelete that line"
            ) from error
        formats.parse(path, value, formats.Changes, f"delete line {number}")
        recorded |= value["changes"]
    now = {name: json.loads(json.dumps(pair[1])) for name, pair in changed.items()}
    return {
        name: pair
        for name, pair in changed.items()
        if name not in recorded or recorded[name][1] != now[name]
    }
