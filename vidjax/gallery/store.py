"""The folder of a gallery: a manifest, the front, and buckets of clips.

    manifest.json            version, run, settings; the sha256 of every other file
    front-SHA.numbers        the coordinates
    clips-BITS-SHA.numbers   some people and strangers: names, vectors, coefficients
    .lock                    the process that changes the gallery

A file is named after its content. A change writes new files, then replaces the manifest, then
deletes the files that it does not name: a process that is killed leaves the old state or the new
one, and the next change deletes what else it left. No file holds anything of a removed clip.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vidjax import files
from vidjax.gallery import blocks as blocks_lib
from vidjax.gallery import manifest as manifest_lib
from vidjax.gallery.blocks import Block
from vidjax.gallery.contents import Contents
from vidjax.gallery.coordinates import threads
from vidjax.gallery.front import Front
from vidjax.gallery.manifest import Bucket, Manifest, Origin
from vidjax.run import workdir as workdir_lib

OURS = re.compile(r"\.?(manifest\.json|(front|clips-[01]*)-[0-9a-f]{16}\.numbers)(\.\d+\.partial)?")
BUCKET_BYTES = 1 << 19  # vectors of the largest bucket, unless 8 clips or one person have more
MOST_TRIES = 20  # of reading a gallery that other processes change meanwhile


class State(NamedTuple):
    """All that a gallery holds.

    Attributes:
      version: number of changes, creation included.
      run: the run that makes vectors.
      front: coordinates and settings.
      contents: the clips.
    """

    version: int
    run: Origin
    front: Front
    contents: Contents


def most_clips(width: int) -> int:
    """Returns the number of clips of the largest bucket; width: sum of D over the parts."""
    return max(8, BUCKET_BYTES // (4 * width))


def _front_name(sha256: str) -> str:
    return f"front-{sha256[:16]}.numbers"


def _bucket_name(bits: str, sha256: str) -> str:
    return f"clips-{bits}-{sha256[:16]}.numbers"


def _files_of(manifest: Manifest) -> set[str]:
    """Returns the names of all files of a gallery but the lock."""
    names = {_bucket_name(bucket.bits, bucket.sha256) for bucket in manifest.buckets}
    return names | {_front_name(manifest.front), manifest_lib.NAME}


class Store:
    """A gallery's folder.

    Attributes:
      folder: its absolute path.
    """

    def __init__(self, folder: Path, *, sync: bool):
        """Takes a folder; nothing is read yet.

        Args:
          folder: the gallery, an absolute path.
          sync: whether a change waits until the disk has it, so that a power cut, too, leaves the
            old state or the new one.
        """
        self.folder = folder
        self._sync = sync
        self._content = b""  # of the manifest
        self._manifest: Manifest | None = None
        self._named = {manifest_lib.NAME}  # the files of the gallery

    @property
    def path(self) -> Path:
        """The manifest."""
        return self.folder / manifest_lib.NAME

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the gallery for a change.

        Raises:
          ValueError: another process changes it; the error names the process.
        """
        if not self.folder.is_dir():
            raise self._no_gallery()
        return workdir_lib.lock(self.folder, "gallery")

    def foreign(self) -> str | None:
        """Returns the name of something in the folder that no gallery has; None if there is not."""
        names = sorted(entry.name for entry in os.scandir(self.folder))
        return next((n for n in names if n != ".lock" and not OURS.fullmatch(n)), None)

    def is_current(self) -> bool:
        """Returns True if the folder holds what was read or written last.

        Raises:
          ValueError: the folder holds no gallery.
        """
        return self._read_manifest() == self._content

    def _no_gallery(self) -> ValueError:
        return ValueError(
            f"'{self.folder}' holds no gallery\n"
            f"make one: python -m vidjax.gallery create {self.folder} --run=W"
        )

    def _read_manifest(self) -> bytes:
        try:
            return files.read_bytes(self.path, manifest_lib.BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._no_gallery() from error

    def read(self) -> State:
        """Reads a gallery and checks it.

        Raises:
          ValueError: there is none, or it is damaged; the error names the file.
        """
        for _ in range(MOST_TRIES):
            content = self._read_manifest()
            try:
                return self._read(content)
            except FileNotFoundError as error:
                if self._read_manifest() == content:
                    missing = Path(error.filename)
                    raise manifest_lib.damaged(missing, "it is missing") from error
        raise ValueError(f"gallery '{self.folder}' is changed all the time\ntry again later")

    def _read(self, content: bytes) -> State:
        manifest = manifest_lib.parse(self.path, content)
        front = manifest_lib.read_front(self.folder / _front_name(manifest.front), manifest)

        def block_of(bucket: Bucket) -> Block:
            path = self.folder / _bucket_name(bucket.bits, bucket.sha256)
            return manifest_lib.read_block(path, bucket, manifest.widths)

        names = [bucket.bits for bucket in manifest.buckets]
        blocks = dict(zip(names, threads().map(block_of, manifest.buckets), strict=True))
        try:
            contents = Contents(most_clips(sum(manifest.widths.values())), blocks)
        except ValueError as error:
            raise manifest_lib.damaged(self.path, str(error)) from error
        if len(blocks) < len(names):
            raise manifest_lib.damaged(self.path, "a file of clips is named twice")
        self._content, self._manifest = content, manifest
        self._named = _files_of(manifest)
        return State(manifest.version, manifest.run, front, contents)

    def write(
        self,
        version: int,
        run: Origin,
        front: Front,
        *,
        gone: Iterable[str],
        new: Iterable[tuple[str, Block]],
        refitted: bool = False,
    ) -> None:
        """Brings the folder to a new state; the caller holds the lock.

        Args:
          version: number of changes, this one included.
          run: the run that makes vectors.
          front: coordinates and settings.
          gone: prefixes of blocks that are no more, or are others.
          new: prefix and block of those that come, one by one.
          refitted: whether the front has changed.

        Raises:
          OSError: a file cannot be written; the old state is there then.
        """
        old = self._manifest
        buckets = {bucket.bits: bucket for bucket in old.buckets} if old else {}
        for bits in gone:
            buckets.pop(bits, None)
        written: list[Path] = []
        content = b""
        try:
            for bits, block in new:
                file = blocks_lib.to_bytes(block)
                sha256 = hashlib.sha256(file).hexdigest()
                self._put(_bucket_name(bits, sha256), file, written)
                buckets[bits] = Bucket(bits, len(block.people), block.num_clips, sha256)
            front_sha = old.front if old else ""
            if refitted or not old:
                file = manifest_lib.front_bytes(front)
                front_sha = hashlib.sha256(file).hexdigest()
                self._put(_front_name(front_sha), file, written)
            ordered = tuple(buckets[bits] for bits in sorted(buckets))
            latest = Manifest(version, run, front.widths, front.settings, front_sha, ordered)
            content = manifest_lib.to_bytes(latest)
            workdir_lib.write_bytes(self.path, content, sync=self._sync)
        except BaseException:
            if not content or not files.exists(self.path) or self._read_manifest() != content:
                for path in written:
                    path.unlink(missing_ok=True)
            raise
        self._manifest, self._named = latest, _files_of(latest)
        self.sweep()
        self._content = content  # at last: where this does not happen, the next change reads anew

    def _put(self, name: str, content: bytes, written: list[Path]) -> None:
        """Writes a file; one that the manifest names already has this content."""
        if name not in self._named:
            written.append(self.folder / name)
            workdir_lib.write_bytes(written[-1], content, sync=self._sync)

    def sweep(self) -> None:
        """Deletes files of changes that were killed, and of earlier versions.

        The caller holds the lock, and the folder `is_current`.
        """
        for entry in list(os.scandir(self.folder)):
            if entry.name not in self._named and OURS.fullmatch(entry.name):
                os.unlink(entry.path)
        if self._sync:
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
