"""Makes the folder of a new gallery."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from vidjax.apps.gallery import labelling
from vidjax.apps.gallery.backend import Backend
from vidjax.apps.gallery.changes import check_clip
from vidjax.apps.gallery.enrolment import check_width, make_state
from vidjax.apps.gallery.store import NoGalleryError, Store, StoredClip, VectorOrigin
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.names import find_similar_names, show


def check_new(folder: Path) -> None:
    """Raises UserError if a folder contains files. Files of a killed process are ignored."""
    store = Store(folder.expanduser().absolute())
    if not store.folder.is_dir():
        return
    if foreign := store.foreign():
        raise UserError(
            f"'{store.folder}' is not empty: it contains '{show(foreign)}'\n"
            f"{store.advise_on_run() or 'name a new folder'}"
        )
    with contextlib.suppress(NoGalleryError):
        store.sha256()
        raise UserError(f"'{store.folder}' already contains a gallery: name another folder")


def write(
    folder: Path, origin: VectorOrigin, backend: Backend, clips: Mapping[str, StoredClip]
) -> None:
    """Writes a new gallery. For the arguments, see `Gallery.of_clips`."""
    path = folder.expanduser().absolute()
    width = check_width(backend)
    clips = {name: check_clip(name, clip, width) for name, clip in clips.items()}
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    files.make_folder(path, "gallery:")
    check_new(path)
    state = make_state(1, origin, backend, clips)
    Store(path).create(state)
    labelling.warn_of_similar(path, find_similar_names(state.people, ()))
