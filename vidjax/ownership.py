"""What belongs to the user of this process: a folder that nobody else can change, and the cache."""

import grp
import os
import pwd
import stat
from pathlib import Path


def default_cache_dir() -> Path:
    """Returns the cache folder of a run that names none: `$VIDJAX_CACHE` or `~/.cache/vidjax`."""
    given = os.environ.get("VIDJAX_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "vidjax"


def foreign_part(folder: Path) -> Path | None:
    """Returns the first folder on the way to `folder` that another user may change, or None.

    Folders that do not exist yet are left out. A link is followed, and its target looked at.

    Args:
      folder: any path.
    """
    try:
        real = folder.absolute().resolve()
        for path in (*reversed(real.parents), real):
            if not path.exists():
                break
            if _may_be_changed(path.stat(), last=path == real):
                return path
    except OSError:
        return folder
    return None


def _may_be_changed(status: os.stat_result, *, last: bool) -> bool:
    """Returns True if someone beside root and this user may put files in the place of others."""
    user = os.geteuid()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, user):
        return True
    sticky = status.st_mode & stat.S_ISVTX and not last  # others cannot rename what is not theirs
    others = status.st_mode & stat.S_IWOTH
    group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
    return bool((others or group) and not sticky)


def _is_private(group: int) -> bool:
    """Returns True for root's group, and for one that bears the user's name and no other member."""
    if group == 0:
        return True
    try:
        name, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}
