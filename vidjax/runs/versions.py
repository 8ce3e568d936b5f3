"""Collects the versions of packages and the git commit, which results and exports record."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

from vidjax.utils.version import VERSION


def collect_versions() -> dict[str, str]:
    """Returns name -> version of vidjax, Python and packages, and the device and git commit.

    The entry `device` is a text such as `1 x cpu`. Outside a git checkout, `commit` is missing.
    """
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {"vidjax": VERSION}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    versions |= {"python": platform.python_version(), "device": device}
    commit = _read_commit(Path(__file__).parents[2])
    return versions | ({"commit": commit} if commit else {})


def _read_commit(checkout: Path) -> str | None:
    """Returns the git commit of a folder, or None if the folder is no git checkout.

    If files of the checkout are changed, the commit ends in `-dirty`.
    """
    if not (checkout / ".git").exists():
        return None
    # `git describe --dirty` would lock the index, and the user may commit at this moment.
    words = ("git", "--no-optional-locks", "-C", str(checkout), "status", "--untracked-files=no")
    words += ("--porcelain=v2", "--branch")
    try:
        status = subprocess.run(words, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    head, *lines = status.stdout.splitlines() or [""]
    commit = head.removeprefix("# branch.oid ")[:9]
    changed = any(not line.startswith("#") for line in lines)
    return f"{commit}-dirty" if changed and commit else commit or None
