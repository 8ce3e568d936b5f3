"""Finds films and photos in the paths that a user gives, and knows which film or photo is where.

A film is what it shows, see `media.Content`. Its file may be renamed, moved, copied,
deleted, or replaced by another film. The film keeps its stem, the first part of the names of its
clips.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vidjax.apps.video import media
from vidjax.apps.video.media import VIDEOS, Content, ExtractionSettings, FileStamp, MediaFile
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


def is_deleted(path: Path) -> bool:
    """Returns whether a file is missing in a folder that contains other files.

    Hidden files do not count.
    """
    try:
        return is_missing(path) and bool(list_entries(path.parent))
    except (UserError, OSError):
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


class MediaFolder:
    """The films and photos of a folder of features, and the places of their files.

    Several threads may use one object. They change it only while they hold `lock`. `tagged` is
    explained in `pipeline.extract_files`.
    """

    def __init__(self, out: Path, settings: ExtractionSettings, *, tagged: bool):
        self.out, self.settings, self.tagged = out, settings, tagged
        self.lock = threading.Lock()
        self.films = media.describe_media_files(out)  # stem -> description
        self.used = set[str]()  # the stems of the films that this call has found
        self.stem_of: dict[str, str] = {}  # digest of a film -> its stem
        self._at: dict[str, str] = {}  # address -> the stem of the film that was last seen there
        self._taken = {stem.lower() for stem in self.films}
        # Another film may have replaced an earlier film at its place.
        for stem in sorted(self.films, key=lambda stem: self.films[stem].source.mtime_ns):
            self._index(stem)
        # The stems of the films whose features, and thumbnails if they are kept, exist.
        self.complete = {
            stem for stem in self.films
            if media.has_features(out, stem) and not media.lacks_pictures(out, stem)
        }  # fmt: skip

    def _index(self, stem: str) -> None:
        film = self.films[stem]
        self.stem_of[film.sha256] = stem
        self._at |= dict.fromkeys((stamp.address for stamp in film.stamps), stem)

    def recognise(self, stamp: FileStamp) -> str | None:
        """Returns the stem of the film in a file that has not changed, if its features exist."""
        stem = self._at.get(stamp.address, "")
        return stem if stem in self.complete and stamp in self.films[stem].stamps else None

    def list_known(self, sha256: str) -> tuple[dict[str, str], list[Content]]:
        """Returns the stem of each digest, and the contents that need not be read again.

        If `sha256`, the digest of a photo, is not "", the result is only about this digest.
        """
        digests = [sha256] if sha256 else [*self.stem_of]
        stems = {x: self.stem_of[x] for x in digests if self.stem_of.get(x) in self.films}
        return stems, [self.films[x].content for x in stems.values() if x in self.complete]

    def find_at(self, address: str) -> MediaFile | None:
        """Returns the film that was last seen at an address, see `FileStamp`, or None."""
        return self.films.get(self._at.get(address, ""))

    def choose_stem(self, path: Path, address: str) -> str:
        """Returns the stem of a file if it shows a new film, see `film.choose_stem`.

        `address` is the address of `path`, see `FileStamp`. If another film has the stem, `~` is
        added. No two calls return the same free stem. In a folder of tagged photos, the stem is "",
        because it is made of the digest.
        """
        if self.tagged:
            return ""
        stem = media.make_stem(path)
        if self.find_at(address) or stem.lower() in self._taken:
            return f"{stem}~"
        self._taken.add(stem.lower())
        return stem

    def place(self, stem: str, stamp: FileStamp, name: str) -> bool:
        """Notes that a file with a name shows the film `stem`. Returns whether the file is a copy.

        If the film is not at its earlier place, the file becomes its first place.
        """
        film = self.films[stem]
        before, others = (film.video, film.stamps), self.list_others(film, stamp.address)
        is_copy = film.source.address != stamp.address and film.source.is_valid
        if is_copy:
            film.copies = [*others[1:], stamp]  # the first one is `film.source`
        else:
            film.source, film.video, film.copies = stamp, media.make_printable(name), others
        if before != (film.video, film.stamps):
            media.write(self.out / VIDEOS / f"{stem}.json", film)
            self._index(stem)
        return is_copy

    def list_others(self, film: MediaFile, address: str) -> list[FileStamp]:
        """Returns the places of a film, except `address`, where a file still is, or may be.

        A file may be on a drive that is not connected. But the name of a folder of tagged photos is
        the name of a person, who may have another name now. So only files that exist count there.
        """

        def may_be(path: Path) -> bool:
            return not (self.tagged or files.exists(path) or is_deleted(path))

        others = (x for x in film.stamps if x.address != address)
        return [x for x in others if x.is_valid or may_be(x.path)][-media.MOST_COPIES :]

    def add(self, stem: str, film: MediaFile) -> None:
        """Adds a film after its features were written, and writes its description."""
        media.write(self.out / VIDEOS / f"{stem}.json", film)
        self.films[stem] = film
        self._index(stem)
        self.complete.add(stem)

    def remove(self, stem: str) -> None:
        """Removes the features, the description and the thumbnails of a film."""
        media.remove_media_file(self.out, stem)
        self.films.pop(stem, None)
        self.complete.discard(stem)

    def follow_copies(self) -> None:
        """Makes a copy the first place of each film that is not at its place, and was not found."""
        for stem, film in self.films.items():
            is_lost = stem not in self.used and film.copies and not film.source.is_valid
            if is_lost and (there := next((x for x in film.copies if x.is_valid), None)):
                self.place(stem, there, there.path.name)
