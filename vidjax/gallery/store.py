"""The file of a gallery: people, their clips, and the back end; a change is written whole or not.

    gallery.sqlite    the tables of SCHEMA, with a sha256 for every row but of `backend`
    .lock             locked by the process that changes the gallery

New clips are inserted in one transaction. To remove or change anything, a new file replaces the old
one: SQLite, even with `secure_delete`, leaves copies of rows that it moved between pages.

The file is untrusted. It must be a regular file of a known schema, without views and triggers, and
no value may be longer than vidjax writes one. Files beside it are checked before SQLite obeys them:
a journal may name another file, which SQLite would then delete.
"""

import contextlib
import errno
import gc
import hashlib
import heapq
import itertools
import json
import math
import os
import re
import secrets
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vidjax import files
from vidjax.data.untrusted.names import check_identity, check_name, show
from vidjax.errors import UserError
from vidjax.gallery import backend as backend_lib
from vidjax.gallery.backend import MOST_ROWS, Backend, Index, People
from vidjax.models.two_covariance import Settings
from vidjax.run import formats

NAME = "gallery.sqlite"
OLD_NAME = "manifest.json"  # of galleries before they were one file
OURS = re.compile(r"\.?gallery\.sqlite(\.[0-9a-f]+\.partial)?(-journal)?")
FORMAT = 2
MOST_PARTS, MOST_WIDTH = 64, 16_384
MOST_LETTERS = 1000  # of a name
VALUE_BYTES = 1 << 17  # of the longest text or blob, and of the longest row
PIECE = 1 << 13  # numbers of the back end in one row
PAGE_BYTES = 1 << 16
FLOAT = np.dtype("<f4")
CLIP_KINDS = (str, str, int, bytes, bytes)
FETCHED = 256  # clips that are read at a time, few enough to stay in the cache of a processor
SCHEMA_SECONDS = 10.0  # in which a schema of four tables is read
ROLLBACK_SECONDS = 0.3  # after which a journal is that of a change that was cut off
WAIT_SECONDS = 60.0  # for another process that is about to end its change
STRANGER = ""  # in place of the person, whose name is never empty
REMEDY = "put back a copy of the gallery, or create it anew"
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names another file
SCHEMA = {
    "gallery": "CREATE TABLE gallery (facts TEXT NOT NULL, sha256 BLOB NOT NULL)",
    "backend": "CREATE TABLE backend (place INTEGER PRIMARY KEY, numbers BLOB NOT NULL)",
    "person": "CREATE TABLE person (name TEXT PRIMARY KEY NOT NULL, coefficients BLOB NOT NULL, "
    "sha256 BLOB NOT NULL) WITHOUT ROWID",
    "clip": "CREATE TABLE clip (person TEXT NOT NULL, name TEXT NOT NULL, fitted INTEGER NOT NULL, "
    "vector BLOB NOT NULL, sha256 BLOB NOT NULL, PRIMARY KEY (person, name)) WITHOUT ROWID",
}
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 2000,
    sqlite3.SQLITE_LIMIT_COLUMN: 16,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 16,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class Origin(Struct, frozen=True, omit_defaults=True):
    """What makes the vectors of clips: a run, or models with cards.

    Attributes:
      workdir: the folder of the run, or of the models.
      digest: sha256 of the run's weights, or of all cards.
      centred: True if the run centres its vectors.
      cards: part -> `Card.digest` of the model that makes its vectors; empty for a run.
    """

    workdir: formats.Text
    digest: formats.Sha256
    centred: bool
    cards: Annotated[dict[str, formats.Sha256], Meta(max_length=MOST_PARTS)] = {}


class _Part(Struct, omit_defaults=True):
    name: formats.Text
    width: formats.Size
    scale: Annotated[float, Meta(gt=0, le=1)] = 1.0
    by_distance: bool = False


class _Facts(Struct):
    format: formats.Size
    token: formats.Text  # a random one tells this state from all others
    version: formats.Size
    run: Origin
    parts: Annotated[list[_Part], Meta(min_length=1, max_length=MOST_PARTS)]
    settings: dict[str, float]
    backend: formats.Sha256
    clips: formats.Count
    people: formats.Count

    @property
    def widths(self) -> dict[str, int]:
        return {part.name: part.width for part in self.parts}


class Clip(NamedTuple):
    """A clip of a person, or of a stranger, whose identity is None.

    `vector` [sum of D] float32 joins the vectors of all parts of the back end, 0 where it has none.
    `fitted` is True if the back end was fitted to this clip, among others.
    """

    identity: str | None
    vector: np.ndarray
    fitted: bool = False


class State(NamedTuple):
    """All that a gallery holds; nothing in it is ever changed.

    `groups` are identity -> the sorted names of its clips; those of strangers are under STRANGER.
    `sha256` is that of the row in table
    `gallery`, b"" before it is written.
    """

    version: int
    run: Origin
    index: Index  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)
    clips: Mapping[str, Clip]
    groups: Mapping[str, tuple[str, ...]]
    sha256: bytes = b""

    @property
    def people(self) -> dict[str, tuple[str, ...]]:
        """The groups without the strangers, sorted by name."""
        return {name: some for name, some in sorted(self.groups.items()) if name != STRANGER}


def group(clips: Mapping[str, Clip]) -> dict[str, tuple[str, ...]]:
    """Returns identity -> the names of its clips, both sorted; STRANGER -> those of strangers."""
    pairs = sorted((clip.identity or STRANGER, name) for name, clip in clips.items())
    return {
        identity: tuple(name for _, name in some)
        for identity, some in itertools.groupby(pairs, lambda pair: pair[0])
    }


class Store:
    """Reads and writes a gallery's `folder`, an absolute path; with `sync`, waits for the disk."""

    def __init__(self, folder: Path, *, sync: bool):
        self.folder, self.path = folder, folder / NAME
        self._sync = sync

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the lock of the gallery, for a change."""
        if not self.folder.is_dir():
            raise self._no_gallery()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.lock(self.folder, "gallery"))
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
                raise UserError(
                    f"gallery '{self.folder}' cannot be changed: {error.strerror}\n"
                    "copy it to a folder in which you may write"
                ) from error
            yield

    def foreign(self) -> str | None:
        """Returns the name of a file in the folder that is no gallery's; None if there is none."""
        names = sorted(entry.name for entry in os.scandir(self.folder))
        return next((n for n in names if n != ".lock" and not OURS.fullmatch(n)), None)

    def _no_gallery(self) -> UserError:
        if files.exists(self.folder / OLD_NAME):
            return UserError(
                f"'{self.folder}' is a gallery of an older version of vidjax\nmake it anew in "
                "another folder: vidjax gallery create FOLDER --run=RUN, then enrol"
            )
        command = "vidjax gallery create"
        make = f"a gallery is made of a run: {command} {self.folder} --run=RUN"
        if files.exists(self.folder / "config.json"):
            make = f"it is a run: {command} NEW_FOLDER --run={self.folder} makes a gallery of it"
        return UserError(f"'{self.folder}' holds no gallery: is the path right?\n{make}")

    # ---- opening

    def _check_files(self, *, write: bool) -> None:
        """Refuses links (hard links only to `write`), -wal and -shm files, and foreign journals."""
        try:
            status = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._no_gallery() from error
        if not stat.S_ISREG(status.st_mode):
            raise damaged(self.path, "it is a link, or no file")
        if write and status.st_nlink > 1:
            raise UserError(
                f"'{self.path}' is one file with several names (hard links): it is not changed, "
                "since the others would go on\ncopy the folder, and use the copy"
            )
        for ending in ("-wal", "-shm"):
            if files.exists(beside := self.path.with_name(NAME + ending)):
                raise damaged(beside, "no gallery has such a file")
        journal = self.path.with_name(NAME + "-journal")
        try:
            file = files.open_regular(journal)
        except FileNotFoundError:
            return
        with file:
            end = os.fstat(file.fileno()).st_size - len(SUPER_JOURNAL)
            file.seek(max(end, 0))  # a journal begins with the same bytes
            if end > 0 and file.read(len(SUPER_JOURNAL)) == SUPER_JOURNAL:
                raise damaged(journal, "it names another file")

    @contextlib.contextmanager
    def _opened(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Opens the file, read-only unless told otherwise, and checks its schema.

        To `write`, the caller must hold the lock. Otherwise another process may replace the file:
        SQLite would take the new file's journal for the old one's, play it back, and delete it.
        """
        began = time.monotonic()
        while True:
            self._check_files(write=write)
            mode = "rw" if write else "ro"
            with (
                _told(self.path, write=write),
                contextlib.closing(_connect(self.path, mode)) as connection,
            ):
                try:
                    if not write:
                        connection.execute("BEGIN")  # all that is read is of one state
                    self._check_schema(connection)
                except sqlite3.OperationalError as error:
                    late = time.monotonic() > began + WAIT_SECONDS
                    if late or _name(error) != "SQLITE_READONLY_ROLLBACK":
                        raise
                else:
                    yield connection
                    return
            # A journal is there: of another process's change, in a file that has replaced this one,
            # or of a change that was cut off. The latter is still there after a while.
            time.sleep(0.02)
            if time.monotonic() > began + ROLLBACK_SECONDS:
                if not os.access(self.folder, os.W_OK):
                    raise UserError(
                        f"a change of '{self.path}' was cut off, and you may not undo it\n"
                        "copy the folder to one in which you may write, and open the copy"
                    )
                with contextlib.suppress(UserError), self.lock():
                    self.recover()

    def recover(self) -> None:
        """Undoes an interrupted change and deletes its files; the caller holds the lock."""
        for entry in list(os.scandir(self.folder)):
            if OURS.fullmatch(entry.name) and ".partial" in entry.name:
                os.unlink(entry.path)
        if files.exists(self.path):
            with self._opened(write=True):  # SQLite plays the journal back
                pass

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Refuses tables that are not those of a gallery.

        SQLite reads the whole schema before anything can be checked. In a forged file, pages may
        name each other so often that reading would never end; hence the time limit.
        """
        end = time.monotonic() + SCHEMA_SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > end, 1000)
        found = connection.execute("SELECT type, name, sql FROM sqlite_master LIMIT 9").fetchall()
        wanted = {("table", name, sql) for name, sql in SCHEMA.items()}
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        encoding = connection.execute("PRAGMA encoding").fetchone()[0]
        connection.set_progress_handler(None, 0)
        if set(found) != wanted or len(found) > len(wanted):
            raise UserError("its tables are not those of a gallery of this version")
        if (mode, encoding) != ("delete", "UTF-8"):
            raise UserError("its settings are not those of a gallery")

    # ---- reading

    def sha256(self) -> bytes:
        """Returns the sha256 of the state in the file; no other state has it."""
        with self._opened() as connection:
            return _facts_row(connection)[1]

    def read(self) -> State:
        """Reads the file and checks it."""
        with self._opened() as connection, _no_collection():
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise UserError("its pages do not fit together")
            return _read(connection)

    # ---- writing; the caller holds the lock

    def insert(self, state: State, new: Mapping[str, Clip], people: People) -> bytes:
        """Adds `new` clips and the rows of `people`; returns the `sha256` of the new state."""
        with self._opened(write=True) as connection:
            connection.execute(f"PRAGMA synchronous={'EXTRA' if self._sync else 'OFF'}")
            connection.execute("BEGIN IMMEDIATE")
            gone = ((STRANGER, name) for name in new)
            connection.executemany("DELETE FROM clip WHERE person = ? AND name = ?", gone)
            connection.execute("DELETE FROM gallery")
            return _insert(connection, state, new, _person_rows(people))

    def replace(self, state: State) -> bytes:
        """Writes a state into a new file, in place of the old one; returns its `sha256`."""
        self.recover()  # no journal is left that would be played back into the new file
        partial = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}.partial")
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))
        try:
            with _told(self.path, write=True):
                sha256 = _write(partial, state)
            if self._sync:
                _force(partial)
            os.replace(partial, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if self._sync:
            try:
                _force(self.folder)
            except OSError as error:
                problem = f"'{self.folder}' is changed, but a power cut may undo it"
                raise OSError(error.errno, f"{problem}: {error.strerror}") from error
        return sha256


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector off objects that are all kept: half of the time of reading."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def damaged(path: Path, problem: str) -> UserError:
    """Returns the error of a file that is not what vidjax wrote."""
    return UserError(f"'{path}' is damaged: {problem}\n{REMEDY}")


def _force(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", "")


@contextlib.contextmanager
def _told(path: Path, *, write: bool) -> Iterator[None]:
    """Turns errors of SQLite into OSError or UserError; most mean that the file is damaged."""
    try:
        yield
    except UserError as error:
        raise damaged(path, str(error)) from error
    except sqlite3.Error as error:
        name = _name(error)
        if name.startswith("SQLITE_BUSY"):
            raise UserError(f"'{path}' is changed all the time\ntry again later") from error
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
            number = errno.ENOSPC if name == "SQLITE_FULL" else errno.EIO
            if write:
                raise OSError(number, f"cannot write '{path}': {error}") from error
            raise UserError(f"cannot read '{path}': {error}") from error
        raise damaged(path, show(str(error))) from error


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Opens an existing, untrusted file, so that no SQL in it runs."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, timeout=WAIT_SECONDS, isolation_level=None
    )
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    for setting in ("trusted_schema=OFF", "cell_size_check=ON", "secure_delete=ON",
                    "temp_store=MEMORY", "mmap_size=0"):  # fmt: skip
        connection.execute(f"PRAGMA {setting}")
    return connection


# ---- rows


def _facts(state: State) -> tuple[str, bytes]:
    backend = state.index.backend
    facts = _Facts(
        format=FORMAT,
        token=secrets.token_hex(16),
        version=state.version,
        run=state.run,
        parts=[
            _Part(part.name, len(part.centre), part.scale, part.by_distance)
            for part in backend.parts
        ],
        settings={name: float(x) for name, x in backend.settings._asdict().items()},
        backend=backend.sha256,
        clips=len(state.clips),
        people=sum(len(block.names) for block in state.index.blocks),
    )
    text = json.dumps(msgspec.to_builtins(facts))
    return text, hashlib.sha256(text.encode()).digest()


def _insert(
    connection: sqlite3.Connection,
    state: State,
    clips: Mapping[str, Clip],
    people: Iterable[tuple[str, bytes, bytes]],
) -> bytes:
    """Inserts clips, rows of people and the facts, commits, and returns the new `sha256`."""
    connection.executemany("INSERT INTO clip VALUES (?, ?, ?, ?, ?)", _clip_rows(clips))
    connection.executemany("REPLACE INTO person VALUES (?, ?, ?)", people)
    facts, sha256 = _facts(state)
    connection.execute("INSERT INTO gallery VALUES (?, ?)", (facts, sha256))
    connection.execute("COMMIT")
    return sha256


def _clip_rows(clips: Mapping[str, Clip]) -> Iterator[tuple[str, str, int, bytes, bytes]]:
    for name, clip in clips.items():
        words = (clip.identity or STRANGER, name, int(clip.fitted))
        vector = clip.vector.tobytes()
        yield *words, vector, _row_sha256(vector, *words)


def _row_sha256(content: bytes, *words: str | int) -> bytes:
    # Joined: for a few kilobytes a copy takes less time than another call.
    return hashlib.sha256(("%s\n" * len(words) % words).encode() + content).digest()


def _layout(widths: Iterable[int]) -> np.dtype:
    linear = [(f"linear_{part}", "<f4", (width,)) for part, width in enumerate(widths)]
    parts = (len(linear),)
    return np.dtype([("constant", "<f8", parts), ("num_clips", "<i4", parts), *linear])


def _person_rows(people: People) -> Iterator[tuple[str, bytes, bytes]]:
    """Yields (name, coefficients in the layout of `_layout`, sha256) of people, sorted by name."""
    _, linear, constant, count = people
    rows = np.empty(len(people.names), _layout(x.shape[1] for x in linear))
    for field, x in zip(rows.dtype.names or (), (constant.T, count.T, *linear), strict=True):
        rows[field] = x.reshape(rows[field].shape)
    for row in sorted(range(len(people.names)), key=people.names.__getitem__):
        content = rows[row].tobytes()
        yield people.names[row], content, _row_sha256(content, people.names[row])


def _write(path: Path, state: State) -> bytes:
    numbers = state.index.backend.numbers()
    with contextlib.closing(_connect(path, "rw")) as connection:
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode=OFF")  # the file is nobody's yet
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("BEGIN")
        for sql in SCHEMA.values():
            connection.execute(sql)
        pieces = (numbers[at : at + PIECE].tobytes() for at in range(0, len(numbers), PIECE))
        connection.executemany("INSERT INTO backend VALUES (?, ?)", enumerate(pieces))
        order = sorted(state.groups.items())
        clips = {name: state.clips[name] for _, names in order for name in names}
        people = heapq.merge(*map(_person_rows, state.index.blocks))
        return _insert(connection, state, clips, people)


def _read(connection: sqlite3.Connection) -> State:
    facts, sha256 = _read_facts(connection)
    width = sum(facts.widths.values())
    if width > MOST_WIDTH or len(facts.widths) < len(facts.parts):
        raise UserError("its parts are too wide, or named twice")
    backend = _read_backend(connection, facts)
    clips = _read_clips(connection, 4 * width)
    groups = group(clips)
    index = Index(backend, _read_people(connection, _layout(facts.widths.values())))
    sizes = np.array([len(groups.get(name, ())) for name in index.names], np.int32)
    if groups.keys() - {STRANGER} != set(index.names) or (index.counts > sizes).any():
        raise UserError("its people are others than those whom its clips show")
    if (len(clips), len(sizes)) != (facts.clips, facts.people):
        raise UserError("it has another number of people or clips than it says")
    return State(facts.version, facts.run, index, clips, groups, sha256)


def _facts_row(connection: sqlite3.Connection) -> tuple[str, bytes]:
    rows = connection.execute("SELECT facts, sha256 FROM gallery LIMIT 2").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], str):
        raise UserError("it has no facts")
    return rows[0]


def _read_facts(connection: sqlite3.Connection) -> tuple[_Facts, bytes]:
    text, sha256 = _facts_row(connection)
    if hashlib.sha256(text.encode()).digest() != sha256:
        raise UserError("the sha256 of its facts is another")
    value = files.parse_json(text)
    if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
        raise UserError("it is of another version of vidjax: use that version for it")
    facts = formats.parse(Path(NAME), value, _Facts, REMEDY)
    if missing := set(Settings._fields) - facts.settings.keys():
        raise UserError(f"its settings lack {min(missing)}")
    return facts, sha256


def _read_backend(connection: sqlite3.Connection, facts: _Facts) -> Backend:
    size = 8 * backend_lib.num_numbers(facts.widths)
    content = bytearray()
    for place, (number, piece) in enumerate(
        connection.execute("SELECT place, numbers FROM backend ORDER BY place")
    ):
        if number != place or not isinstance(piece, bytes) or len(content) + len(piece) > size:
            raise UserError("its back end has another size")
        content += piece
    if len(content) != size or hashlib.sha256(content).hexdigest() != facts.backend:
        raise UserError("its back end is not what it says")
    numbers = np.frombuffer(bytes(content), "<f8")
    settings = Settings(**{name: facts.settings[name] for name in Settings._fields})
    if not np.isfinite(numbers).all() or not all(map(math.isfinite, settings)):
        raise UserError("its back end holds a number that is not finite")
    backend = backend_lib.from_numbers(facts.widths, settings, numbers)
    told = zip(backend.parts, facts.parts, strict=True)
    parts = (part._replace(scale=x.scale, by_distance=x.by_distance) for part, x in told)
    backend = Backend(tuple(parts), settings)
    if any(np.any(part.space.ratio < 0) for part in backend.parts):
        raise UserError("a variance is below 0")
    return backend


def _read_clips(connection: sqlite3.Connection, size: int) -> dict[str, Clip]:
    cursor = connection.execute("SELECT person, name, fitted, vector, sha256 FROM clip")
    clips: dict[str, Clip] = {}
    while rows := cursor.fetchmany(FETCHED):
        for row in rows:
            person, name, fitted, vector, sha256 = row
            kinds = tuple(map(type, row))
            if kinds != CLIP_KINDS or len(vector) != size or fitted not in (0, 1):
                raise UserError("a clip is not what vidjax writes")
            if _row_sha256(vector, person, name, fitted) != sha256:
                raise UserError(f"the sha256 of clip '{show(name)}' is another")
            check_name(name)
            if person != STRANGER:
                check_identity(person)
            if name in clips:
                raise UserError(f"clip '{show(name)}' is named twice")
            x = np.frombuffer(vector, FLOAT)
            clips[name] = Clip(None if person == STRANGER else person, x, bool(fitted))
        vectors = np.frombuffer(b"".join(row[3] for row in rows), FLOAT).reshape(len(rows), -1)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            name = show(rows[int(np.argmin(finite))][1])
            raise UserError(f"the vector of clip '{name}' holds a number that is not finite")
    return clips


def _read_people(connection: sqlite3.Connection, layout: np.dtype) -> list[People]:
    cursor = connection.execute("SELECT name, coefficients, sha256 FROM person")
    found = []
    while rows := cursor.fetchmany(MOST_ROWS):
        for row in rows:
            if tuple(map(type, row)) != (str, bytes, bytes) or len(row[1]) != layout.itemsize:
                raise UserError("a person is not what vidjax writes")
            if _row_sha256(row[1], row[0]) != row[2]:
                raise UserError(f"the sha256 of person '{show(row[0])}' is another")
        columns = np.frombuffer(b"".join(row[1] for row in rows), layout)
        constant, count, *linear = (
            np.ascontiguousarray(columns[name]).reshape(len(rows), -1)
            for name in layout.names or ()
        )
        if not all(np.isfinite(x).all() for x in (*linear, constant)):
            raise UserError("the coefficients of a person hold a number that is not finite")
        if (count < 0).any():
            raise UserError("a number of clips is below 0")
        found.append(People(tuple(row[0] for row in rows), tuple(linear), constant.T, count.T))
    return found
