"""Saves, finds and loads checkpoints with Orbax, and checks their sha256 digests.

The folder `checkpoints/<step>/` contains the folder `state`, which Orbax writes, and
`manifest.json`. In `state` are the arrays of a run, and lists of its people and clips as JSON, see
`members_file`. The manifest lists the sha256 of every file in `state`, and a digest of its other
entries. A checkpoint is written to `checkpoints/.partial/`, and renamed when the manifest is
complete. A checkpoint is not used if a file differs from the manifest, if `state` has other files,
or if a path contains a link.

The latest checkpoint is kept. Of all earlier checkpoints, at most two are kept: the best by MAP and
the newest that was evaluated (if none was evaluated, the newest). Other files in `checkpoints/` are
not changed.

`training.Checkpointer` of Orbax is not used, because this class renames a step before the manifest
exists. The class also needs the MAP when a step is saved, but vidjax evaluates a step after saving.
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
from jax.sharding import NamedSharding

from vidjax.core import devices
from vidjax.runs import results, schemas
from vidjax.utils import distributed, files, json_files
from vidjax.utils.errors import DiskError, Expected, UserError, warn

MANIFEST, PARTIAL = "manifest.json", ".partial"
LISTS = ("identities", "members")  # items that are JSON values, not trees of arrays


class CheckpointError(Expected):
    """No checkpoint is usable, or a checkpoint belongs to another model."""

    exit_code = 3


class OtherModelError(CheckpointError):
    """A checkpoint belongs to another model, perhaps of an earlier version of vidjax."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or has changed since it was saved."""


class Checkpoint(NamedTuple):
    """A checkpoint whose files were compared with their digests."""

    folder: Path
    manifest: dict[str, Any]  # the content of `manifest.json`


def save(workdir: Path, step: int, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Saves a checkpoint of a run, and deletes earlier checkpoints.

    The best earlier checkpoint and the newest evaluated one are kept. If `step` already has a
    checkpoint, only `info` is added to its `manifest.json`.

    Args:
      workdir: the folder of the run.
      step: the number of finished training steps.
      items: name -> tree of arrays, or, for `identities` and `members`, JSON value.
      info: name -> JSON value for `manifest.json`, such as `map`; the highest `map` is the best.
    """
    folder = workdir / "checkpoints" / str(step)
    first = distributed.is_first()
    if not any(distributed.max_over_processes(int(first and _add_info(folder, info)))):
        _save_new(folder, items, {"step": step, **info})
    if first:
        _drop_others(workdir)


def _add_info(folder: Path, info: Mapping[str, Any]) -> bool:
    """Adds the entries `info` to the `manifest.json` of a checkpoint.

    Returns False if there is no readable `manifest.json`.
    """
    try:
        files.write_manifest(folder / MANIFEST, read_manifest(folder) | dict(info))
    except CheckpointError:
        return False
    return True


def _save_new(folder: Path, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes a new checkpoint to a hidden folder, and renames the folder when it is complete.

    `items` is name -> tree of arrays or JSON value. `info` are entries for `manifest.json`. Raises
    DiskError if the checkpoint cannot be written.
    """
    from orbax.checkpoint import v1 as ocp  # this import takes half a second

    filled = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    # By default, Orbax stores each text of a list as an array: 97 s for 200,000 names.
    context, registry = ocp.Context(), ocp.handlers.local_registry(include_global_registry=False)
    for name in filled:
        handler = ocp.handlers.JsonHandler if name in LISTS else ocp.handlers.PyTreeHandler
        registry.add(handler, checkpointable_name=name)
    context.checkpointables.registry = registry
    partial = folder.parent / PARTIAL / folder.name
    _refuse_link(folder.parent)

    try:
        if distributed.is_first():
            files.remove_tree(partial.parent)  # a previous save may have been killed
            partial.mkdir(parents=True)
        distributed.barrier()
        with context:
            ocp.save_checkpointables(str(partial / "state"), filled)  # each process, its arrays
        distributed.barrier()
        if distributed.is_first():
            digests = files.sha256_folder(partial / "state")
            contents = {"arrays": _describe_arrays(items), "files": digests, **info}
            files.write_manifest(partial / MANIFEST, contents)
            _set_aside(folder)
            os.rename(partial, folder)
    except Exception as error:  # Orbax raises a dozen different errors if the disk is full
        if distributed.is_first():  # errors are ignored, because Orbax may still write there
            shutil.rmtree(partial.parent, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(reason) > 200:  # a long reason begins with the path, which the message has already
            reason = f"... {reason[-120:]}"
        raise DiskError(
            f"cannot save a checkpoint in '{folder}': {reason}\n"
            "if the disk is full, free some space, and run the same command to resume"
        ) from error


def list_folders(workdir: Path) -> dict[int, Path]:
    """Returns step -> folder of every checkpoint, even if it is damaged, in ascending order."""
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
    """Returns step -> content of `manifest.json` of each checkpoint, in ascending order.

    Checkpoints whose `manifest.json` is missing or damaged are left out.
    """
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
    """Returns the latest checkpoint of a run, or the best by MAP if `prefer` is `best`.

    Damaged checkpoints are skipped with a warning. A checkpoint without a MAP ranks below all
    others in `best`. Returns None if the run has no checkpoint. Raises CheckpointError if all are
    damaged, or if `prefer` is `best`, all manifests are readable, and none has a MAP.
    """
    paths, known = list_folders(workdir), manifests(workdir)
    if paths:
        warn_of_lost(workdir, prefer)
    if prefer == "best" and paths and find_best(known) is None and len(known) == len(paths):
        raise CheckpointError(
            f"no checkpoint in '{workdir}' has a MAP, so there is no best one\n"
            "use the latest checkpoint: --config.eval.checkpoint=latest (in vidjax export: "
            "--checkpoint=latest)"
        )

    def rank(step: int) -> tuple[float, int]:
        # A step with a damaged manifest has no MAP. It comes first, so that a warning names it.
        score = known[step].get("map", -1.0) if step in known else 2.0
        return (score if prefer == "best" else 0.0, step)

    for step in sorted(paths, key=rank, reverse=True):
        try:
            return Checkpoint(paths[step], verify(paths[step], known.get(step)))
        except DamagedError as error:
            warn(f"checkpoint {step} is not used: {error}")
    if paths:
        raise CheckpointError(
            f"every checkpoint in '{workdir / 'checkpoints'}' is damaged\n"
            "restore a copy, or train again with another --workdir=FOLDER"
        )
    return None


def explain_lost(workdir: Path) -> str:
    """Returns a message that the checkpoints of a run were lost, or "" if none was ever saved."""
    path, step = workdir / "metrics.json", results.find_last_saved(workdir)
    if not step and files.exists(path):
        step = json_files.read(path, schemas.Metrics, results.REMEDY).step or 0
    if not step:
        return ""
    return (
        f"'{workdir}' was trained to step {step}, but its checkpoints are missing\n"
        f"copy '{workdir / 'checkpoints'}' back, or train in another folder: --workdir=FOLDER\n"
        "to start again here, first move metrics.json, metrics.jsonl and timing.jsonl elsewhere"
    )


def warn_of_lost(workdir: Path, prefer: str) -> None:
    """Warns if the wanted checkpoint is missing although the logs of the run list it.

    `prefer` says which checkpoint is wanted: `latest`, or `best` by MAP.
    """
    step = results.find_last_saved(workdir) if prefer == "latest" else 0
    if prefer == "best":
        lines = results.read_lines(workdir / results.METRICS_LOG)
        scored = ((line["map"], line["step"]) for line in lines if line.get("map") is not None)
        step = max(scored, default=(0.0, 0))[1]
    if step and step not in list_folders(workdir):
        warn(
            f"'{workdir}': the {prefer} checkpoint, of step {step}, is missing\n"
            f"if you have a copy, copy it to '{workdir / 'checkpoints' / str(step)}'; until then, "
            f"another checkpoint counts as the {prefer}"
        )


def load(
    checkpoint: Checkpoint, abstract: Mapping[str, Any], layout: NamedSharding
) -> dict[str, Any]:
    """Reads the arrays of a checkpoint. Returns name -> tree of arrays, as in `abstract`.

    Args:
      checkpoint: the checkpoint, as `find` returns it.
      abstract: name -> tree of arrays or ShapeDtypeStructs with the expected shapes and dtypes.
      layout: the sharding of all arrays. The number of devices may have changed since the
        checkpoint was saved.

    Raises:
      OtherModelError: an array has another shape or dtype, or is missing.
      DamagedError: the arrays cannot be read.
    """
    from orbax.checkpoint import v1 as ocp  # this import takes half a second

    # Orbax would cast a different dtype silently, and report a different shape in many lines.
    saved = checkpoint.manifest["arrays"]
    for name, kind in _describe_arrays(abstract).items():
        if saved.get(name) != kind:
            raise OtherModelError(
                f"'{checkpoint.folder}' belongs to another model: the array {name}\n"
                f"is {saved.get(name, 'absent')} in the checkpoint and {kind} in this model\n"
                "train this model in another folder: --workdir=FOLDER"
            )
    described = devices.shapes(dict(abstract), layout)
    wanted = {name: tree for name, tree in described.items() if jax.tree.leaves(tree)}
    _check_listing(checkpoint.folder, checkpoint.manifest)  # Orbax would open unlisted files
    try:
        restored = ocp.load_checkpointables(str(checkpoint.folder / "state"), wanted)
    except Exception as error:  # the digests agree, but Orbax cannot read the files
        if isinstance(error.__cause__, KeyboardInterrupt):  # which Orbax replaces
            raise error.__cause__ from None
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DamagedError(f"cannot read '{checkpoint.folder / 'state'}': {reason}") from error
    return {name: restored.get(name, tree) for name, tree in abstract.items()}


def set_aside_later(workdir: Path, step: int) -> None:
    """Renames the checkpoints of steps later than `step`. A run that resumes saves new ones."""
    for later, folder in list_folders(workdir).items() if distributed.is_first() else ():
        if later > step:
            _set_aside(folder)


def verify(folder: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compares the files of a checkpoint with their sha256 in `manifest.json`.

    `manifest` is the content of `manifest.json` if the caller has read it. Returns this content.
    Raises DamagedError if a file is missing, damaged or not listed.
    """
    manifest = manifest or read_manifest(folder)
    _check_listing(folder, manifest)
    for name, digest in manifest["files"].items():
        file = folder / "state" / name
        with _raise_damaged(file), files.open_regular(file, below=folder.parents[1]) as opened:
            if files.hash_opened(opened) != digest:
                raise DamagedError(f"'{file}' is damaged: its sha256 differs from the manifest")
    return manifest


@contextlib.contextmanager
def _raise_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"'{path}' is missing: if you have a copy, copy it back") from error
    except OSError as error:
        raise DamagedError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _check_listing(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises DamagedError if the files in `folder/state` are not those that `manifest` lists."""
    state, listed = folder / "state", set(manifest["files"])
    with _raise_damaged(state):
        names = set(files.walk(state))
    if others := names - listed:
        raise DamagedError(
            f"'{state / min(others)}' does not belong to this checkpoint: move it elsewhere"
        )
    if missing := listed - names:
        raise DamagedError(f"'{state / min(missing)}' is missing: if you have a copy, copy it back")


def _has_only_our_files(folder: Path, manifest: Mapping[str, Any]) -> bool:
    listed = {MANIFEST, *(f"state/{name}" for name in manifest["files"])}
    try:
        others = set(files.walk(folder)) - listed
        return all(re.fullmatch(rf"\.{MANIFEST}\..+\.partial", name) for name in others)
    except UserError:  # a link or a pipe
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the `manifest.json` of a checkpoint.

    Raises DamagedError if the file is missing, damaged, or belongs to another step.
    """
    path = folder / MANIFEST
    with _raise_damaged(path):
        manifest = files.read_manifest(path, below=folder.parents[1])
        json_files.parse(path, manifest, schemas.Manifest, "this checkpoint is not used")
    if str(manifest["step"]) != folder.name:
        raise DamagedError(f"'{path}' belongs to step {manifest['step']}, not to {folder.name}")
    return manifest


def _set_aside(folder: Path) -> None:
    """Renames the folder of a step to `<step>.damaged` or `<step>.damaged-2` and so on."""
    if files.exists(folder):
        numbers = ("", *(f"-{number}" for number in range(2, 1000)))
        names = (folder.with_name(f"{folder.name}.damaged{number}") for number in numbers)
        shutil.move(folder, next(name for name in names if not files.exists(name)))


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise CheckpointError(
            f"'{folder}' is a link, not a folder, and is not opened\n"
            "replace the link by a copy of the folder that it leads to"
        )


def _describe_arrays(items: Mapping[str, Any]) -> dict[str, str]:
    """Returns path -> dtype and shape of each array, such as `['params']['b']` -> `float32[4]`."""
    arrays = {name: tree for name, tree in items.items() if name not in LISTS}
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(k): f"{x.dtype}{list(jnp.shape(x))}" for k, x in leaves}


def _drop_others(workdir: Path) -> None:
    """Deletes checkpoints that `save` does not keep, unless their folders contain other files."""
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
        # Renamed first, so that an interrupted deletion leaves no incomplete step. Containers copy
        # folders of their image, because they cannot rename them.
        shutil.move(partial.with_name(str(step)), partial / str(step))
    files.remove_tree(partial)
