"""Checkpoints: Orbax behind save, find and load, with digests.

A step lies in `checkpoints/<step>/`: Orbax's folder `state` and `manifest.json`, which holds the
sha256 of every file of it and of its own facts. The folder bears its name once all of that is
written; a step that does not match its manifest is never used. Kept are the latest, the one before
(where runs are evaluated as they go: the last evaluated one) and the best by MAP. Whatever else
lies in `checkpoints/` stays there.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from vidjax.run import workdir as workdir_lib


class CheckpointError(Exception):
    """No usable checkpoint, or one of another model."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not those that were saved."""


class OtherModelError(CheckpointError):
    """A checkpoint has other arrays than the model wants."""


class Checkpoint(NamedTuple):
    """A saved step, each of its files as it was saved."""

    folder: Path
    manifest: dict[str, Any]


def save(workdir: Path, step: int, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Saves a step, then drops those that need not be kept.

    A step that is saved already keeps its arrays and gains facts.

    Args:
      workdir: the run's folder.
      step: optimiser steps done.
      items: name -> tree of arrays; loaded by the same names.
      info: plain facts kept in the manifest; the best step is that of the highest `map`.

    Raises:
      OSError: it cannot be written; what was saved before is intact.
    """
    folder = workdir / "checkpoints" / str(step)
    try:
        _write_manifest(folder, read_manifest(folder) | dict(info))
    except CheckpointError:  # there is none, or what bears its name is not one
        _save_new(folder, items, {"step": step, **info})
    _drop_others(workdir)


def _save_new(folder: Path, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    filled = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    partial = folder.parent / ".partial" / folder.name
    try:
        if partial.parent.exists():
            shutil.rmtree(partial.parent)  # of a save that was cut short
        partial.mkdir(parents=True)
        ocp.save_checkpointables(str(partial / "state"), filled)
        facts = {"arrays": _arrays(items), "files": _digests(partial / "state")}
        _write_manifest(partial, {**facts, **info})
        set_aside(folder)
        os.rename(partial, folder)
    except Exception as error:  # Orbax reports a full disk in a dozen ways
        shutil.rmtree(partial.parent, ignore_errors=True)  # a thread of Orbax may still write there
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(reason) > 200:  # a path, which is named below; what happened comes after it
            reason = f"... {reason[-120:]}"
        raise OSError(
            f"cannot save a checkpoint in '{folder}': {reason}\n"
            "earlier checkpoints are intact; is the disk full?"
        ) from error


def manifests(workdir: Path) -> dict[int, dict[str, Any]]:
    """Returns step -> manifest of every step with a good one, in ascending order."""
    return {step: found for step, found in survey(workdir).items() if isinstance(found, dict)}


def survey(workdir: Path) -> dict[int, dict[str, Any] | DamagedError]:
    """Returns step -> its manifest, or why there is no good one; files are not looked at."""
    found: dict[int, dict[str, Any] | DamagedError] = {}
    for step, folder in sorted(_folders(workdir).items()):
        try:
            found[step] = read_manifest(folder)
        except DamagedError as error:
            found[step] = error
    return found


def best_step(workdir: Path) -> int | None:
    """Returns the step with the highest MAP (the later of two equals), None without one."""
    scored = [(m["map"], step) for step, m in manifests(workdir).items() if "map" in m]
    return max(scored)[1] if scored else None


def find(workdir: Path, prefer: str = "latest") -> Checkpoint | None:
    """Returns the first good step in an order of preference, None if nothing was ever saved.

    Damaged steps are passed over with a warning; they stay where they are.

    Args:
      workdir: the run's folder.
      prefer: `latest`, or `best`: the highest MAP first, steps without one last.

    Raises:
      CheckpointError: steps are there, but none is good; or none was ever scored.
      ValueError: another preference.
    """
    if prefer not in ("latest", "best"):
        raise ValueError(f"config.eval.checkpoint='{prefer}': latest or best")
    found = survey(workdir)
    scored = {step: m["map"] for step, m in found.items() if isinstance(m, dict) and "map" in m}
    damaged = [step for step, manifest in found.items() if not isinstance(manifest, dict)]
    if prefer == "best" and found and not scored and not damaged:
        raise CheckpointError(f"no best checkpoint in '{workdir}': no step was evaluated")
    order = sorted(found, reverse=True)
    if prefer == "best":  # of a step without a manifest nobody knows
        order = sorted(order, key=lambda s: (s in damaged, scored.get(s, -1.0), s), reverse=True)
    for step in order:
        folder = workdir / "checkpoints" / str(step)
        try:
            return Checkpoint(folder, verify(folder))
        except DamagedError as error:
            warnings.warn(f"checkpoint {step} is not used: {error}", stacklevel=2)
    if found:
        raise CheckpointError(f"no good checkpoint in '{workdir / 'checkpoints'}'")
    return None


def load(
    checkpoint: Checkpoint, abstract: Mapping[str, Any], sharding: jax.sharding.Sharding
) -> dict[str, Any]:
    """Returns the trees of a step that `find` found.

    Args:
      checkpoint: the step.
      abstract: name -> tree of arrays or ShapeDtypeStructs; only these items are read.
      sharding: where every array goes; the number of devices may differ from the one that saved.

    Raises:
      OtherModelError: another shape or dtype.
    """
    _check_shapes(checkpoint, abstract)
    wanted = {
        name: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding), tree
        )
        for name, tree in abstract.items()
        if jax.tree.leaves(tree)
    }
    restored = ocp.load_checkpointables(str(checkpoint.folder / "state"), wanted)
    return {name: restored.get(name, tree) for name, tree in abstract.items()}


def restore_latest(
    workdir: Path,
    abstract: Mapping[str, Any],
    sharding: jax.sharding.Sharding,
    check: Callable[[Mapping[str, Any]], None] = lambda manifest: None,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the trees and the manifest that training goes on from, None if nothing was saved.

    That is the newest good step. Damaged ones after it are set aside with a warning: training will
    come to their numbers again.

    Args:
      workdir: the run's folder.
      abstract, sharding: as in `load`.
      check: is given the manifest before anything is loaded or renamed; it may raise.

    Raises:
      CheckpointError: steps are there, but none is good; or they are of another model.
    """
    found = find(workdir)
    if found is None:
        return None
    check(found.manifest)
    items = load(found, abstract, sharding)
    for step, folder in _folders(workdir).items():
        if step > found.manifest["step"]:
            set_aside(folder)
    return items, found.manifest


def verify(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a saved step after every file was checked against it.

    Raises:
      CheckpointError: no such step.
      DamagedError: a file is missing or does not match.
    """
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items():
        file = folder / "state" / name
        if not file.is_file():
            raise DamagedError(f"file missing: '{file}'")
        try:
            same = workdir_lib.sha256_file(file) == digest
        except OSError as error:
            raise DamagedError(f"cannot read '{file}': {error.strerror}") from error
        if not same:
            raise DamagedError(f"file damaged (sha256 differs): '{file}'")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the facts of a saved step, which match their own sha256.

    Raises:
      CheckpointError: no such step.
      DamagedError: the manifest is missing, damaged, or of another step.
    """
    if not _is_step(folder):
        raise CheckpointError(f"no checkpoint at '{folder}'")
    path = folder / "manifest.json"
    try:
        facts = json.loads(path.read_text())
        seal = facts.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedError(f"file missing: '{path}'") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"'{path}' is damaged") from error
    if seal != workdir_lib.sha256_json(facts):
        raise DamagedError(f"'{path}' is damaged (its own sha256 differs)")
    if str(facts["step"]) != folder.name:
        raise DamagedError(f"'{path}' is of step {facts['step']}")
    return facts


def set_aside(folder: Path) -> None:
    """Gives whatever bears a step's name another one: `<step>.damaged`."""
    if folder.exists() or folder.is_symlink():
        os.rename(folder, _free_name(folder, "damaged"))


def _free_name(folder: Path, word: str) -> Path:
    names = (f"{folder.name}.{word}", *(f"{folder.name}.{word}-{i}" for i in range(2, 1000)))
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def _is_step(folder: Path) -> bool:
    if not re.fullmatch("0|[1-9][0-9]*", folder.name) or not folder.is_dir():
        return False  # a folder of the user's
    return (folder / "state").exists() or (folder / "manifest.json").exists()


def _folders(workdir: Path) -> dict[int, Path]:
    """Returns step -> folder, damaged ones included."""
    return {int(f.name): f for f in (workdir / "checkpoints").glob("*") if _is_step(f)}


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    plain = json.loads(workdir_lib.to_json(dict(facts)))
    plain["sha256"] = workdir_lib.sha256_json(plain)
    workdir_lib.write_json(folder / "manifest.json", plain)


def _check_shapes(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    # Orbax casts another dtype silently and reports another shape in many lines.
    saved = checkpoint.manifest["arrays"]
    for name, kind in _arrays(wanted).items():
        if saved.get(name) != kind:
            raise OtherModelError(
                f"'{checkpoint.folder}' is of another model: {name}\n"
                f"is {saved.get(name, 'absent')} there and {kind} here"
            )


def _arrays(items: Mapping[str, Any]) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(k): f"{x.dtype}{list(jnp.shape(x))}" for k, x in leaves}


def _drop_others(workdir: Path) -> None:
    partial, dropped = (workdir / "checkpoints" / name for name in (".partial", ".dropped"))
    if partial.exists():
        shutil.rmtree(partial)
    steps = manifests(workdir)
    latest = max(steps)
    others = steps.keys() - {latest}
    evaluated = {step for step in others if steps[step].get("evaluated")}
    before = max(evaluated or others, default=None)
    for step in others - {before, best_step(workdir)}:
        folder = workdir / "checkpoints" / str(step)
        if not folder.is_symlink():
            dropped.mkdir(exist_ok=True)
            os.rename(folder, dropped / folder.name)  # half a folder must not look like a step
    if dropped.exists():
        for folder in dropped.iterdir():
            _remove(folder)
        dropped.rmdir()


def _remove(folder: Path) -> None:
    """Removes the files that a step's manifest lists; what a user has added stays."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError):
        files = {}
    parts = sorted((folder / "state").rglob("*"), reverse=True)  # a folder after what is in it
    for path in [*parts, folder / "state"]:
        with contextlib.suppress(OSError):  # of a folder that is not empty
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif str(path.relative_to(folder / "state")) in files:
                path.unlink()
    for path in [*folder.glob(".manifest.json.*.partial"), folder / "manifest.json"]:
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        os.rename(folder, _free_name(folder.parents[1] / folder.name, "kept"))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): workdir_lib.sha256_file(path) for path in files}
