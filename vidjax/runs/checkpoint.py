"""Saves, finds and loads checkpoints with Orbax, and compares them with sha256 digests.

`checkpoints/<step>/` contains Orbax's folder `state` and `manifest.json`. The manifest has the
sha256 of every file in `state` and of its other entries. A checkpoint is written to
`checkpoints/.partial/` and renamed when its manifest is complete. It is not used if a file differs
from the manifest, if `state` has an unlisted file, or if its path contains a link.

Three checkpoints are kept: the latest; the last evaluated checkpoint before the latest (or the last
checkpoint before it, if none was evaluated); and the best by MAP. Other files in `checkpoints/`
are not touched.

Orbax's `training.Checkpointer` does not fit for two reasons: it renames a step before the manifest
exists, and it needs the MAP at saving, while vidjax saves a step before it evaluates it.
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
from vidjax.runs import schemas
from vidjax.utils import files
from vidjax.utils.errors import DiskError, Expected, UserError, warn

MANIFEST, PARTIAL = "manifest.json", ".partial"


class CheckpointError(Expected):
    """No checkpoint is usable, or a checkpoint belongs to another model."""

    exit_code = 3


class DamagedError(CheckpointError):
    """The files of a checkpoint have changed since they were saved."""


class Checkpoint(NamedTuple):
    """A verified checkpoint: the folder `checkpoints/<step>` and its manifest."""

    folder: Path
    manifest: dict[str, Any]


def save(workdir: Path, step: int, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Saves a checkpoint, then deletes older checkpoints that are not kept.

    If the step already has a checkpoint, only `info` is added to its manifest.

    Args:
      items: name -> tree of arrays; `load` takes the same names.
      info: entries of the manifest, as JSON types. The best checkpoint has the highest `map`.
    """
    folder = workdir / "checkpoints" / str(step)
    first = distributed.is_first()
    if not any(distributed.max_over_processes(int(first and _add_info(folder, info)))):
        _save_new(folder, items, {"step": step, **info})
    if first:
        _drop_others(workdir)


def _add_info(folder: Path, info: Mapping[str, Any]) -> bool:
    """Adds entries to a manifest; returns False if the manifest is missing or damaged."""
    try:
        files.write_manifest(folder / MANIFEST, read_manifest(folder) | dict(info))
    except CheckpointError:
        return False
    return True


def _save_new(folder: Path, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes a checkpoint in a hidden folder, then moves it; every process writes its arrays."""
    from orbax.checkpoint import v1 as ocp  # this import takes half a second

    filled = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    partial = folder.parent / PARTIAL / folder.name
    _refuse_link(folder.parent)

    try:
        if distributed.is_first():
            files.remove_tree(partial.parent)  # a previous save may have been killed
            partial.mkdir(parents=True)
        distributed.barrier()
        ocp.save_checkpointables(str(partial / "state"), filled)
        distributed.barrier()
        if distributed.is_first():
            contents = {
                "arrays": _describe_arrays(items),
                "files": files.sha256_folder(partial / "state"),
            }
            files.write_manifest(partial / MANIFEST, {**contents, **info})
            _set_aside(folder)
            os.rename(partial, folder)
    except Exception as error:  # Orbax reports a full disk in a dozen ways
        if distributed.is_first():  # ignores errors: a thread of Orbax may still write there
            shutil.rmtree(partial.parent, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(reason) > 200:  # it begins with the path, already in the message
            reason = f"... {reason[-120:]}"
        raise DiskError(
            f"cannot save a checkpoint in '{folder}': {reason}\n"
            "if the disk is full, free some space, and run the same command to resume"
        ) from error


def list_folders(workdir: Path) -> dict[int, Path]:
    """Returns step -> folder of every checkpoint, even if damaged, in ascending order."""
    folder = workdir / "checkpoints"
    _refuse_link(folder)
    paths = {
        int(path.name): path
        for path in folder.glob("*")
        if re.fullmatch("0|[1-9][0-9]*", path.name)  # users may keep folders with other names
        and ((path / "state").exists() or (path / MANIFEST).exists())
    }
    return dict(sorted(paths.items()))


def manifests(workdir: Path) -> dict[int, dict[str, Any]]:
    """Returns step -> manifest in ascending order, without damaged manifests."""
    contents = {}
    for step, folder in list_folders(workdir).items():
        with contextlib.suppress(DamagedError):
            contents[step] = read_manifest(folder)
    return contents


def find_best(steps: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Returns the step with the highest MAP, or None if no step has a MAP.

    `steps` is the result of `manifests`. Among equal MAPs, the latest step wins.
    """
    scored = [(manifest["map"], step) for step, manifest in steps.items() if "map" in manifest]
    return max(scored)[1] if scored else None


def find(workdir: Path, prefer: str = "latest") -> Checkpoint | None:
    """Finds the latest or the best checkpoint whose files match its manifest, or returns None.

    A damaged checkpoint is skipped with a warning; its files stay.

    Args:
      prefer: `latest` or `best`. `best` prefers a high MAP; checkpoints without a MAP come last.

    Raises:
      CheckpointError: all checkpoints are damaged, or `prefer` is `best` and none has a MAP.
    """
    paths, known = list_folders(workdir), manifests(workdir)
    if prefer == "best" and paths and find_best(known) is None and len(known) == len(paths):
        raise CheckpointError(
            f"no best checkpoint in '{workdir}': no step has a MAP\n"
            "use the latest: --config.eval.checkpoint=latest"
        )

    def rank(step: int) -> tuple[float, int]:
        # The MAP of a damaged manifest is unknown. It comes first, so that a warning names it.
        score = known[step].get("map", -1.0) if step in known else 2.0
        return (score if prefer == "best" else 0.0, step)

    for step in sorted(paths, key=rank, reverse=True):
        try:
            return Checkpoint(paths[step], verify(paths[step], known.get(step)))
        except DamagedError as error:
            warn(f"checkpoint {step} is not used: {error}")
    if paths:
        raise CheckpointError(
            f"every checkpoint in '{workdir / 'checkpoints'}' is damaged: restore a copy,\n"
            "or train again with another --workdir=FOLDER"
        )
    return None


def load(checkpoint: Checkpoint, abstract: Mapping[str, Any], layout: object) -> dict[str, Any]:
    """Returns name -> tree of the arrays of a checkpoint, structured like `abstract`.

    Args:
      abstract: name -> tree of arrays or ShapeDtypeStructs; only these items are read.
      layout: the sharding of all arrays, or a tree of shardings. The number of devices may have
        changed since the checkpoint was saved.

    Raises:
      CheckpointError: the shape or dtype of an array differs between `abstract` and checkpoint.
      DamagedError: a file is missing or not listed, or Orbax cannot read the arrays.
    """
    from orbax.checkpoint import v1 as ocp  # this import takes half a second

    # Orbax would cast a different dtype silently, and report a different shape in many lines.
    saved = checkpoint.manifest["arrays"]
    for name, kind in _describe_arrays(abstract).items():
        if saved.get(name) != kind:
            raise CheckpointError(
                f"'{checkpoint.folder}' belongs to another model: array {name}\n"
                f"is {saved.get(name, 'absent')} in the checkpoint and {kind} in this model"
            )
    described = jax.tree.map(
        lambda sharding, x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding),
        jax.tree.broadcast(layout, dict(abstract)),
        dict(abstract),
    )
    wanted = {name: tree for name, tree in described.items() if jax.tree.leaves(tree)}
    _check_listing(checkpoint.folder, checkpoint.manifest)  # Orbax would open unlisted files
    try:
        restored = ocp.load_checkpointables(str(checkpoint.folder / "state"), wanted)
    except Exception as error:  # the digests agree, but Orbax cannot read the files
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DamagedError(f"cannot read '{checkpoint.folder / 'state'}': {reason}") from error
    return {name: restored.get(name, tree) for name, tree in abstract.items()}


def set_aside_later(workdir: Path, step: int) -> None:
    """Renames the checkpoints of later steps, because training will save these steps again."""
    for later, folder in list_folders(workdir).items() if distributed.is_first() else ():
        if later > step:
            _set_aside(folder)


def verify(folder: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compares a checkpoint with its manifest and returns the manifest.

    Args:
      manifest: the content of `manifest.json`. None reads the file.

    Raises:
      DamagedError: a file differs from its digest, is missing, or is not listed.
    """
    manifest = manifest or read_manifest(folder)
    _check_listing(folder, manifest)
    for name, digest in manifest["files"].items():
        file = folder / "state" / name
        with _raise_damaged(file), files.open_regular(file, below=folder.parents[1]) as opened:
            if files.hash_opened(opened) != digest:
                raise DamagedError(f"file damaged (sha256 differs): '{file}'")
    return manifest


@contextlib.contextmanager
def _raise_damaged(path: Path) -> Iterator[None]:
    """Turns an error from reading `path` into a DamagedError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"file missing: '{path}'") from error
    except OSError as error:
        raise DamagedError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _check_listing(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises DamagedError unless `state` has exactly the listed files."""
    state, listed = folder / "state", set(manifest["files"])
    with _raise_damaged(state):
        names = set(files.walk(state))
    if others := names - listed:
        raise DamagedError(
            f"'{state / min(others)}' does not belong to this checkpoint: move it elsewhere"
        )
    if missing := listed - names:
        raise DamagedError(f"file missing: '{state / min(missing)}'")


def _has_only_our_files(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Returns True if vidjax wrote every file in the folder of a checkpoint."""
    listed = {MANIFEST, *(f"state/{name}" for name in manifest["files"])}
    try:
        others = set(files.walk(folder)) - listed
        return all(re.fullmatch(rf"\.{MANIFEST}\..+\.partial", name) for name in others)
    except UserError:  # a link or a pipe
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of `checkpoints/<step>`. Raises DamagedError if its sha256 differs."""
    path = folder / MANIFEST
    with _raise_damaged(path):
        manifest = files.read_manifest(path, below=folder.parents[1])
        schemas.parse(path, manifest, schemas.Manifest, "this checkpoint is not used")
    if str(manifest["step"]) != folder.name:
        raise DamagedError(f"'{path}' belongs to step {manifest['step']}")
    return manifest


def _set_aside(folder: Path) -> None:
    """Renames a checkpoint, or another file of the same name, to `<step>.damaged`."""
    if files.exists(folder):
        numbers = ("", *(f"-{number}" for number in range(2, 1000)))
        names = (folder.with_name(f"{folder.name}.damaged{number}") for number in numbers)
        os.rename(folder, next(name for name in names if not files.exists(name)))


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise CheckpointError(
            f"'{folder}' is a link, not a folder: it is not opened\n"
            "replace the link by the folder that it leads to"
        )


def _describe_arrays(items: Mapping[str, Any]) -> dict[str, str]:
    """Returns path -> dtype and shape of each array, such as `float32[4, 2]`."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(k): f"{x.dtype}{list(jnp.shape(x))}" for k, x in leaves}


def _drop_others(workdir: Path) -> None:
    """Deletes all checkpoints except the three that this module keeps."""
    steps, partial = manifests(workdir), workdir / "checkpoints" / PARTIAL
    files.remove_tree(partial)
    latest = max(steps)
    others = steps.keys() - {latest}
    evaluated = {step for step in others if steps[step].get("evaluated")}
    before = max(evaluated or others, default=None)
    for step in others - {before, find_best(steps)}:
        if not _has_only_our_files(partial.with_name(str(step)), steps[step]):
            continue
        partial.mkdir(exist_ok=True)
        # Renames it first: if the deletion is interrupted, no incomplete step remains.
        os.rename(partial.with_name(str(step)), partial / str(step))
    files.remove_tree(partial)
