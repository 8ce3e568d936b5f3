"""Checks the installation for `vidjax check`: packages, devices, and limits of child processes.

A check is a function that returns a summary as text. If a package is missing, or this machine does
not support a part of vidjax, the check raises AbsentError.
"""

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable
from functools import partial

from vidjax.utils import confinement
from vidjax.utils.errors import describe_system_error
from vidjax.utils.version import VERSION

# Subject of a check -> the extra of `pip install 'vidjax[EXTRA]'` with its packages.
EXTRAS = {
    "runs": "rank", "training": "train", "films": "video", "nets": "convert", "server": "serve",
    "parquet": "parquet",
}  # fmt: skip
# Package -> its module, if it has another name.
MODULES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn", "pillow": "PIL"}


class AbsentError(Exception):
    """A part of vidjax is not installed, or this machine does not support it."""


def list_checks() -> dict[str, Callable[[], str]]:
    """Returns the checks of the installation: name of a part of vidjax, such as `films` -> check.

    A check is a function that returns a summary, or raises AbsentError if the part is not usable.
    """
    parts = {name: partial(check_packages, extra) for name, extra in EXTRAS.items()}
    return {"environment": check_environment, **parts, "files of strangers": _check_confinement}


def check_environment() -> str:
    """Returns the versions of vidjax, Python and numpy."""
    numpy = importlib.metadata.version("numpy")
    return f"vidjax {VERSION}, python {platform.python_version()}, numpy {numpy}"


def check_packages(extra: str) -> str:
    """Returns the versions of the packages that `pip install 'vidjax[EXTRA]'` installs, as text.

    For the extra `rank`, also checks that jax can use a device. Raises AbsentError if a package is
    missing.
    """
    modules = list_packages(extra)
    if lost := [name for name, module in modules.items() if not importlib.util.find_spec(module)]:
        raise AbsentError(f"not installed ({', '.join(lost)}): pip install 'vidjax[{extra}]'")
    versions = dict.fromkeys(modules, "of another package")  # as `onnxruntime` of `onnxruntime-gpu`
    for name in modules:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions |= _check_jax() if extra == "rank" else {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def list_packages(extra: str) -> dict[str, str]:
    """Returns the packages that `pip install 'vidjax[EXTRA]'` adds, package -> module.

    The list is read from the metadata that pip stored when it installed vidjax. If vidjax was not
    installed by pip, raises AbsentError.
    """
    try:
        required = importlib.metadata.requires("vidjax") or []
    except importlib.metadata.PackageNotFoundError:
        raise AbsentError(
            "vidjax is not installed, so its dependencies are unknown: in a checkout, pip install ."
        ) from None
    of_extra = re.compile(rf"([\w-]+)[^\w\[-].*extra == ['\"]{extra}['\"]")
    names = [found[1] for line in required if (found := of_extra.match(line))]
    return {name: MODULES.get(name, name.replace("-", "_")) for name in names}


def _check_jax() -> dict[str, str]:
    """Returns {"device": the device of jax}, and in a git checkout also "commit": the git commit.

    Raises AbsentError if jax does not support the processor of this machine.
    """
    try:
        from vidjax.core import devices
        from vidjax.runs.versions import collect_versions
    except RuntimeError as error:
        if not (text := describe_system_error(error)):
            raise
        text += "\nfilms, galleries of nets and the server work without jax"
        raise AbsentError(text) from None
    devices.make_mesh()  # if an accelerator cannot be used, the error gives the reason
    versions = collect_versions()
    return {name: versions[name] for name in ("device", "commit") if name in versions}


def _check_confinement() -> str:
    """Returns a text about the limits of processes that read untrusted files.

    If this system cannot enforce all limits, raises AbsentError.
    """
    if gaps := confinement.list_gaps():
        raise AbsentError(
            f"a process that reads untrusted files could {', '.join(gaps)}\n"
            "to forbid it, use Linux 5.13 or later with Landlock, on x86-64 or 64-bit ARM"
        )
    return "a process that reads them uses no other files, connections or programs"
