"""Caches compiled programs on the disk, and makes results on a GPU reproducible bit for bit."""

import contextlib
import hashlib
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from vidjax.utils.errors import warn
from vidjax.utils.files import find_foreign_folder


def cache_programs(folder: Path) -> None:
    """Makes jax store compiled programs below `folder`, unless jax already has a cache folder.

    If another user may change `folder` or a folder above it, prints a warning and caches nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    programs = folder / "programs"
    try:
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # the code that stores clips in `folder` reports the error
    if programs.is_symlink():
        return  # links in the cache are not followed
    if foreign := find_foreign_folder(programs):  # jax runs the machine code in its cache
        warn(
            f"compiled programs are not cached: another user may change '{foreign}'\n"
            f"if it is your folder, run 'chmod go-w {foreign}'; otherwise set VIDJAX_CACHE=FOLDER\n"
            "to choose a folder without this check, set JAX_COMPILATION_CACHE_DIR=FOLDER"
        )
        return
    # Machines with different processors may share the cache.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Feat")))
    except (OSError, StopIteration):
        processor = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {processor}".encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(programs / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.01)


@contextlib.contextmanager
def disable_program_cache() -> Iterator[None]:
    """Disables the cache of compiled programs in a `with` block.

    Use it for programs that contain all weights of a net, because their files would be large.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def make_deterministic() -> None:
    """Sets a flag of XLA, so that a repeated run on a GPU gives the same results bit for bit.

    If jax already uses the GPU, the flag has no effect, and a warning is printed.
    """
    known, flag = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_deterministic_ops=true"
    if flag in known.split():
        return
    os.environ["XLA_FLAGS"] = f"{known} {flag}".strip()
    # A private function. If a later jax lacks it, no warning is printed.
    bridge = sys.modules.get("jax._src.xla_bridge")
    is_open = getattr(bridge, "backends_are_initialized", lambda: False)
    if is_open() and jax.default_backend() == "gpu":
        warn(
            "config.deterministic=True has no effect: jax already uses the GPU\n"
            f"before Python starts, set XLA_FLAGS={flag}"
        )
