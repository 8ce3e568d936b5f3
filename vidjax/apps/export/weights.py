"""Weights as safetensors, both ways: a run becomes a folder of plain files, and a run again.

    config.json, identities.json, members.npz, metrics.json   as in the folder of the run
    checkpoint.json      the manifest of the checkpoint, without its list of files
    weights.safetensors  every array of it by its path: params/... and model_state/..., [E, ...]

The state of the optimiser stays behind: an imported run evaluates and ranks, and cannot train on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vidjax.core import devices
from vidjax.core.ensemble import FILE as MEMBERS
from vidjax.core.ensemble import MAX_FILE_BYTES as MEMBERS_BYTES
from vidjax.evaluation import restore
from vidjax.models.system import make_system
from vidjax.runs import checkpoint, schemas
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, IDENTITIES, RunFolder
from vidjax.utils import files
from vidjax.utils.errors import UserError

WEIGHTS, CHECKPOINT = "weights.safetensors", "checkpoint.json"
NEEDED = (CONFIG, IDENTITIES, MEMBERS)
COPIED = (*NEEDED, "metrics.json")
ITEMS = ("params", "model_state")
OWN = ("step", "files", "arrays", "sha256")  # entries of a manifest that each checkpoint has anew


def write(workdir: Path, folder: Path, step: str) -> None:
    """Writes the files above into a folder; `step` is `latest` or `best`."""
    from safetensors.numpy import save_file

    source = RunFolder(workdir)
    config = source.config
    config.eval.checkpoint = step
    run = restore.find_run(config, source)
    wanted = _abstract(config, run.manifest, len(run.training_sets.members))
    items = checkpoint.load(run.checkpoint, wanted, devices.replicated(devices.make_mesh(1)))
    save_file(by_path(items), folder / WEIGHTS)
    files.write_manifest(folder / CHECKPOINT, {**_kept(run.manifest), "files": {}})
    _copy(workdir, folder)


def read(folder: Path, workdir: Path) -> None:
    """Makes the run `workdir`, a new folder, of the files in `folder`.

    Raises:
      UserError: a file is missing or damaged, or the weights are of another model.
    """
    for name in (*NEEDED, CHECKPOINT, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"'{folder}' has no {name}: name a folder that vidjax export has made")
    path = folder / CHECKPOINT
    manifest = files.read_manifest(path)
    schemas.parse(path, manifest, schemas.Manifest, "export the run again")
    restore.check_entries(folder, manifest)
    with files.atomic_folder(workdir) as partial:
        _copy(folder, partial)
        made = RunFolder(partial)
        config = made.config
        sets = restore.load_training_sets(partial, manifest)
        items = _items(folder / WEIGHTS, _abstract(config, manifest, len(sets.members)))
        checkpoint.save(partial, manifest["step"], items, _kept(manifest, without_step=True))
        restore.find_run(config, made)  # its files belong together


def _copy(source: Path, target: Path) -> None:
    """Copies the plain files of a run; UserError for a link, a pipe, or results that are none."""
    RunFolder(source).metrics()
    for name in COPIED:
        if files.exists(source / name):
            (target / name).write_bytes(files.read_bytes(source / name, MEMBERS_BYTES))


def by_path(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the path of every array in nested dicts, such as params/net/kernel -> array."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(tree))
    return {_path(keys): np.ascontiguousarray(jax.device_get(leaf)) for keys, leaf in leaves}


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _kept(manifest: Mapping[str, Any], *, without_step: bool = False) -> dict[str, Any]:
    """Returns the entries of a manifest that do not depend on how its arrays are stored."""
    left_out = OWN if without_step else OWN[1:]
    arrays = {} if without_step else {"arrays": manifest["arrays"]}
    return {name: value for name, value in manifest.items() if name not in left_out} | arrays


def _abstract(config: Config, manifest: Mapping[str, Any], members: int) -> dict[str, Any]:
    """Returns the shapes and dtypes of the weights that a configuration and a manifest want."""
    task = restore.task_of(manifest)
    system = make_system(config.to_dict(), task)
    return dict(zip(ITEMS, system.shapes(members), strict=True))


def _items(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads weights, structured like `wanted`; UserError if they are others."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files.open_regular(path).close()
    try:
        found = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"'{path}' is damaged: {error}\nexport the run again") from error

    def take(keys: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        name, kind = _path(keys), f"{like.dtype}{list(like.shape)}"
        value = found.pop(name, None)
        if value is None or (value.dtype, value.shape) != (like.dtype, like.shape):
            here = "absent" if value is None else f"{value.dtype}{list(value.shape)}"
            raise UserError(f"'{path}' is of another model: {name}\nis {here}, not {kind}")
        return value

    items = jax.tree_util.tree_map_with_path(take, dict(wanted))
    if found:
        raise UserError(f"'{path}' is of another model: it has {min(found)} besides")
    return jax.tree.map(jax.numpy.asarray, items)
