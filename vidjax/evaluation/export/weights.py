"""Exports the weights of a run as safetensors, and imports them as a new run.

The exported folder contains these files:

    config.json, metrics.json         copies from the folder of the run
    identities.json                   the identities
    checkpoint.json      the manifest of the checkpoint, with lists of the identities, members and
                         training clips instead of the list of files
    weights.safetensors  the arrays [E, ...], with names such as params/... and model_state/...

E is the number of ensemble members. The state of the optimiser is not exported, so an imported run
can rank clips, but cannot continue its training.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vidjax.core import devices, ensemble
from vidjax.evaluation import trained_runs
from vidjax.models.build_system import make_system
from vidjax.runs import checkpoint, members_file, results, schemas
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, IDENTITIES, RunFolder
from vidjax.utils import files, json_files
from vidjax.utils.errors import UserError

WEIGHTS, CHECKPOINT = "weights.safetensors", "checkpoint.json"
COPIED_FILES = (CONFIG, "metrics.json")
ITEMS = ("params", "model_state")


def write(workdir: Path, folder: Path, step: str) -> None:
    """Exports a checkpoint of the run in `workdir` to `folder`. `step` is `latest` or `best`."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    source = RunFolder(workdir)
    config = source.config
    config.eval.checkpoint = step
    run = trained_runs.find_run(config, source)
    shapes = _make_shapes(config, run.manifest)
    items = checkpoint.load(run.checkpoint, shapes, devices.replicated_layout(devices.make_mesh(1)))
    path = folder / WEIGHTS
    with files.disk_errors(path, SafetensorError):
        save_file(flatten(items), path)
    lists = members_file.make_lists(run.identities, run.training_sets)
    files.write_manifest(folder / CHECKPOINT, {**run.manifest, "files": {}, **lists})
    files.write_json(folder / IDENTITIES, lists["identities"])
    _copy(workdir, folder)


def read(folder: Path, workdir: Path) -> None:
    """Makes a new run in the folder `workdir` from the exported files in `folder`.

    Raises UserError if a file is missing or damaged, or if the weights do not fit the config.
    """
    for name in (CONFIG, CHECKPOINT, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"'{folder}' does not contain {name}\nname a folder that vidjax export has written"
            )
    path = folder / CHECKPOINT
    manifest = files.read_manifest(path, limit=results.MAX_IDENTITIES_BYTES)
    json_files.parse(path, manifest, schemas.Manifest, "export the run again")
    trained_runs.check_entries(folder, manifest)
    with files.atomic_folder(workdir) as partial, _blame_export(folder, partial):
        _copy(folder, partial)
        run = RunFolder(partial)
        config = run.config
        items = _read_items(folder / WEIGHTS, _make_shapes(config, manifest))
        items |= {name: manifest.pop(name) for name in checkpoint.LISTS if name in manifest}
        info = {name: x for name, x in manifest.items() if name not in ("step", "files", "arrays")}
        checkpoint.save(partial, manifest["step"], items, info)
        config.eval.checkpoint = "latest"  # the only checkpoint may have no MAP
        found = trained_runs.find_run(config, run)  # checks that the files belong together
        members_file.write_copies(partial, found.identities, found.training_sets)


@contextlib.contextmanager
def _blame_export(folder: Path, copy: Path) -> Iterator[None]:
    """Replaces `copy` by `folder` in the messages of errors in a `with` block.

    `copy` is a temporary copy of the exported files in `folder`. A user knows only `folder`.
    """
    try:
        yield
    except (UserError, checkpoint.CheckpointError) as error:
        text = str(error).replace(str(copy), str(folder))
        if isinstance(error, OSError) or str(folder) not in text:
            raise
        problem = text.splitlines()[:-1] or [text]
        raise UserError("\n".join([*problem, "export the run again"])) from error


def _copy(source: Path, target: Path) -> None:
    """Copies COPIED_FILES from the folder `source` to `target`. Skips missing files.

    Raises UserError for a link or a pipe, or if `metrics.json` in `source` is damaged.
    """
    RunFolder(source).metrics()
    for name in COPIED_FILES:
        if files.exists(source / name):
            content = files.read_bytes(source / name, results.MAX_IDENTITIES_BYTES)
            (target / name).write_bytes(content)


def flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts nested dicts of arrays to one dict, whose keys are paths like params/net/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(tree))
    return {_path(keys): np.ascontiguousarray(jax.device_get(leaf)) for keys, leaf in leaves}


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _make_shapes(config: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shapes and dtypes of the weights of all ensemble members, as nested dicts."""
    system = make_system(config.to_dict(), trained_runs.read_task(manifest))
    members = ensemble.make_members(config.ensemble.to_dict())
    return dict(zip(ITEMS, system.compute_shapes(len(members)), strict=True))


def _read_items(path: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Reads weights from a .safetensors file into nested dicts, as in `shapes`.

    If the arrays in the file do not have exactly these names, shapes and dtypes, raises UserError.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files.open_regular(path).close()
    try:
        arrays = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"'{path}' is damaged: {error}\nexport the run again") from error

    def take(keys: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        name, expected = _path(keys), f"{like.dtype}{list(like.shape)}"
        value = arrays.pop(name, None)
        if value is None or (value.dtype, value.shape) != (like.dtype, like.shape):
            actual = "missing" if value is None else f"{value.dtype}{list(value.shape)}"
            raise UserError(
                f"'{path}' does not fit config.json\n{name} is {actual}, but must be {expected}\n"
                "export the run again"
            )
        return value

    items = jax.tree_util.tree_map_with_path(take, dict(shapes))
    if arrays:
        raise UserError(
            f"'{path}' does not fit config.json: the array {min(arrays)} is not used\n"
            "export the run again"
        )
    return jax.tree.map(jax.numpy.asarray, items)
