"""`vidjax export` and `vidjax import`: runs and galleries in the formats of other runtimes."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidjax.utils import files, messages
from vidjax.utils.errors import UserError, need
from vidjax.utils.messages import Parser, Result

if TYPE_CHECKING:
    from vidjax.apps.export.formats import Format

NAMES = ("stablehlo", "saved_model", "onnx", "safetensors", "numpy")
MANIFEST = "export.json"


def _places(args: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the folder that a command reads, and the new one that it makes."""
    source, to = (Path(name).expanduser().absolute() for name in (args.folder, args.to))
    if files.exists(to):
        raise UserError(f"--to={to}: there is something already: name a new folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    return source, to


def add_export_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax export`."""
    about = "the folder of a run or a gallery"
    parser.add_argument("folder", metavar="RUN", help=about)
    parser.add_argument("--to", metavar="DIR", required=True, help="the new folder")
    parser.add_argument("--format", choices=NAMES, required=True, help="the format")
    about = "latest (the default), or best by MAP"
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help=about)
    examples = ("runs/mma --to=exported --format=onnx", "people --to=arrays --format=numpy")
    parser.command(_export, *examples)


def add_import_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax import`."""
    parser.add_argument("folder", metavar="DIR", help="a folder that export has made")
    parser.add_argument("--to", metavar="RUN", required=True, help="the new folder of the run")
    parser.command(_import, "exported --to=runs/copy")


def _export(args: argparse.Namespace) -> Result:
    """Writes a run or a gallery into a new folder, once it has answered as we do."""
    (source, to), began = _places(args), time.monotonic()
    from vidjax.apps.export.formats import FORMATS
    from vidjax.apps.gallery.store import NAME

    chosen = FORMATS[args.format]
    need(f"--format={args.format}", *chosen.packages, extra=chosen.extra)
    with files.atomic_folder(to) as folder:
        if is_gallery := files.exists(source / NAME):
            found = _write_gallery(source, folder, chosen, args.format)
        else:
            found = _write_run(source, folder, chosen, args.format, args.checkpoint)
        written = {"format": args.format, **found, "files": files.sha256_folder(folder)}
        files.write_manifest(folder / MANIFEST, written)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    rows = {
        "folder": messages.shown(to),
        "holds": chosen.file or ("arrays.safetensors" if is_gallery else "weights.safetensors"),
        "compared": f"largest difference {found['difference']:.1e}, of 1e-05 allowed",
        "size": f"{size / 1e6:,.1f} MB",
        "time": f"{time.monotonic() - began:.1f} s",
    }
    return Result({"folder": str(to), **written, "bytes": size}, rows)


def _write_run(
    source: Path, folder: Path, chosen: "Format", name: str, step: str
) -> dict[str, Any]:
    import jax

    from vidjax.apps.export import function, weights
    from vidjax.core import devices
    from vidjax.evaluation import predict
    from vidjax.training import api

    api.open_run(source)  # says what to do where there is no run
    run = predict.restore(source, step="best" if step == "best" else "latest", num_devices=1)
    size = sum(x.nbytes for x in jax.tree.leaves((run.params, run.model_state)))
    if chosen.bounded and size >= function.LARGEST:
        raise UserError(
            f"--format={name} holds {function.LARGEST / 1e9:.1f} GB, and the weights are "
            f"{size / 1e9:.1f} GB: choose safetensors or saved_model"
        )
    inputs = function.input_shapes(run)
    weights.write(run.workdir, folder, step)
    answer = chosen.write(run, inputs, folder)
    return {
        "step": run.step,
        "inputs": {
            name: {"shape": [x if isinstance(x, int) else str(x) for x in one.shape],
                   "dtype": one.dtype.name}
            for name, one in inputs.items()
        },
        "outputs": list(chosen.outputs),
        "num_identities": len(run.identities),
        "scores": run.config.eval.scores,
        "difference": function.check(name, run, answer),
        "versions": devices.versions(),
    }  # fmt: skip


def _write_gallery(source: Path, folder: Path, chosen: "Format", name: str) -> dict[str, Any]:
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.core import devices

    if chosen.gallery is None:
        raise UserError(
            f"--format={name} holds a net, and a gallery has none: choose safetensors or numpy\n"
            "to export what makes its vectors, name the run of the gallery"
        )
    gallery = Gallery(source)
    difference = chosen.gallery(gallery, folder)
    files.write_json(folder / "identities.json", list(gallery.index.names))
    return {
        "version": gallery.version,
        "parts": gallery.backend.widths,
        "num_identities": len(gallery.index.names),
        "difference": difference,
        "versions": devices.versions(),
    }


def _import(args: argparse.Namespace) -> Result:
    """Makes a run of the weights beside any exported model."""
    from vidjax.apps.export import weights
    from vidjax.evaluation import predict

    source, to = _places(args)
    weights.read(source, to)
    run = predict.restore(to)
    rows = {"workdir": messages.shown(to), "step": f"{run.step:,}"}
    rows |= {"identities": f"{len(run.identities):,}", "modalities": ", ".join(run.modalities)}
    return Result({"workdir": str(to), "step": run.step}, rows)
