"""Checkpoints: saved, found and loaded with Orbax, and checked against sha256 digests.

`checkpoints/<step>/` has Orbax's folder `state`, and `manifest.json` with the sha256 of every file
in `state` and of its own other entries. The folder is written in `checkpoints/.partial/` and gets
its name after its manifest is written. A checkpoint is never used if a file differs from the
manifest, if `state` has another file, or if its path has a link. Three are kept: the latest; the
last evaluated one before it, or else the last one; and the best by MAP. Other files in
`checkpoints/` stay.

Orbax's `training.Checkpointer` does not fit: it names a step before there is a manifest, and it
needs the MAP when it saves, while a step is saved here before it is evaluated.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vidjax.core import distributed
from vidjax.utils import files
from vidjax.utils.errors import (DiskError, Expected, UserError, warn)
from vidjax.runs import schemas

MANIFEST, PARTIAL = "manifest.json", ".partial"


class CheckpointError(Expected):
    """There is no usable checkpoint, or it belongs to another model."""

    exit_code = 3


class DamagedError(CheckpointError):
    """The files of a checkpoint differ from those that were saved."""


class Checkpoint(NamedTuple):
    """The folder `checkpoints/<step>`, whose files match their digests, and its manifest."""

    folder: Path
    manifest: dict[str, Any]


def save(workdir: Path, step: int, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Saves a checkpoint, then drops those that need not be kept.

    If the step has a checkpoint already, its arrays stay and `info` is added to its manifest.

    Args:
      items: name -> tree of arrays; `load` takes the same names.
      info: entries of the manifest, as JSON types. Its `map` decides which checkpoint is best.
    """
    folder = workdir / "checkpoints" / str(step)
    first = distributed.is_first()
    if not any(distributed.largest(int(first and _add_info(folder, info)))):
        _save_new(folder, items, {"step": step, **info})
    if first:
        _drop_others(workdir)


def _add_info(folder: Path, info: Mapping[str, Any]) -> bool:
    """Adds entries to a manifest; returns False if there is no undamaged one."""
    try:
        files.write_manifest(folder / MANIFEST, read_manifest(folder) | dict(info))
    except CheckpointError:
        return False
    return True


def _save_new(folder: Path, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes a checkpoint under a hidden name, then renames it; every process writes its arrays."""
    from orbax.checkpoint import v1 as ocp  # half a second, for those alone who need it

    filled = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    partial = folder.parent / PARTIAL / folder.name
    _refuse_link(folder.parent)

    try:
        if distributed.is_first():
            files.remove_tree(partial.parent)  # left by a save that was cut short
            partial.mkdir(parents=True)
        distributed.barrier()
        ocp.save_checkpointables(str(partial / "state"), filled)
        distributed.barrier()
        if distributed.is_first():
            contents = {"arrays": _arrays(items), "files": files.sha256_folder(partial / "state")}
            files.write_manifest(partial / MANIFEST, {**contents, **info})
            _set_aside(folder)
            os.rename(partial, folder)
    except Exception as error:  # Orbax reports a full disk in a dozen ways
        if distributed.is_first():  # a thread of Orbax may still write there
            shutil.rmtree(partial.parent, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(reason) > 200:  # it begins with the path, which is named below
            reason = f"... {reason[-120:]}"
        raise DiskError(
            f"cannot save a checkpoint in '{folder}': {reason}\n"
            "earlier checkpoints are intact; is the disk full?"
        ) from error


def folders(workdir: Path) -> dict[int, Path]:
    """Returns step -> folder of every checkpoint, damaged ones included, in ascending order."""
    folder = workdir / "checkpoints"
    _refuse_link(folder)
    found = {
        int(path.name): path
        for path in folder.glob("*")
        if re.fullmatch("0|[1-9][0-9]*", path.name)  # else not a checkpoint: users may keep folders
        and ((path / "state").exists() or (path / MANIFEST).exists())
    }
    return dict(sorted(found.items()))


def manifests(workdir: Path) -> dict[int, dict[str, Any]]:
    """Returns step -> manifest of all checkpoints with an undamaged one, in ascending order."""
    found = {}
    for step, folder in folders(workdir).items():
        with contextlib.suppress(DamagedError):
            found[step] = read_manifest(folder)
    return found


def best(steps: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Returns the step of `manifests` with the highest MAP, the later of equal ones, or None."""
    scored = [(manifest["map"], step) for step, manifest in steps.items() if "map" in manifest]
    return max(scored)[1] if scored else None


def find(workdir: Path, prefer: str = "latest") -> Checkpoint | None:
    """Returns the most preferred checkpoint that matches its digests; None if none was ever saved.

    `prefer` is `latest`; or `best`, the highest MAP first and checkpoints without MAP last. A
    damaged checkpoint is skipped with a warning, and stays.

    Raises:
      CheckpointError: all checkpoints are damaged, or `best` was asked for and none has a MAP.
    """
    paths, known = folders(workdir), manifests(workdir)
    if prefer == "best" and paths and best(known) is None and len(known) == len(paths):
        raise CheckpointError(
            f"no best checkpoint in '{workdir}': no step has a MAP\n"
            "use the latest: --config.eval.checkpoint=latest"
        )

    def rank(step: int) -> tuple[float, int]:
        # The MAP of a damaged manifest is unknown: it comes first, for the sake of the warning.
        score = known[step].get("map", -1.0) if step in known else 2.0
        return (score if prefer == "best" else 0.0, step)

    for step in sorted(paths, key=rank, reverse=True):
        try:
            return Checkpoint(paths[step], verify(paths[step], known.get(step)))
        except DamagedError as error:
            warn(f"checkpoint {step} is not used: {error}")
    if paths:
        raise CheckpointError(
            f"no good checkpoint in '{workdir / 'checkpoints'}': put back a copy of one,\n"
            "or train anew with another workdir"
        )
    return None


def load(checkpoint: Checkpoint, abstract: Mapping[str, Any], layout: object) -> dict[str, Any]:
    """Returns name -> tree of the arrays of a checkpoint, structured like `abstract`.

    Args:
      abstract: name -> tree of arrays or ShapeDtypeStructs; only these items are read.
      layout: the sharding of all arrays, or a tree of shardings; the number of devices may differ
        from that at saving.

    Raises:
      CheckpointError: an array has another shape or dtype than the checkpoint's.
      DamagedError: a file is missing or not listed, or Orbax cannot read the arrays.
    """
    from orbax.checkpoint import v1 as ocp  # half a second, for those alone who need it

    # Orbax casts another dtype silently and reports another shape in many lines.
    saved = checkpoint.manifest["arrays"]
    for name, kind in _arrays(abstract).items():
        if saved.get(name) != kind:
            raise CheckpointError(
                f"'{checkpoint.folder}' belongs to another model: {name}\n"
                f"is {saved.get(name, 'absent')} there and {kind} here"
            )
    described = jax.tree.map(
        lambda sharding, x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding),
        jax.tree.broadcast(layout, dict(abstract)),
        dict(abstract),
    )
    wanted = {name: tree for name, tree in described.items() if jax.tree.leaves(tree)}
    _check_listing(checkpoint.folder, checkpoint.manifest)  # Orbax opens what it finds
    try:
        restored = ocp.load_checkpointables(str(checkpoint.folder / "state"), wanted)
    except Exception as error:  # the digests agree, and Orbax cannot read what they are of
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DamagedError(f"cannot read '{checkpoint.folder / 'state'}': {reason}") from error
    return {name: restored.get(name, tree) for name, tree in abstract.items()}


def set_aside_later(workdir: Path, step: int) -> None:
    """Renames checkpoints of steps after `step`, which training will save again."""
    for later, folder in folders(workdir).items() if distributed.is_first() else ():
        if later > step:
            _set_aside(folder)


def verify(folder: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns a checkpoint's manifest, read unless given; DamagedError if any file differs."""
    manifest = manifest or read_manifest(folder)
    _check_listing(folder, manifest)
    for name, digest in manifest["files"].items():
        file = folder / "state" / name
        with _damaged(file), files.open_regular(file, below=folder.parents[1]) as opened:
            if files.sha256_opened(opened) != digest:
                raise DamagedError(f"file damaged (sha256 differs): '{file}'")
    return manifest


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"file missing: '{path}'") from error
    except OSError as error:
        raise DamagedError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _check_listing(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises DamagedError unless `state` has the listed files and no others."""
    state, listed = folder / "state", set(manifest["files"])
    with _damaged(state):
        found = set(files.walk(state))
    if others := found - listed:
        raise DamagedError(f"'{state / min(others)}' is not of this checkpoint: move it elsewhere")
    if missing := listed - found:
        raise DamagedError(f"file missing: '{state / min(missing)}'")


def _is_ours(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Returns True if a checkpoint has no other files than those that vidjax wrote."""
    listed = {MANIFEST, *(f"state/{name}" for name in manifest["files"])}
    try:
        others = set(files.walk(folder)) - listed
        return all(re.fullmatch(rf"\.{MANIFEST}\..+\.partial", name) for name in others)
    except UserError:  # a link, or a pipe
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of `checkpoints/<step>`; DamagedError if its own sha256 differs."""
    path = folder / MANIFEST
    with _damaged(path):
        manifest = files.read_manifest(path, below=folder.parents[1])
        schemas.parse(path, manifest, schemas.Manifest, "this checkpoint is not used")
    if str(manifest["step"]) != folder.name:
        raise DamagedError(f"'{path}' belongs to step {manifest['step']}")
    return manifest


def _set_aside(folder: Path) -> None:
    """Renames a checkpoint, or whatever has its name, to `<step>.damaged`."""
    if files.exists(folder):
        numbers = ("", *(f"-{number}" for number in range(2, 1000)))
        names = (folder.with_name(f"{folder.name}.damaged{number}") for number in numbers)
        os.rename(folder, next(name for name in names if not files.exists(name)))


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise CheckpointError(
            f"'{folder}' is a link, not a folder: it is not opened\n"
            "put the folder that it leads to in its place"
        )


def _arrays(items: Mapping[str, Any]) -> dict[str, str]:
    """Returns path -> dtype and shape of every array, such as `float32[4, 2]`."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(k): f"{x.dtype}{list(jnp.shape(x))}" for k, x in leaves}


def _drop_others(workdir: Path) -> None:
    """Keeps the latest checkpoint, the one evaluated (else made) last before it, and the best."""
    steps, partial = manifests(workdir), workdir / "checkpoints" / PARTIAL
    files.remove_tree(partial)
    latest = max(steps)
    others = steps.keys() - {latest}
    evaluated = {step for step in others if steps[step].get("evaluated")}
    before = max(evaluated or others, default=None)
    for step in others - {before, best(steps)}:
        if not _is_ours(partial.with_name(str(step)), steps[step]):
            continue
        partial.mkdir(exist_ok=True)
        os.rename(partial.with_name(str(step)), partial / str(step))  # half a folder is no step
    files.remove_tree(partial)
