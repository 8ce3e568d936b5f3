"""Temporary folders that are removed even if a signal ends the process."""

import contextlib
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_folders: set[Path] = set()
_lock = threading.RLock()


@contextlib.contextmanager
def scratch_folder(folder: Path | None = None) -> Iterator[Path]:
    """Makes a folder that only this user can read, yields its path, and removes it at the end.

    SIGINT and SIGTERM also remove the folder, because it may contain features of people. `folder`
    is the path of the folder, which must not exist. By default, the system chooses a path.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp())
    else:
        folder.mkdir(mode=0o700, parents=True)
    _folders.add(folder)
    try:
        yield folder
    finally:
        with _lock:
            shutil.rmtree(folder, ignore_errors=True)
            _folders.remove(folder)


def remove_scratch_folders() -> None:
    """Removes all scratch folders of this process. The caller must then end the process."""
    # The lock stays locked. Otherwise an error of another thread, whose files are gone, could end
    # the process before all folders are removed.
    _lock.acquire()
    for folder in tuple(_folders):
        # A child process may still write into the folder, but it cannot find a renamed folder.
        with contextlib.suppress(OSError):
            renamed = folder.rename(folder.with_name(f".{secrets.token_hex(8)}.partial"))
            _folders.add(renamed)  # a second signal interrupts rmtree
            shutil.rmtree(renamed, ignore_errors=True)
