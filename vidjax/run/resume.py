"""What may differ when a run goes on, and the record of what did: `changes.jsonl`."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax.config import Config
from vidjax.run import workdir as workdir_lib

FILE = "changes.jsonl"
# These say where things lie and when they are saved, not what is computed.
MOVABLE = (
    "checkpoint_every_seconds",
    "data.dir",
    "data.cache_dir",
    "eval.checkpoint",
    "eval.report",
)
# These shape neither the state nor the order of clips: `config.resume.allow` may name them.
CHANGEABLE = ("optim", "loss", "mixup", "num_epochs", "log_every_steps", "eval")

Changes = dict[str, tuple[Any, Any]]  # field -> (before, now)


def changes(workdir: Path, old: Config, new: Config) -> Changes:
    """Returns the fields in which a run is to go on otherwise than it began.

    Args:
      workdir: the run's folder.
      old: the configuration so far.
      new: that of now.

    Raises:
      ValueError: fields differ that may not, or that `new.resume.allow` does not name.
    """
    allowed = tuple(new.resume.allow)
    for name in allowed:
        if not _within(name, CHANGEABLE):
            raise ValueError(
                f"config.resume.allow: '{name}' may not change when a run goes on\n"
                f"what may: {', '.join(CHANGEABLE)}"
            )
    found = config_lib.differences(old, new)
    found.pop("resume.allow", None)
    refused = {
        name: pair
        for name, pair in _without_recorded(workdir, found).items()
        if not _within(name, (*MOVABLE, *allowed))
    }
    if refused:
        hint = "use another --workdir, or the configuration of that run"
        if all(_within(name, CHANGEABLE) for name in refused):
            hint = f"to go on all the same: --config.resume.allow={','.join((*allowed, *refused))}"
        raise ValueError(
            f"--workdir: '{workdir}' holds a run of another configuration\n"
            f"{describe(refused)}\n{hint}"
        )
    return found


def spoilt(workdir: Path, saved: Mapping[str, Any]) -> Changes:
    """Returns where `config.json` differs from what a checkpoint was trained with, unrecorded.

    Args:
      workdir: the run's folder.
      saved: the configuration that the checkpoint keeps.
    """
    old = config_lib.from_json(json.dumps(saved))
    found = config_lib.differences(old, config_lib.load_workdir(workdir))
    found = _without_recorded(workdir, found)
    ignored = (*MOVABLE, "resume.allow")
    return {name: pair for name, pair in found.items() if not _within(name, ignored)}


def record(workdir: Path, step: int, found: Changes) -> None:
    """Warns of changes and adds them to `changes.jsonl`."""
    if not found:
        return
    warnings.warn(f"from step {step} on with other values: {describe(found)}", stacklevel=2)
    line = json.dumps({"step": step, "changes": found}) + "\n"
    path = workdir / FILE
    before = path.read_text() if path.exists() else ""
    if not before.endswith(line):  # else a process recorded it and stopped at once
        workdir_lib.write_text(path, before + line)


def describe(found: Changes) -> str:
    """Returns changes in one line of at most 300 characters."""
    text = ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in found.items())
    return text[:300]


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _without_recorded(workdir: Path, found: Changes) -> Changes:
    path = workdir / FILE
    recorded: dict[str, list[Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        recorded |= json.loads(line)["changes"]
    now = {name: json.loads(json.dumps(pair[1])) for name, pair in found.items()}
    return {
        name: pair
        for name, pair in found.items()
        if name not in recorded or recorded[name][1] != now[name]
    }
