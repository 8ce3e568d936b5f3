"""Finds films and photos in the paths that a user gives, and checks whether a file is missing."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vidjax.apps.video import media
from vidjax.data.checks import list_entries
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Note, Tell, ignore_note, suggest_path
from vidjax.utils.names import show

# The endings of films and photos in folders. A file that a user names may have any ending.
FILMS = {
    ".3gp", ".avi", ".divx", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
PHOTOS = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
WINDOWS_FILES = ("thumbs.db", "desktop.ini")  # Windows writes these files into folders
ARTWORK = ("banner", "cover", "fanart", "folder", "poster", "thumb")  # pictures for media players


def is_missing(path: Path) -> bool:
    """Returns True if a file certainly does not exist.

    Returns False if the system cannot find out, or if macOS keeps the file only in the cloud.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return not files.exists(path.with_name(f".{path.name}.icloud"))
    except OSError:
        return False
    return False


def list_files(paths: Sequence[Path], tell: Tell = ignore_note) -> list[Path]:
    """Returns all files in `paths`, and all films and photos in folders in `paths`.

    Each file is returned once. `tell` is called with what is left out, see `search_folder`. Raises
    UserError if a path does not exist, or no file is found.
    """
    path_of, notes = dict[Path, Path](), list[Note]()
    for path in paths:
        if not files.exists(path):
            here = f"\nthe current folder is '{Path.cwd()}': to go to another one, cd FOLDER"
            raise UserError(
                f"there is no file or folder '{path}'{suggest_path(path)}"
                + here * (not path.is_absolute())
            )
        inside = [path]
        if path.is_dir():
            list_entries(path)  # raises OSError if the user may not read the folder
            inside = search_folder(path, notes.append)
        for file in inside:
            path_of.setdefault(Path(os.path.realpath(file)), file)
    if not path_of:
        raise UserError(
            f"'{paths[0]}' contains no video and no photo\ngive videos, photos, or folders of them"
        )
    for note in notes:
        tell(note)
    return list(path_of.values())


def list_folders(path: Path, unreadable: Callable[[OSError], object] | None = None) -> list[Path]:
    """Returns a folder and all its subfolders, sorted by path.

    Links, hidden folders, and folders that vidjax wrote are left out. If a folder cannot be read,
    `unreadable` is called with the error.
    """
    folders = []
    for folder, subfolders, names in os.walk(path, onerror=unreadable):
        if {media.NAME, media.RESULTS}.intersection(names):
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        folders.append(Path(folder))
    return sorted(folders)


def split_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Returns two lists: the films and photos in a folder, and all other files in it.

    The ending of a file's name decides. Hidden files are left out. In a folder with films, pictures
    for media players, such as `poster.jpg`, count as other files.
    """
    paths = [x for x in list_entries(path) if files.is_file(x)]
    accepted = {x for x in paths if x.suffix.lower() in FILMS}
    artwork = ARTWORK if accepted else ()
    photos = (x for x in paths if x.suffix.lower() in PHOTOS)
    accepted |= {x for x in photos if not x.stem.lower().endswith(artwork)}
    return [x for x in paths if x in accepted], [x for x in paths if x not in accepted]


def search_folder(folder: Path, tell: Tell) -> list[Path]:
    """Returns all films and photos in a folder and its subfolders.

    `tell` is called with notes about files that are no films or photos, about subfolders that the
    user may not read, and about a folder without films and photos.
    """
    from vidjax.apps.video import regions  # slow to import, and few commands search files

    found, unreadable = list[Path](), list[OSError]()
    folders = list_folders(folder, unreadable.append)
    for error in (x for x in unreadable if isinstance(x, PermissionError)):
        tell(Note(f"{show(error.filename)} is left out, because you may not read this folder"))
    for path in folders:
        accepted, others = split_files(path)
        found += accepted
        expected = {sidecar for photo in accepted for sidecar in regions.list_sidecars(photo)}
        expected |= {x for x in others if x.name.lower() in WINDOWS_FILES}
        if others := [x for x in others if x not in expected]:
            more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
            left_out = f"files in {show(str(path))} that are not films or photos are left out"
            tell(Note(f"{left_out}: {show(others[0].name)}{more}", warning=False))
    if not found:
        tell(Note(f"'{show(str(folder))}' contains no film and no photo"))
    return found


def check_apart(listed: Sequence[Path], out: Path) -> None:
    """Raises UserError if one of the input files `listed` is in `out`, the folder for results."""
    real = out.resolve()
    inner = next((path for path in listed if path.parent.resolve() == real), None)
    if inner:
        raise UserError(f"--out={out} contains the input file '{inner.name}'\nname another folder")
