"""What may change in the configuration of a run when it resumes."""

from pathlib import Path

from vidjax import config as config_lib
from vidjax.config import Config
from vidjax.errors import UserError


def differences(old: Config, new: Config) -> str:
    """Describes in a line of at most 300 characters how a run may not change; "" if it may.

    MOVABLE fields may change, since they change no result. `num_epochs` may grow.
    """
    changed = config_lib.differences(old, new)
    if old.num_epochs <= new.num_epochs:
        changed.pop("num_epochs", None)
    kept = {name: pair for name, pair in changed.items() if name not in config_lib.MOVABLE}
    return ", ".join(f"{name}: {before} -> {now}" for name, (before, now) in kept.items())[:300]


def check(workdir: Path, old: Config, new: Config) -> None:
    """Raises ValueError if the run in a folder, trained with `old`, may not go on with `new`."""
    if changed := differences(old, new):
        raise UserError(
            f"'{workdir}' holds a run with another configuration\n{changed}\n"
            "use another workdir, or the configuration of that run; num_epochs may grow"
        )
