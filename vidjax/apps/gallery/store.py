"""The file of a gallery: people, their clips, and the back end, in SQLite.

    gallery.sqlite            the tables of SCHEMA
    gallery.sqlite-journal    exists during a change, and after an interrupted change

A change is a single transaction. If it was interrupted, the next process that opens the file undoes
it. New clips are inserted. Any other change deletes all rows and inserts the new content:
`secure_delete` overwrites pages without rows, but other pages may contain copies of rows that
SQLite has moved between pages.

The file is untrusted. It must be a regular file with exactly the tables of SCHEMA, and the lengths
of its values are limited. A journal is checked before SQLite uses it, because it may name another
file, and SQLite would delete that file.
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
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vidjax.apps.gallery.backend import (
    MAX_BLOCK_PEOPLE,
    Backend,
    Index,
    People,
    from_numbers,
    sizes,
)
from vidjax.data.untrusted.names import check_name, normal_form, show
from vidjax.models.two_covariance import Settings
from vidjax.runs import schemas
from vidjax.utils import files
from vidjax.utils.errors import InUseError, UserError

GALLERY_FILE = "gallery.sqlite"
JOURNAL_FILE = f"{GALLERY_FILE}-journal"
PROBE = re.compile(r"\.write-test-[0-9a-f]{8}")  # of `files.make_folder`
FORMAT = 3  # `user_version` of the file
MAX_PARTS, MAX_VECTOR_WIDTH = 64, 16_384
MAX_NAME_LETTERS = 1000
MAX_VALUE_BYTES = 1 << 17  # of a text, a blob and a whole row
BACKEND_ROW_BYTES = 1 << 16  # of the numbers of the back end in a row
PAGE_BYTES = 1 << 16
FLOAT = np.dtype("<f4")
FETCHED_ROWS = 256  # rows that are read at a time; they fit into the cache of a processor
SCHEMA_SECONDS = 10.0  # limit for reading the schema
LOCK_SECONDS = 0.2  # how long a change waits for another change to end
WAIT_SECONDS = 60.0  # how long a change waits for readers, and a reader for the end of a change
STRANGER = ""  # the person of a stranger's clip; names of people are never empty
REMEDY = "put back a copy of the gallery, or create it again"
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # the end of a journal that names another file
SCHEMA = {
    "gallery": "(facts TEXT NOT NULL, sha256 BLOB NOT NULL)",
    "backend": "(place INTEGER PRIMARY KEY, numbers BLOB NOT NULL)",
    "person": "(name TEXT PRIMARY KEY NOT NULL, coefficients BLOB NOT NULL) WITHOUT ROWID",
    "clip": "(name TEXT PRIMARY KEY NOT NULL, person TEXT NOT NULL, fitted INTEGER NOT NULL, "
    "vector BLOB NOT NULL) WITHOUT ROWID",
}
CLIP_KINDS, PERSON_KINDS = (str, str, int, bytes), (str, bytes)


class VectorOrigin(Struct, frozen=True, omit_defaults=True):
    """The origin of the vectors of clips: a run, or models with cards.

    Attributes:
      workdir: the folder of the run, or of the models.
      digest: sha256 of the run's weights, or of all cards.
      centred: True if the run centres its vectors.
      cards: part -> `Card.digest` of the model that computes its vectors; empty for a run.
    """

    workdir: schemas.Text
    digest: schemas.Sha256
    centred: bool
    cards: Annotated[dict[str, schemas.Sha256], Meta(max_length=MAX_PARTS)] = {}


class _Part(Struct, omit_defaults=True):
    name: schemas.Text
    width: schemas.Size
    by_card: bool = False


class _Facts(Struct):
    version: schemas.Size
    run: VectorOrigin
    parts: Annotated[list[_Part], Meta(min_length=1, max_length=MAX_PARTS)]
    settings: dict[str, float]
    clips: schemas.Count
    people: schemas.Count
    rows: schemas.Sha256  # the sum of the digests of all other rows

    @property
    def widths(self) -> dict[str, int]:
        return {part.name: part.width for part in self.parts}


class StoredClip(NamedTuple):
    """A clip of a person or of a stranger.

    Attributes:
      identity: the person; None for a stranger.
      vector: [sum of D] float32, the joined vectors of all parts of the back end; 0 for missing
        parts.
      fitted: True if the back end was fitted to this clip.
    """

    identity: str | None
    vector: np.ndarray
    fitted: bool = False


class State(NamedTuple):
    """The whole content of a gallery; a state is never changed.

    Attributes:
      groups: identity -> the sorted names of its clips; STRANGER -> the names of strangers.
      rows: the sum of the digests of all rows; 0 before the state is written.
      sha256: the digest of the facts, which include `rows`; empty before the state is written.
    """

    version: int
    run: VectorOrigin
    index: Index  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)
    clips: Mapping[str, StoredClip]
    groups: Mapping[str, tuple[str, ...]]
    rows: int = 0
    sha256: bytes = b""

    @property
    def people(self) -> dict[str, tuple[str, ...]]:
        """The groups without the strangers, sorted by name."""
        return {name: clips for name, clips in sorted(self.groups.items()) if name != STRANGER}


def group(clips: Mapping[str, StoredClip]) -> dict[str, tuple[str, ...]]:
    """Returns identity -> names of clips, both sorted. Strangers have the identity STRANGER."""
    pairs = sorted((clip.identity or STRANGER, name) for name, clip in clips.items())
    return {
        identity: tuple(name for _, name in group_pairs)
        for identity, group_pairs in itertools.groupby(pairs, lambda pair: pair[0])
    }


class UnreadableError(UserError):
    """A file of a gallery is damaged, missing or of a different version.

    The message contains no name of a person.
    """


class UnwritableError(UserError):
    """A gallery can be read but not changed, for example on a read-only disk."""


class NoGalleryError(UnreadableError):
    """A folder has no gallery file, or the file is still empty."""


class Store:
    """Reads and writes the gallery in `folder`, an absolute path.

    A change returns when it is on the disk.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / GALLERY_FILE

    # ---- opening

    def foreign(self) -> str | None:
        """Returns the name of a file in the folder that no gallery writes, or None.

        Files of a process that was killed while it made a gallery do not count.
        """
        names = {*os.listdir(self.folder)} - {GALLERY_FILE, JOURNAL_FILE}
        return min((name for name in names if not PROBE.fullmatch(name)), default=None)

    def _no_gallery(self) -> NoGalleryError:
        command = "vidjax gallery create"
        make = f"make a gallery from a run: {command} {self.folder} --run=RUN"
        if files.exists(self.folder / "config.json"):
            make = f"it is a run; make a gallery from it: {command} NEW_FOLDER --run={self.folder}"
        return NoGalleryError(f"'{self.folder}' holds no gallery: is the path right?\n{make}")

    def _check_files(self, *, write: bool) -> None:
        """Refuses links, -wal and -shm files, and journals that name another file.

        A hard link is refused only with `write`.
        """
        try:
            status = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._no_gallery() from error
        if not stat.S_ISREG(status.st_mode):
            raise damaged(self.path, "it is not a regular file")
        if write and status.st_nlink > 1:
            raise UnwritableError(
                f"'{self.path}' has hard links, and a change would change these files, too\n"
                "copy the folder, and use the copy"
            )
        for ending in ("-wal", "-shm"):
            if files.exists(foreign := self.path.with_name(GALLERY_FILE + ending)):
                raise damaged(foreign, "a gallery never has this file")
        journal = self.path.with_name(JOURNAL_FILE)
        with contextlib.suppress(FileNotFoundError), files.open_regular(journal) as file:
            end = os.fstat(file.fileno()).st_size - len(SUPER_JOURNAL)
            file.seek(max(end, 0))  # the start is skipped: every journal begins with these bytes
            if end > 0 and file.read(len(SUPER_JOURNAL)) == SUPER_JOURNAL:
                raise damaged(journal, "it names another file")

    @contextlib.contextmanager
    def open(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Opens the file and begins a transaction. At the end, uncommitted changes are undone.

        SQLite first undoes an interrupted change, even if the file is only read. While the file is
        open with `write`, no other process can change the gallery.
        """
        self._check_files(write=write)
        with contextlib.closing(_connect(self.path)) as connection:
            with _translate_errors(self.path, write=write):
                if write:
                    connection.execute("PRAGMA synchronous=EXTRA")
                    connection.execute(f"PRAGMA busy_timeout={1000 * LOCK_SECONDS:.0f}")
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute(f"PRAGMA busy_timeout={1000 * WAIT_SECONDS:.0f}")
                else:
                    connection.execute("PRAGMA query_only=ON")
                    connection.execute("BEGIN")  # all queries then read the same state
                version, tables = _version(connection)
            if not write and (version, tables) == (0, []):
                raise self._no_gallery()
            if tables and version != FORMAT:
                raise UnreadableError(
                    f"'{self.path}' was written by another version of vidjax: it has the format "
                    f"{version}, not {FORMAT}\ncreate the gallery again"
                )
            if tables and tables != sorted(("table", name) for name in SCHEMA):
                raise damaged(self.path, "its tables are not the tables of a gallery")
            yield connection

    def remove_leftovers(self) -> None:
        """Deletes the journal of an interrupted change, which contains names and vectors.

        SQLite itself keeps the journal if the file had not changed.
        """
        with self.open(write=True), contextlib.suppress(FileNotFoundError):
            self.path.with_name(JOURNAL_FILE).unlink()

    # ---- reading

    def sha256(self) -> bytes:
        """Returns the sha256 of the state in the file. Different states have different values."""
        with self.open() as connection, _translate_errors(self.path):
            return _read_facts_row(connection)[1]

    def read(self) -> State:
        """Reads the file and checks it."""
        with self.open() as connection, _translate_errors(self.path), _pause_collection():
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise UserError("its pages are inconsistent")
            return _read(connection)

    # ---- writing

    def create(self, state: State) -> None:
        """Writes the first state into a new file, or into a file without tables."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with self.open(write=True) as connection:
            if _version(connection)[1]:
                raise UserError(f"'{self.folder}' holds a gallery: name another folder")
            with _translate_errors(self.path, write=True):
                for table, columns in SCHEMA.items():
                    connection.execute(f"CREATE TABLE {table} {columns}")
                connection.execute(f"PRAGMA user_version={FORMAT}")
            self.write(connection, state)

    def write(
        self,
        connection: sqlite3.Connection,
        state: State,
        new: Mapping[str, StoredClip] | None = None,
        people: People | None = None,
    ) -> State:
        """Writes a state and ends the transaction; returns the state with its digests.

        Args:
          connection: an open transaction.
          state: the new state. Its `sha256` is the digest of the state that it was made from.
          new, people: the only clips and people that differ from the file. They are inserted, and
            the other rows stay. If either is None or `state.rows` is 0, all rows are written.

        Raises:
          InUseError: the file has changed since the state was made.
        """
        with _translate_errors(self.path):
            changed = bool(state.sha256) and _read_facts_row(connection)[1] != state.sha256
        if changed:
            raise InUseError(f"gallery '{self.folder}' was changed meanwhile\ntry again")
        with _translate_errors(self.path, write=True):
            if new is not None and people is not None and state.rows:
                rows = state.rows - _take_out(connection, "clip", new)
                rows -= _take_out(connection, "person", people.names)
                rows += _insert(connection, "person", _make_person_rows(people))
                rows += _insert(connection, "clip", _make_clip_rows(new))
            else:
                for table in SCHEMA:
                    connection.execute(f"DELETE FROM {table}")
                numbers, size = state.index.backend.numbers().tobytes(), BACKEND_ROW_BYTES
                pieces = (numbers[at : at + size] for at in range(0, len(numbers), size))
                rows = _insert(connection, "backend", enumerate(pieces))
                blocks = map(_make_person_rows, state.index.blocks)
                rows += _insert(connection, "person", heapq.merge(*blocks))
                rows += _insert(connection, "clip", _make_clip_rows(state.clips))
            state = state._replace(rows=rows % (1 << 256))
            text = _facts(state)
            sha256 = hashlib.sha256(text.encode()).digest()
            connection.execute("DELETE FROM gallery")
            connection.execute("INSERT INTO gallery VALUES (?, ?)", (text, sha256))
            connection.execute("COMMIT")
        return state._replace(sha256=sha256)


@contextlib.contextmanager
def _pause_collection() -> Iterator[None]:
    """Stops the garbage collector, which would double the time of reading and free nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def damaged(path: Path, problem: str) -> UnreadableError:
    """Returns the error for a damaged file."""
    return UnreadableError(f"'{path}' is damaged: {problem}\n{REMEDY}")


@contextlib.contextmanager
def _translate_errors(path: Path, *, write: bool = False) -> Iterator[None]:
    """Turns errors of SQLite into OSError or UserError. Most mean that the file is damaged."""
    try:
        yield
    except UserError as error:
        raise damaged(path, str(error)) from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_BUSY"):
            raise InUseError(
                f"gallery '{path.parent}' is in use by another process\ntry again later"
            ) from error
        if name.startswith("SQLITE_READONLY") and write:
            raise UnwritableError(
                f"gallery '{path.parent}' cannot be changed: {error}\n"
                "copy it to a folder that you can write to"
            ) from error
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
            number = errno.ENOSPC if name == "SQLITE_FULL" else errno.EIO
            if write:
                raise OSError(number, f"cannot write '{path}': {error}") from error
            raise UnreadableError(f"cannot read '{path}': {error}") from error
        raise damaged(path, show(str(error))) from error


def _connect(path: Path) -> sqlite3.Connection:
    """Opens an existing, untrusted file in a way that no SQL in the file runs."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=WAIT_SECONDS, isolation_level=None
    )
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    for setting in ("trusted_schema=OFF", "cell_size_check=ON", "secure_delete=ON",
                    "temp_store=MEMORY", f"page_size={PAGE_BYTES}"):  # fmt: skip
        connection.execute(f"PRAGMA {setting}")
    return connection


def _version(connection: sqlite3.Connection) -> tuple[int, list[tuple[str, str]]]:
    """Returns the format version, and the (type, name) of every table, view and so on.

    SQLite reads the whole schema before it can be checked. There is a time limit because the pages
    of a forged file may refer to each other without end.
    """
    end = time.monotonic() + SCHEMA_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > end, 1000)
    ((version,),) = connection.execute("PRAGMA user_version").fetchall()
    tables = connection.execute("SELECT type, name FROM sqlite_master LIMIT 9").fetchall()
    ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
    connection.set_progress_handler(None, 0)
    if mode != "delete":
        raise UserError("its journal mode is not the mode of a gallery")
    return version, sorted(tables)


# ---- rows


def _digest(row: tuple[Any, ...]) -> int:
    """Returns the digest of a row. Its last value is bytes; the others are texts and numbers."""
    *words, content = row
    # Joins the bytes, because a copy of a few kilobytes takes less time than another call.
    text = "\n".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text + b"\n" + content).digest())


def _insert(connection: sqlite3.Connection, table: str, rows: Iterable[tuple[Any, ...]]) -> int:
    """Inserts rows; returns the sum of their digests."""
    total = 0

    def add_digests() -> Iterator[tuple[Any, ...]]:
        nonlocal total
        for row in rows:
            total += _digest(row)
            yield row

    places = ", ".join("?" * len(SCHEMA[table].split(",")))
    connection.executemany(f"INSERT INTO {table} VALUES ({places})", add_digests())
    return total


def _take_out(connection: sqlite3.Connection, table: str, names: Iterable[str]) -> int:
    """Deletes the rows with these names, if they exist; returns the sum of their digests."""
    total = 0
    for name in names:
        rows = connection.execute(f"SELECT * FROM {table} WHERE name = ?", (name,)).fetchall()
        connection.execute(f"DELETE FROM {table} WHERE name = ?", (name,))
        total += sum(map(_digest, rows))
    return total


def _make_clip_rows(clips: Mapping[str, StoredClip]) -> Iterator[tuple[str, str, int, bytes]]:
    for name in sorted(clips):
        clip = clips[name]
        yield name, clip.identity or STRANGER, int(clip.fitted), clip.vector.tobytes()


def _layout(widths: Iterable[int]) -> np.dtype:
    linear = [(f"linear_{part}", "<f4", (width,)) for part, width in enumerate(widths)]
    parts = (len(linear),)
    return np.dtype([("constant", "<f8", parts), ("num_clips", "<i4", parts), *linear])


def _make_person_rows(people: People) -> Iterator[tuple[str, bytes]]:
    """Yields (name, coefficients in the layout of `_layout`) of people, sorted by name."""
    _, linear, constant, count = people
    rows = np.empty(len(people.names), _layout(x.shape[1] for x in linear))
    for field, x in zip(rows.dtype.names or (), (constant.T, count.T, *linear), strict=True):
        rows[field] = x.reshape(rows[field].shape)
    for row in sorted(range(len(people.names)), key=people.names.__getitem__):
        yield people.names[row], rows[row].tobytes()


def _facts(state: State) -> str:
    backend = state.index.backend
    parts = [_Part(x.name, len(x.centre), x.distances is not None) for x in backend.parts]
    settings = {name: float(x) for name, x in backend.settings._asdict().items()}
    facts = _Facts(
        state.version, state.run, parts, settings,
        clips=len(state.clips), people=len(state.index.names), rows=f"{state.rows:064x}",
    )  # fmt: skip
    return json.dumps(msgspec.to_builtins(facts))


def _read_facts_row(connection: sqlite3.Connection) -> tuple[str, bytes]:
    rows = connection.execute("SELECT facts, sha256 FROM gallery LIMIT 2").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], str):
        raise UserError("its table 'gallery' is not a single row of text")
    return rows[0]


def _read(connection: sqlite3.Connection) -> State:
    text, sha256 = _read_facts_row(connection)
    if hashlib.sha256(text.encode()).digest() != sha256:
        raise UserError("its header does not match its sha256")
    facts = schemas.parse(Path(GALLERY_FILE), files.parse_json(text), _Facts, REMEDY)
    if missing := set(Settings._fields) - facts.settings.keys():
        raise UserError(f"its settings lack {min(missing)}")
    width = sum(facts.widths.values())
    if width > MAX_VECTOR_WIDTH or len(facts.widths) < len(facts.parts):
        raise UserError("its parts are too wide, or a name is repeated")
    backend, rows = _read_backend(connection, facts)
    clips, more = _read_clips(connection, 4 * width)
    people, others = _read_people(connection, _layout(facts.widths.values()))
    rows = (rows + more + others) % (1 << 256)
    groups, index = group(clips), Index(backend, people)
    if (f"{rows:064x}", len(clips), len(index.names)) != (facts.rows, facts.clips, facts.people):
        raise UserError("its rows do not match their digest")
    sizes = np.array([len(groups.get(name, ())) for name in index.names], np.int32)
    if groups.keys() - {STRANGER} != set(index.names) or (index.counts > sizes).any():
        raise UserError("its people do not match its clips")
    return State(facts.version, facts.run, index, clips, groups, rows, sha256)


def _read_backend(connection: sqlite3.Connection, facts: _Facts) -> tuple[Backend, int]:
    """Reads the back end; returns also the sum of the digests of its rows."""
    kinds = [(part.name, part.width, part.by_card) for part in facts.parts]
    size = 8 * sum(sum(sizes(width, by_card)) for _, width, by_card in kinds)
    content, total = bytearray(), 0
    for row in connection.execute("SELECT place, numbers FROM backend ORDER BY place"):
        if not isinstance(row[1], bytes) or len(content) + len(row[1]) > size:
            raise UserError("its back end has the wrong size")
        content += row[1]
        total += _digest(row)
    if len(content) != size:
        raise UserError("its back end has the wrong size")
    numbers = np.frombuffer(bytes(content), "<f8")
    settings = Settings(**{name: facts.settings[name] for name in Settings._fields})
    if not np.isfinite(numbers).all() or not all(map(math.isfinite, settings)):
        raise UserError("a parameter of its back end is NaN or infinite")
    backend = from_numbers(kinds, settings, numbers)
    if any(part.space is not None and np.any(part.space.ratio < 0) for part in backend.parts):
        raise UserError("a variance is below 0")
    if any(part.distances is not None and min(part.distances) <= 0 for part in backend.parts):
        raise UserError("a number of a card is not positive")
    return backend, total


def _read_clips(connection: sqlite3.Connection, size: int) -> tuple[dict[str, StoredClip], int]:
    """Reads the clips, whose vectors have `size` bytes; returns also the sum of their digests."""
    cursor = connection.execute("SELECT name, person, fitted, vector FROM clip")
    clips: dict[str, StoredClip] = {}
    total = 0
    while rows := cursor.fetchmany(FETCHED_ROWS):
        for row in rows:
            name, person, fitted, vector = row
            if tuple(map(type, row)) != CLIP_KINDS or len(vector) != size or fitted not in (0, 1):
                raise UserError("the row of a clip is malformed")
            _check_names(name, person)
            total += _digest(row)
            x = np.frombuffer(vector, FLOAT)
            clips[name] = StoredClip(None if person == STRANGER else person, x, bool(fitted))
        vectors = np.frombuffer(b"".join(row[3] for row in rows), FLOAT).reshape(len(rows), -1)
        if not np.isfinite(vectors).all():
            raise UserError("the vector of a clip contains NaN or infinity")
    return clips, total


def _check_names(name: str, person: str) -> None:
    try:
        check_name(name)
        valid = person == STRANGER or normal_form(check_name(person)) == person
    except UserError:  # its message contains the name, which must not enter the log of a server
        valid = False
    if not valid:
        raise UserError("the name of a clip or person is not valid")


def _read_people(connection: sqlite3.Connection, layout: np.dtype) -> tuple[list[People], int]:
    """Reads blocks of people; returns also the sum of the digests of their rows."""
    cursor = connection.execute("SELECT name, coefficients FROM person")
    blocks, total = [], 0
    while rows := cursor.fetchmany(MAX_BLOCK_PEOPLE):
        for row in rows:
            if tuple(map(type, row)) != PERSON_KINDS or len(row[1]) != layout.itemsize:
                raise UserError("the row of a person is malformed")
            total += _digest(row)
        columns = np.frombuffer(b"".join(row[1] for row in rows), layout)
        constant, count, *linear = (
            np.ascontiguousarray(columns[name]).reshape(len(rows), -1)
            for name in layout.names or ()
        )
        if not all(np.isfinite(x).all() for x in (*linear, constant)):
            raise UserError("the coefficients of a person contain NaN or infinity")
        if (count < 0).any():
            raise UserError("a number of clips is below 0")
        blocks.append(People(tuple(row[0] for row in rows), tuple(linear), constant.T, count.T))
    return blocks, total
