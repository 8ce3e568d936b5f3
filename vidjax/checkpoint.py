"""Checkpoints: Orbax behind save, restore_latest and restore_params, with digests.

A step lies in `checkpoints/<step>/`: Orbax's folder `state` and, written last, `manifest.json`
with the sha256 of every file in it. A step without its manifest does not exist; a step whose files
do not match it is never used. The latest step and the best one by MAP are kept.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from vidjax import workdir as workdir_lib


class CheckpointError(Exception):
    """No usable checkpoint, or one of another model."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not those that were saved."""


def save(workdir: Path, step: int, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Saves a step, then drops those that are neither the latest nor the best.

    A step that is saved already keeps its arrays and gains facts.

    Args:
      workdir: the run's folder.
      step: optimiser steps done.
      items: name -> tree of arrays; restored by the same names.
      info: plain facts kept in the manifest; the best step is that of the highest `map`.

    Raises:
      OSError: it cannot be written; what was saved before is intact.
    """
    folder = workdir / "checkpoints" / str(step)
    if (folder / "manifest.json").exists():
        manifest = json.loads((folder / "manifest.json").read_text())
        workdir_lib.write_json(folder / "manifest.json", manifest | dict(info))
    else:
        if folder.exists():
            shutil.rmtree(folder)  # of a save that was cut short
        filled = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
        try:
            folder.mkdir(parents=True)
            ocp.save_checkpointables(str(folder / "state"), filled)
            manifest = {
                "step": step,
                "arrays": _arrays(items),
                "files": _digests(folder / "state"),
                **info,
            }
            workdir_lib.write_json(folder / "manifest.json", manifest)
        except Exception as error:  # Orbax reports a full disk in a dozen ways
            shutil.rmtree(folder, ignore_errors=True)
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise OSError(
                f"cannot save a checkpoint in '{folder}': {reason}\n"
                "earlier checkpoints are intact; is the disk full?"
            ) from error
    _drop_others(workdir)


def manifests(workdir: Path) -> dict[int, dict[str, Any]]:
    """Returns step -> manifest of every saved step, in ascending order; warns of damaged ones."""
    found = {}
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        if path.parent.name.isdigit():
            try:
                found[int(path.parent.name)] = json.loads(path.read_text())
            except ValueError:
                warnings.warn(f"'{path}' is damaged: the step is not used", stacklevel=2)
    return dict(sorted(found.items()))


def best_step(workdir: Path) -> int | None:
    """Returns the step with the highest MAP (the later of two equals), None without one."""
    scored = [(m["map"], step) for step, m in manifests(workdir).items() if "map" in m]
    return max(scored)[1] if scored else None


def restore(
    workdir: Path, step: int, abstract: Mapping[str, Any], sharding: jax.sharding.Sharding
) -> dict[str, Any]:
    """Returns the trees of a saved step, after its digests were checked.

    Args:
      workdir: the run's folder.
      step: which step.
      abstract: name -> tree of arrays or ShapeDtypeStructs; only these items are read.
      sharding: where every array goes; the number of devices may differ from the one that saved.

    Raises:
      CheckpointError: no such step, a damaged file, or another shape or dtype.
    """
    folder = workdir / "checkpoints" / str(step)
    verify(folder)
    _check_shapes(folder, abstract)
    wanted = {
        name: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding), tree
        )
        for name, tree in abstract.items()
        if jax.tree.leaves(tree)
    }
    restored = ocp.load_checkpointables(str(folder / "state"), wanted)
    return {name: restored.get(name, tree) for name, tree in abstract.items()}


def restore_latest(
    workdir: Path, abstract: Mapping[str, Any], sharding: jax.sharding.Sharding
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the trees and the manifest of the newest good step, None if nothing was ever saved.

    A damaged step is passed over with a warning; nothing of it is deleted.

    Raises:
      CheckpointError: steps are there, but none is good; or they are of another model.
    """
    steps = manifests(workdir)
    for step in sorted(steps, reverse=True):
        try:
            return restore(workdir, step, abstract, sharding), steps[step]
        except DamagedError as error:
            warnings.warn(f"checkpoint {step} is not used: {error}", stacklevel=2)
    if steps or list((workdir / "checkpoints").glob("*/manifest.json")):
        raise CheckpointError(f"no good checkpoint in '{workdir / 'checkpoints'}'")
    return None


def verify(folder: Path) -> None:
    """Checks every file of a saved step against its manifest.

    Raises:
      CheckpointError: no such step.
      DamagedError: a file is missing or does not match.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at '{folder}'")
    files = json.loads(path.read_text())["files"]
    for name, digest in files.items():
        file = folder / "state" / name
        if not file.is_file():
            raise DamagedError(f"file missing: '{file}'")
        if _digest(file) != digest:
            raise DamagedError(f"file damaged (sha256 differs): '{file}'")


def _check_shapes(folder: Path, wanted: Mapping[str, Any]) -> None:
    # Orbax casts another dtype silently and reports another shape in many lines.
    saved = json.loads((folder / "manifest.json").read_text())["arrays"]
    for name, kind in _arrays(wanted).items():
        if saved.get(name) != kind:
            raise CheckpointError(
                f"'{folder}' is of another model: {name}\n"
                f"is {saved.get(name, 'absent')} there and {kind} here"
            )


def _arrays(items: Mapping[str, Any]) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(k): f"{x.dtype}{list(jnp.shape(x))}" for k, x in leaves}


def _drop_others(workdir: Path) -> None:
    steps = manifests(workdir)
    keep = {max(steps), best_step(workdir)}
    for step in steps.keys() - keep:
        folder = workdir / "checkpoints" / str(step)
        (folder / "manifest.json").unlink()  # first: half a folder must not look like a step
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and not (folder / "manifest.json").exists():
            shutil.rmtree(folder)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
