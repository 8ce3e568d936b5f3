"""Writes a gallery as a table, or as arrays with which numpy scores clips without vidjax."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.apps.gallery.enrolment import stack_parts
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.index import Ratios
from vidjax.apps.gallery.ratios import MAX_VOICE_RATIO
from vidjax.evaluation.export import array_files
from vidjax.evaluation.export.formats import FORMATS
from vidjax.utils import files, tables
from vidjax.utils.errors import UserError
from vidjax.utils.version import VERSION


def write_gallery(format_name: str, gallery: Gallery, folder: Path) -> dict[str, Any]:
    """Writes the arrays of a gallery, and `reader.py` that scores clips with them, into a folder.

    Reads the files again, and compares the scores of random clips with the scores of the gallery.
    Returns entries of `export.json`, name -> value, that describe the arrays. Raises UserError if
    the largest error is above `array_files.TOLERANCE`, or if the format is only for runs.
    """
    if not (name := FORMATS[format_name].gallery_file):
        raise UserError(
            f"--format={format_name} stores a net, but a gallery has none\n"
            "choose --format=safetensors or --format=numpy, or export the run "
            "from which the gallery was made"
        )
    read = array_files.write_arrays(folder / name, make_arrays(gallery))
    rng, parts = np.random.default_rng(0), {}
    for number, (name, width) in enumerate(gallery.backend.widths.items()):
        x = rng.normal(size=(6, width)).astype(np.float32)
        parts[name] = x / np.linalg.norm(x, axis=1, keepdims=True)
        parts[name][1 + number % 5] = 0  # a clip that lacks the modality
    if len(parts) > 1:
        for x in parts.values():
            x[0] = 0  # a clip that lacks all modalities
    expected = np.stack(list(gallery.index.search(list(parts.values()))))
    worst = array_files.difference({"scores": read(parts)}, {"scores": expected})
    array_files.check_tolerance(format_name, worst)
    files.write_json(folder / "identities.json", list(gallery.index.names))
    return {
        "version": gallery.version,
        "parts": gallery.backend.widths,
        "num_identities": len(gallery.index.names),
        "difference": worst,
        "versions": {"vidjax": VERSION, "numpy": np.__version__},
    }


def write_table(gallery: Gallery, path: Path) -> int:
    """Writes a .parquet table of the enrolled clips; returns the number of clips.

    The columns are `clip`, `identity`, and for each modality, such as `face`, a unit vector. The
    vector of a missing modality is 0. A run without PLDA has a single modality, `embedding`. Raises
    UserError if a modality has the name of another column.
    """
    state = gallery.state
    names = sorted(name for name, clip in state.clips.items() if clip.identity is not None)
    columns: dict[str, tuple[str, Sequence[object] | np.ndarray]] = {
        "clip": ("string", names),
        "identity": ("string", [state.clips[name].identity for name in names]),
    }
    whitened = state.index.backend.whiten(stack_parts(state, names))
    for part, z in zip(state.index.backend.widths, whitened, strict=True):
        if part in columns:
            raise UserError(
                f"'{gallery.folder}' has a modality '{part}', but another column has this name\n"
                "export the gallery in another format: vidjax export G --format=numpy --to=DIR"
            )
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        columns[part] = ("float32", (z / np.where(norm > 0, norm, 1)).astype(np.float32))
    with files.atomic_file(path) as file:
        files.hide(Path(file.name))
        file.write(tables.to_parquet(tables.to_arrow(columns)))
    return len(names)


def make_arrays(gallery: Gallery) -> dict[str, np.ndarray]:
    """Returns the arrays that `reader.py` of an exported gallery needs: name -> array.

    People are in the order of `gallery.index.names`. For the arrays of a modality with PLDA, see
    `evaluation.export.array_files`. A modality with distances has `share`, `radius` and `card` of
    `index.DistanceRatios`, and `variance`, the sum of `DistanceRatios.variance` and
    `Distances.within`. Raises UserError if nobody is enrolled.
    """
    index, backend = gallery.index, gallery.backend
    if not index.names:
        raise UserError(
            f"nobody is enrolled in gallery '{gallery.folder}'\n"
            "enrol people first: vidjax gallery enrol"
        )
    arrays: dict[str, Any] = {
        name: np.asarray(getattr(backend.settings, name), np.float64)
        for name in ("scale", "unenrolled", "stranger")
    }
    arrays["temperature"] = np.ones(())
    for number, part in enumerate(backend.parts):
        scorer = index.scorers[number]
        part_arrays: dict[str, Any] = {
            "centre": part.centre,
            "linear": np.concatenate([block.linear[number] for block in index.blocks]),
            "known": (index.counts[number] > 0).astype(np.int32),
            "limit": np.asarray(MAX_VOICE_RATIO if part.may_be_offscreen else np.inf),
        }
        if isinstance(scorer, Ratios):
            assert part.space is not None
            part_arrays |= {
                "mean": part.space.mean,
                "transform": part.space.transform,
                "constant": np.concatenate([block.constant[number] for block in index.blocks]),
                "curve": scorer.curve,
                "kind": scorer.kind.astype(np.int32),
                "scale": np.ones(()),
            }
        elif part.distances is not None:
            part_arrays |= {
                "mean": scorer.population.mean,
                "share": scorer.share,
                "radius": scorer.radius,
                "variance": scorer.variance + part.distances.within,
                "card": scorer.card,
            }
        arrays |= {f"{part.name}/{name}": value for name, value in part_arrays.items()}
    return {name: np.ascontiguousarray(value)[None] for name, value in arrays.items()}
