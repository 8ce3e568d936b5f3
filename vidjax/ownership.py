"""What belongs to the user of this process: the cache, and a key that signs what vidjax wrote.

A folder is the user's own if nobody else can change what is in it. A seal is a keyed digest that
only this user can make, on this machine or wherever the cache folder is: by it vidjax knows its own
files from those of strangers.
"""

import contextlib
import grp
import hmac
import os
import pwd
import secrets
import stat
from pathlib import Path

from vidjax import files

KEY_BYTES = 32


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


def seal(content: bytes) -> str | None:
    """Returns the keyed digest of some bytes, None if the user's key cannot be kept.

    The key is made at the first call, in the default cache folder, readable by the user alone.

    Args:
      content: any bytes.
    """
    key = _read_key() or _make_key()
    return hmac.digest(key, content, "sha256").hex() if key else None


def is_sealed(content: bytes, digest: str) -> bool:
    """Returns True if this user's `seal` of the same bytes gave the digest."""
    key = _read_key()
    return bool(key) and hmac.compare_digest(
        hmac.digest(key, content, "sha256").hex().encode(), digest.encode(errors="replace")
    )


def _key_path() -> Path:
    return default_cache_dir() / f"seal-{os.geteuid()}.key"


def _read_key() -> bytes | None:
    """Returns the key; None without one, or if anybody else could have read or written it."""
    try:
        with files.open_regular(_key_path()) as file:
            status = os.fstat(file.fileno())
            key = file.read(KEY_BYTES + 1)
    except (OSError, ValueError):
        return None
    private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return key if private and len(key) == KEY_BYTES else None


def _make_key() -> bytes | None:
    """Writes a new key atomically. If two processes do so at once, both use the first key."""
    path = _key_path()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        if not files.exists(path):
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        if _read_key() is None:  # what is there is no key of this user's
            os.replace(partial, path)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return _read_key()
