"""Extraction of many videos and photos, several at once; what is there already is kept."""

import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vidjax import files
from vidjax.data.processes import Children, map_children
from vidjax.errors import UserError
from vidjax.extract import cards as cards_lib
from vidjax.extract import child, folder

ROLES = ("face_detector", "face_embedder")
PARTIAL = re.compile(r"\.extract-[0-9a-f]{8}")


class Outcome(NamedTuple):
    """What became of a file: its `film`, or an `error`; `kept` if it had been extracted before."""

    path: Path
    film: folder.Film | None
    error: str = ""
    kept: bool = False


def extract(
    paths: Sequence[Path],
    out: Path,
    models: Path,
    settings: folder.Settings | None = None,
    *,
    workers: int = 1,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Extracts the faces of videos and photos into the folder `out`, see `folder`.

    A file that cannot be read costs its own outcome alone. A cut-off call goes on where it was: a
    video counts as done if its bytes, the nets and the settings are the same.

    Args:
      paths: the videos and photos; folders stand for the files in them.
      out: the folder; it is made, and readable by its owner alone.
      models: the folder of nets with cards.
      settings: None for those of the folder, or else the defaults.
      workers: processes at once.
      done: called with each outcome, in any order.

    Raises:
      UserError: a net is missing, or the folder has features of other nets or settings.
    """
    known = cards_lib.load(models)
    digests = {role: cards_lib.require(known, role, models).digest for role in ROLES}
    listed = list_files(paths)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.lock(files.make_folder(out, "out"), "features"):
        wanted = _same_extraction(out, digests, settings)
        for entry in out.iterdir():
            if PARTIAL.fullmatch(entry.name):
                files.remove_tree(entry)
        (out / folder.VIDEOS).mkdir(exist_ok=True)
        stems = _stems(listed, out)

        def one(children: Children, path: Path) -> Outcome:
            outcome = _one(children, path, stems[path], out, models, wanted)
            done(outcome)
            return outcome

        return map_children(one, listed, workers)


def list_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the files that paths name, each once; of folders all that are not hidden, sorted."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not files.exists(path):
            raise UserError(f"'{path}': no such file or folder")
        inside = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
        found |= {one.absolute(): one for one in inside if not one.name.startswith(".")}
    if not found:
        raise UserError(f"'{paths[0]}' holds no file\nname videos, photos, or folders of them")
    return list(found.values())


def _same_extraction(
    out: Path, digests: dict[str, str], settings: folder.Settings | None
) -> folder.Settings:
    """Returns the settings of a folder, which it gets if it has none; refuses other ones."""
    before = folder.read_extraction(out)
    if before is None:
        if foreign := next((one for one in out.iterdir() if one.suffix == ".npz"), None):
            raise UserError(
                f"'{out}' has clips that nobody extracted, as {foreign.name}: name a new folder"
            )
        made = folder.Extraction(models=digests, settings=settings or folder.Settings())
        folder.write(out / folder.NAME, made)
        return made.settings
    for role, digest in digests.items():
        if before.models.get(role) != digest:
            raise UserError(
                f"'{out}' has features of another {role}\nname a new folder, or the same models"
            )
    if settings and settings != before.settings:
        changed = [
            f"{name}: {getattr(before.settings, name)}, not {getattr(settings, name)}"
            for name in settings.__struct_fields__
            if getattr(before.settings, name) != getattr(settings, name)
        ]
        raise UserError(
            f"'{out}' was extracted with other settings ({'; '.join(changed)})\nname a new folder"
        )
    return before.settings


def _stems(paths: Sequence[Path], out: Path) -> dict[Path, str]:
    """Returns path -> begin of its clips' names: that of the file; `~` and more if it is taken."""
    stems: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        stem = re.sub(r"[^\w.-]+", "_", path.stem).strip("._")[:100] or "video"
        if stem.lower() in taken:
            stem += f"~{files.sha256_json(str(path.absolute()))[:8]}"
        taken.add(stem.lower())
        stems[path] = stem
    return stems


def _one(
    children: Children, path: Path, stem: str, out: Path, models: Path, settings: folder.Settings
) -> Outcome:
    """Extracts one file, unless it was extracted before."""
    try:
        with files.open_input(path) as file:
            sha256 = files.sha256_opened(file)
        told = out / folder.VIDEOS / f"{stem}.json"
        if files.exists(told):
            before = folder.read_film(told)
            if before.sha256 == sha256:
                return Outcome(path, before, kept=True)
            told.unlink()
        _remove_clips(out, stem)
        partial = out / f".extract-{secrets.token_hex(4)}"
        partial.mkdir(mode=0o700)
        try:
            film = child.extract(path, partial, stem, models, settings, sha256, children)
            for track in film.tracks:
                os.replace(partial / f"{track.clip}.npz", out / f"{track.clip}.npz")
        finally:
            files.remove_tree(partial)
        folder.write(told, film)
    except (UserError, OSError) as error:
        return Outcome(path, None, str(error))
    return Outcome(path, film)


def _remove_clips(out: Path, stem: str) -> None:
    """Removes the clips of an extraction of this stem that was cut off, or of another file."""
    own = re.compile(re.escape(stem) + r"(\.s\d{3,}\.t\d{2,}|\.f\d{2,})?\.npz")
    for entry in list(os.scandir(out)):
        if own.fullmatch(entry.name):
            os.unlink(entry.path)
