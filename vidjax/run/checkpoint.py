"""Checkpoints: saved, found and loaded with Orbax, and checked against sha256 digests.

`checkpoints/<step>/` has Orbax's folder `state`, and `manifest.json` with the sha256 of every file
in `state` and of its own other entries. The folder gets its name once it is complete. A checkpoint
is never used if a file differs from the manifest, if `state` has another file (but `.DS_Store` of
macOS), or if its path has a link. Three are kept: the latest; the last evaluated one before it, or
else the last one; and the best by MAP. Other files in `checkpoints/` stay.
"""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vidjax import files
from vidjax.cluster import processes
from vidjax.errors import DiskError, Expected, UserError
from vidjax.run import formats

MANIFEST = "manifest.json"
FINDER = ".DS_Store"  # which macOS adds where somebody looks; Orbax does not open it
OWN = re.compile(r"manifest\.json|\.manifest\.json\..*\.partial")


class CheckpointError(Expected):
    """There is no usable checkpoint, or it belongs to another model."""

    exit_code = 3


class DamagedError(CheckpointError):
    """The files of a checkpoint differ from those that were saved."""


class OtherModelError(CheckpointError):
    """The arrays of a checkpoint differ from those of the model in name, shape or dtype."""


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
    if not processes.run_on_first(lambda: _add_info(folder, info)):
        _save_new(folder, items, {"step": step, **info})
    if processes.is_first():
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
    partial = folder.parent / ".partial" / folder.name
    _refuse_link(folder.parent)

    def prepare() -> None:
        files.remove_tree(partial.parent)  # left by a save that was cut short
        partial.mkdir(parents=True)

    def commit() -> None:
        contents = {"arrays": _arrays(items), "files": files.sha256_folder(partial / "state")}
        files.write_manifest(partial / MANIFEST, {**contents, **info})
        set_aside(folder)
        os.rename(partial, folder)

    try:
        processes.run_on_first(prepare)
        ocp.save_checkpointables(str(partial / "state"), filled)
        processes.barrier()
        processes.run_on_first(commit)
    except Exception as error:  # Orbax reports a full disk in a dozen ways
        if processes.is_first():  # a thread of Orbax may still write there
            shutil.rmtree(partial.parent, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(reason) > 200:  # it begins with the path, which is named below
            reason = f"... {reason[-120:]}"
        raise DiskError(
            f"cannot save a checkpoint in '{folder}': {reason}\n"
            "earlier checkpoints are intact; is the disk full?"
        ) from error


def manifests(workdir: Path) -> dict[int, dict[str, Any]]:
    """Returns step -> manifest of all checkpoints with an undamaged one, in ascending order."""
    return {step: value for step, value in survey(workdir).items() if isinstance(value, dict)}


def survey(workdir: Path) -> dict[int, dict[str, Any] | DamagedError]:
    """Returns step -> manifest, or the error of reading that; reads no other files."""
    by_step: dict[int, dict[str, Any] | DamagedError] = {}
    for step, folder in sorted(_folders(workdir).items()):
        try:
            by_step[step] = read_manifest(folder)
        except DamagedError as error:
            by_step[step] = error
    return by_step


RANKED_BY = ("split", "scores", "temperature", "top_classes", "reduce")  # of `config.eval`


def ranked_by(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the settings of an evaluation; MAPs of others cannot be compared."""
    evaluation = config.get("eval", {})
    return tuple(evaluation.get(name) for name in RANKED_BY)


def _maps(steps: Mapping[int, Any]) -> dict[int, float]:
    """Returns step -> MAP, of those of `manifests` that are ranked as the latest of them."""
    scored = {step: m for step, m in steps.items() if isinstance(m, dict) and "map" in m}
    if not scored:
        return {}
    latest = ranked_by(scored[max(scored)].get("config", {}))
    alike = (step for step, m in scored.items() if ranked_by(m.get("config", {})) == latest)
    return {step: scored[step]["map"] for step in alike}


def best(steps: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Returns the step of `manifests` with the highest MAP, the later of equal ones, or None.

    Only steps count that were ranked by the split and the scores of the latest of them.
    """
    scored = [(value, step) for step, value in _maps(steps).items()]
    return max(scored)[1] if scored else None


def find(workdir: Path, prefer: str = "latest") -> Checkpoint | None:
    """Returns the most preferred checkpoint that matches its digests; None if none was ever saved.

    `prefer` is `latest`; or `best`, the highest MAP first and checkpoints without MAP last. A
    damaged checkpoint is skipped with a warning, and stays.

    Raises:
      CheckpointError: all checkpoints are damaged, or `best` was asked for and none has a MAP.
    """
    if prefer not in ("latest", "best"):
        raise UserError(f"config.eval.checkpoint='{prefer}': must be latest or best")
    steps = survey(workdir) if processes.is_first() else {}
    step = processes.run_on_first(lambda: _find_step(workdir, prefer, steps))
    if step is None:
        return None
    folder, manifest = workdir / "checkpoints" / str(step), steps.get(step)
    return Checkpoint(folder, manifest if isinstance(manifest, dict) else read_manifest(folder))


def _find_step(
    workdir: Path, prefer: str, steps: Mapping[int, dict[str, Any] | DamagedError]
) -> int | None:
    scored = _maps(steps)
    damaged = [step for step, manifest in steps.items() if not isinstance(manifest, dict)]
    if prefer == "best" and steps and not scored and not damaged:
        raise CheckpointError(
            f"no best checkpoint in '{workdir}': no step has a MAP\n"
            "use the latest: --config.eval.checkpoint=latest"
        )
    order = sorted(steps, reverse=True)
    if prefer == "best":  # a damaged manifest comes first: its MAP is unknown, and a warning is due
        order = sorted(order, key=lambda s: (s in damaged, scored.get(s, -1.0), s), reverse=True)
    for step in order:
        try:
            verify(workdir / "checkpoints" / str(step), steps[step])
            return step
        except DamagedError as error:
            warnings.warn(f"checkpoint {step} is not used: {error}", stacklevel=2)
    if steps:
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
      OtherModelError: an array has another shape or dtype than the checkpoint's.
      DamagedError: a file is missing or not listed, or Orbax cannot read the arrays.
    """
    from orbax.checkpoint import v1 as ocp  # half a second, for those alone who need it

    _check_shapes(checkpoint, abstract)
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
    for later, folder in _folders(workdir).items() if processes.is_first() else ():
        if later > step:
            set_aside(folder)


def verify(folder: Path, manifest: dict[str, Any] | DamagedError | None = None) -> dict[str, Any]:
    """Returns a checkpoint's manifest, read unless given; DamagedError if any file differs."""
    if isinstance(manifest, DamagedError):
        raise manifest
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
    """Raises DamagedError unless `state` has just the listed files, no larger than its arrays."""
    state, left = folder / "state", set(manifest["files"])
    room = limit = formats.most_bytes(manifest["arrays"])
    with _damaged(state):
        for name, size in files.walk(state, below=folder.parents[1]):
            room -= size
            if Path(name).name == FINDER and room >= 0:
                continue
            if name not in left:
                raise UserError(f"'{state / name}' is not of this checkpoint: move it elsewhere")
            if room < 0:
                raise UserError(
                    f"'{state}' is larger than the {limit:,} bytes that its arrays can take\n"
                    "put back an unchanged copy of this folder"
                )
            left.remove(name)
    if left:
        raise DamagedError(f"file missing: '{state / min(left)}'")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of `checkpoints/<step>`; DamagedError if its own sha256 differs."""
    if not _is_step(folder):
        raise CheckpointError(f"no checkpoint at '{folder}'")
    path = folder / MANIFEST
    with _damaged(path):
        manifest = files.read_manifest(path, below=folder.parents[1])
    if str(manifest.get("step")) != folder.name:
        raise DamagedError(f"'{path}' belongs to step {str(manifest.get('step'))[:40]}")
    with _damaged(path):
        formats.parse(path, manifest, formats.Manifest, "this checkpoint is not used")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
        raise DamagedError(f"'{path}' is damaged: it names a file outside of its folder")
    return manifest


def set_aside(folder: Path) -> None:
    """Renames a checkpoint, or whatever has its name, to `<step>.damaged`."""
    if folder.exists() or folder.is_symlink():
        os.rename(folder, _free_name(folder, "damaged"))


def _is_step(folder: Path) -> bool:
    if not re.fullmatch("0|[1-9][0-9]*", folder.name) or not folder.is_dir():
        return False  # not a checkpoint: the user may keep folders here
    return (folder / "state").exists() or (folder / MANIFEST).exists()


def _folders(workdir: Path) -> dict[int, Path]:
    """Returns step -> folder of every checkpoint, damaged ones included."""
    folder = workdir / "checkpoints"
    _refuse_link(folder)
    return {int(inner.name): inner for inner in folder.glob("*") if _is_step(inner)}


def _refuse_link(folder: Path) -> None:
    try:
        with files.open_folder(folder, folder.parent):
            pass
    except UserError as error:
        raise CheckpointError(str(error)) from error
    except OSError:
        pass  # it is not there, or cannot be opened: who reads or writes it says so


def _check_shapes(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    # Orbax casts another dtype silently and reports another shape in many lines.
    saved = checkpoint.manifest["arrays"]
    for name, kind in _arrays(wanted).items():
        if saved.get(name) != kind:
            raise OtherModelError(
                f"'{checkpoint.folder}' belongs to another model: {name}\n"
                f"is {saved.get(name, 'absent')} there and {kind} here"
            )


def _arrays(items: Mapping[str, Any]) -> dict[str, str]:
    """Returns path -> dtype and shape of every array, such as `float32[4, 2]`."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(k): f"{x.dtype}{list(jnp.shape(x))}" for k, x in leaves}


def _drop_others(workdir: Path) -> None:
    """Keeps the latest checkpoint, the one evaluated (else made) last before it, and the best."""
    partial, dropped = (workdir / "checkpoints" / name for name in (".partial", ".dropped"))
    files.remove_tree(partial)
    if dropped.is_symlink():
        dropped.unlink()
    steps = manifests(workdir)
    latest = max(steps)
    others = steps.keys() - {latest}
    evaluated = {step for step in others if steps[step].get("evaluated")}
    before = max(evaluated or others, default=None)
    for step in others - {before, best(steps)}:
        folder = workdir / "checkpoints" / str(step)
        if not folder.is_symlink():
            dropped.mkdir(exist_ok=True)
            os.rename(folder, dropped / folder.name)  # half a folder must not look like one
    if dropped.exists():
        for folder in dropped.iterdir():
            _remove_own(folder)
        dropped.rmdir()


def _remove_own(folder: Path) -> None:
    """Removes the files of a checkpoint; what a user has added stays, and all behind a link."""
    checkpoints, listed = folder.parents[1], ()
    with contextlib.suppress(CheckpointError):  # a damaged manifest lists none
        listed = read_manifest(folder)["files"]
    with contextlib.suppress(OSError, UserError), files.open_folder(folder, checkpoints) as opened:
        own = [name for name in os.listdir(opened) if OWN.fullmatch(name)]
        files.remove_listed(opened, {*own, *(f"state/{name}" for name in listed)})
    try:
        folder.rmdir()
    except OSError:
        os.rename(folder, _free_name(checkpoints / folder.name, "kept"))


def _free_name(folder: Path, word: str) -> Path:
    names = (f"{folder.name}.{word}", *(f"{folder.name}.{word}-{i}" for i in range(2, 1000)))
    return next(path for name in names if not files.exists(path := folder.with_name(name)))
