"""Reads and writes the file of a gallery, an SQLite database.

    gallery.sqlite            the tables of SCHEMA
    gallery.sqlite-journal    exists during a change, and after an interrupted change

For speed, a row of a table contains many people or clips. The column `words` contains their names,
one on each line. The column `numbers` contains an array with their vectors and other numbers.

A change is a single transaction. The next process that opens the file undoes an interrupted change.
An enrolment adds people and clips at the end of their tables. If a name occurs several times in a
table, its last entry counts. Any other change deletes all rows and inserts the new content, so
that no byte of a removed person remains. (The setting `secure_delete` of SQLite is not enough: if
SQLite has moved a row, a copy of the row may remain in the file.)

The file may be forged. So it must be a regular file with exactly the tables of SCHEMA, and the
lengths of its values are limited. A journal is checked before SQLite uses it, because a journal may
contain the path of another file, which SQLite would delete.
"""

import contextlib
import errno
import fcntl
import gc
import hashlib
import itertools
import json
import os
import re
import shlex
import sqlite3
import stat
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vidjax.apps.gallery.backend import Backend, Kind, People, from_numbers
from vidjax.apps.gallery.index import MAX_BLOCK_PEOPLE, Index
from vidjax.apps.server_limits import LOCK_SECONDS
from vidjax.models.two_covariance import Settings
from vidjax.utils import files, json_files
from vidjax.utils.errors import InUseError, UserError, check_argument
from vidjax.utils.groups import group_by_key
from vidjax.utils.json_files import Count, Sha256, Size, Text
from vidjax.utils.names import check_name, normal_form, show

GALLERY_FILE = "gallery.sqlite"
JOURNAL_FILE = f"{GALLERY_FILE}-journal"
PROBE = re.compile(r"\.write-test-[0-9a-f]{8}")  # a file that `files.make_folder` may leave
FORMAT = 4  # version of the format, the `user_version` of the database
MAX_PARTS, MAX_VECTOR_WIDTH = 64, 16_384
MAX_NAME_LETTERS = 1000
MAX_VALUE_BYTES = 1 << 26  # largest text, blob and row
ROW_BYTES = 1 << 19  # largest array of numbers that is written to a row
PAGE_BYTES = 1 << 16
SCHEMA_SECONDS = 10.0  # limit for reading the schema
RETRY_SECONDS = 0.005  # between two attempts to begin a change
WAIT_SECONDS = 60.0  # how long a change waits for readers, and a reader for the end of a change
STRANGER = ""  # the person of a clip of a stranger; names of people are never empty
REMEDY = "put back a copy of the gallery, or create it again"
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # ends a journal that contains a path
ROWS = "(place INTEGER PRIMARY KEY, words TEXT NOT NULL, numbers BLOB NOT NULL)"
SCHEMA = {
    "gallery": "(facts TEXT NOT NULL, sha256 BLOB NOT NULL)",
    "backend": ROWS,  # without words
    "person": ROWS,  # the names
    "clip": ROWS,  # the names, and then the people
}
ROW_KINDS = (int, str, bytes)
Finite = Annotated[float, Meta(ge=json_files.LOWEST_FLOAT, le=-json_files.LOWEST_FLOAT)]
BACKEND_LAYOUT = np.dtype([("number", "<f8")])


class VectorOrigin(Struct, frozen=True, omit_defaults=True):
    """A description of the training run or the nets that computed the vectors of the clips."""

    workdir: Text  # the folder of the run or of the models
    digest: Sha256  # the sha256 of the weights of the run, or of `cards`
    centred: bool  # True if the run subtracts a centre from its vectors
    # Modality -> the sha256 of the JSON file that describes its model. Empty for a run.
    cards: Annotated[dict[str, Sha256], Meta(max_length=MAX_PARTS)] = {}
    # True for a PLDA run whose settings the gallery does not use, see `Gallery.create`.
    refitted: bool = False
    # True if photos show that the model of faces does not separate people, see `card_check`.
    blind: bool = False
    # True if the card of the model of faces has default numbers, which nobody has measured.
    unmeasured: bool = False

    @property
    def counts_every_clip(self) -> bool:
        """Whether similar clips may count as independent, see `of_plda` in `enrolment.enrol`."""
        return self.centred and not self.refitted


class _Facts(Struct, omit_defaults=True):
    version: Size
    origin: VectorOrigin = msgspec.field(name="run")
    parts: Annotated[list[Kind], Meta(min_length=1, max_length=MAX_PARTS)]
    settings: dict[str, Finite]
    clips: Count
    people: Count
    rows: Sha256  # the sum of the digests of all other rows
    command: Text = ""  # see `State`


class StoredClip(NamedTuple):
    """A clip of a person or of a stranger, with its vector."""

    identity: str | None  # the person; None for a stranger
    vector: np.ndarray  # [sum of D] float32, of all modalities; zeros for a missing modality
    fitted: bool = False  # True if the parameters that compare vectors were fitted to this clip


class State(NamedTuple):
    """The whole content of a gallery. A change of the gallery makes a new state, and edits none.

    `Store.write` sets `rows`, `entries` and `sha256`, which describe the file of the gallery.
    """

    version: int  # the number of changes, including the creation
    origin: VectorOrigin  # the run or the models that computed the vectors
    index: Index  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)
    clips: Mapping[str, StoredClip]  # name -> clip, including clips of strangers
    # Identity -> sorted names of its clips. STRANGER is the key of the clips of strangers.
    clips_of: Mapping[str, tuple[str, ...]]
    command: str = ""  # the only command that may change the gallery; "": any command may
    rows: int = 0  # the sum of the sha256 of all rows of the tables, which shows damaged rows
    entries: int = 0  # the number of people and clips in the file, including outdated entries
    sha256: bytes = b""  # of the whole content
    # Whether films show that the model of faces separates people, see `Gallery.check_apart`; None
    # if they show nothing. It is not in the file.
    separates: bool | None = None

    @property
    def strangers(self) -> tuple[str, ...]:
        """The sorted names of the clips of strangers."""
        return self.clips_of.get(STRANGER, ())

    @property
    def people(self) -> dict[str, tuple[str, ...]]:
        """The people, sorted by name, without strangers: name -> sorted names of the clips."""
        return {name: clips for name, clips in sorted(self.clips_of.items()) if name != STRANGER}

    def stack_parts(self, names: Sequence[str]) -> list[np.ndarray]:
        """Returns the vectors of N enrolled clips, an array [N, D] for each of M modalities."""
        backend = self.index.backend
        return backend.split(stack_vectors(names, self.clips, sum(backend.widths.values())))


def list_clips_of(clips: Mapping[str, StoredClip]) -> dict[str, tuple[str, ...]]:
    """Groups clips by person: returns name of a person -> sorted names of the clips.

    The key of the clips of strangers is STRANGER.
    """
    clips_of = group_by_key((clip.identity or STRANGER, name) for name, clip in clips.items())
    return {identity: tuple(sorted(names)) for identity, names in clips_of.items()}


def stack_vectors(names: Sequence[str], clips: Mapping[str, StoredClip], width: int) -> np.ndarray:
    """Returns the vectors of the clips `names`, in this order, [N, width] float32.

    `clips` are name -> clip. A vector contains all modalities.
    """
    vectors = [clips[name].vector for name in names]
    return np.array(vectors, np.float32).reshape(len(names), width)


class UnreadableError(UserError):
    """A file of a gallery is damaged, missing or of another version.

    The message contains no name of a person, because a server writes it to its log.
    """


class UnwritableError(UserError):
    """A gallery can be read but not changed, for example on a read-only disk."""


class ResultError(UserError):
    """A gallery is a result of another command, so only this command can change it."""


class UncertainWriteError(OSError):
    """A change was written, but the disk failed at the end, so a power cut may undo the change."""


class NoGalleryError(UnreadableError):
    """A folder contains no gallery file, or an empty gallery file."""


class Store:
    """Reads and writes the file of the gallery in `folder`."""

    def __init__(self, folder: str | Path):
        check_argument("Gallery: folder", folder, (str, os.PathLike), "the path of a folder")
        self.folder = files.local(folder).absolute()
        self.path = self.folder / GALLERY_FILE

    # ---- opening

    def check_new(self) -> None:
        """Raises UserError if the folder contains files, for example another gallery.

        Files that a killed process has left do not count.
        """
        if not self.folder.is_dir():
            return
        ours = {GALLERY_FILE, JOURNAL_FILE}
        foreign = [x for x in os.listdir(self.folder) if x not in ours and not PROBE.fullmatch(x)]
        if foreign:
            raise UserError(
                f"'{self.folder}' is not empty: it contains '{show(min(foreign))}'\n"
                f"{self._advise_on_run() or 'name a new folder'}"
            )
        with contextlib.suppress(NoGalleryError):
            self.sha256()
            raise UserError(f"'{self.folder}' already contains a gallery: name another folder")

    def _advise_on_run(self) -> str:
        """Returns a text: how to make a gallery from the run in the folder. "" without a run."""
        if not files.exists(self.folder / "config.json"):
            return ""
        command = f"vidjax gallery create NEW_FOLDER --run={shlex.quote(str(self.folder))}"
        return f"it is a run; make a gallery from it: {command}"

    def _no_gallery(self) -> NoGalleryError:
        command = f"vidjax gallery create {shlex.quote(str(self.folder))} --models=DIR"
        advice = self._advise_on_run() or f"to make a gallery: {command} (or --run=RUN)"
        # A user may name the folder of `vidjax who`, or the file of a gallery.
        for folder in (self.folder / "gallery", self.folder.parent):
            if files.exists(folder / GALLERY_FILE):
                advice = f"did you mean '{folder}'?"
        return NoGalleryError(
            f"'{self.folder}' contains no gallery: name the folder of a gallery\n{advice}"
        )

    def _check_files(self, *, write: bool) -> None:
        """Raises UserError if the gallery file is missing or unsafe or, if `write`, a hard link."""
        try:
            status = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._no_gallery() from error
        if not stat.S_ISREG(status.st_mode):
            raise damaged(self.path, "it is not a regular file")
        if write and status.st_nlink > 1:
            raise UnwritableError(
                f"the file '{self.path}' has hard links, and a change would change them, too\n"
                "copy the folder, and use the copy"
            )
        for ending in ("-wal", "-shm"):
            if files.exists(foreign := self.path.with_name(GALLERY_FILE + ending)):
                raise UnreadableError(
                    f"'{foreign}' was written by another program, not by vidjax\n{REMEDY}"
                )
        journal = self.path.with_name(JOURNAL_FILE)
        with contextlib.suppress(FileNotFoundError), files.open_regular(journal) as file:
            end = os.fstat(file.fileno()).st_size - len(SUPER_JOURNAL)
            file.seek(max(end, 0))  # only the end matters: every journal begins with these bytes
            if end > 0 and file.read(len(SUPER_JOURNAL)) == SUPER_JOURNAL:
                raise damaged(journal, "it is not from vidjax: it makes SQLite delete another file")

    @contextlib.contextmanager
    def open(
        self, *, write: bool = False, wait: float = LOCK_SECONDS
    ) -> Iterator[sqlite3.Connection]:
        """Opens the file and begins a transaction, which may change the gallery if `write` is True.

        At the beginning, SQLite undoes an interrupted change of another process. At the end of the
        `with` block, changes without a COMMIT are undone. If `write` is True, no other process can
        change the gallery during the block. Raises InUseError if another process is changing the
        gallery, and does not finish within `wait` seconds.
        """
        self._check_files(write=write)
        with contextlib.closing(_connect(self.path)) as connection:
            with _translate_errors(self.path, write=write):
                if write:
                    connection.execute("PRAGMA synchronous=EXTRA")
                    _begin_change(connection, time.monotonic() + wait)
                else:
                    connection.execute("PRAGMA query_only=ON")
                    connection.execute("BEGIN")  # all queries then read the same state
                version, tables = _version(connection)
            if not write and not version and not tables:
                raise self._no_gallery()
            if version > FORMAT:
                raise UnreadableError(
                    f"'{self.path}' was written by a newer version of vidjax, with the format "
                    f"{version} instead of {FORMAT}\ninstall the newest version of vidjax"
                )
            wanted = {f"CREATE TABLE {name} {columns}" for name, columns in SCHEMA.items()}
            if tables and (version != FORMAT or tables != wanted):
                raise damaged(self.path, "its tables are not the tables of a gallery")
            yield connection

    def remove_leftovers(self) -> None:
        """Deletes the journal of a killed process, if no other process uses the gallery."""
        # SQLite keeps the journal of a change that was interrupted before it changed the file.
        in_use = contextlib.suppress(InUseError, UnwritableError, OSError)
        with in_use, self.open(write=True, wait=0):
            self.path.with_name(JOURNAL_FILE).unlink(missing_ok=True)

    # ---- reading

    def sha256(self) -> bytes:
        """Reads the stored sha256 of the gallery's content. The content itself is not read."""
        with self.open() as connection, _translate_errors(self.path):
            return _read_facts_row(connection)[1]

    def read(self) -> State:
        """Reads and checks the whole file; returns the content.

        Raises UnreadableError if the file is damaged.
        """
        with self.open() as connection, _translate_errors(self.path), _pause_collection():
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise UserError("quick_check of SQLite finds damaged pages")
            return _read(connection)

    # ---- writing

    def create(self, state: State) -> None:
        """Makes the folder and the file, and writes the first content, `state`.

        The file may exist if it has no tables. Raises UserError if the folder contains other files,
        or a gallery.
        """
        files.make_folder(self.folder, "gallery:", mode=0o700)
        self.check_new()
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with self.open(write=True) as connection:
            if _version(connection)[1]:
                raise UserError(f"'{self.folder}' already contains a gallery: name another folder")
            self.write(connection, state)

    def write(
        self,
        connection: sqlite3.Connection,
        state: State,
        new: Mapping[str, StoredClip] | None = None,
        people: Sequence[People] = (),
    ) -> State:
        """Writes the content of a gallery, and ends the transaction.

        Args:
          connection: the result of `open`.
          state: the new content.
          new: name -> clip, for the clips that differ from the file.
          people: the people who differ from the file, in blocks.

        Adds `new` and `people` at the end of the tables. Old entries of the same names stay in the
        file, but are outdated. Writes all rows again if `new` is None, or if about half of all
        entries would be outdated.

        Returns `state` with the new values of `rows`, `entries` and `sha256`.
        """
        index, clips, rows, entries = state.index, state.clips, state.rows, state.entries
        blocks, most = index.blocks, 2 * (len(clips) + len(index.names))
        with _translate_errors(self.path, write=True):
            if new is not None and entries + len(new) < most:
                blocks, clips = people, new
            else:
                rows = entries = 0
                for table, columns in SCHEMA.items():
                    connection.execute(f"DROP TABLE IF EXISTS {table}")
                    connection.execute(f"CREATE TABLE {table} {columns}")
                connection.execute(f"PRAGMA user_version={FORMAT}")
                numbers = index.backend.numbers().view(BACKEND_LAYOUT)
                rows += _append(connection, "backend", [], numbers)
            for block in blocks:
                rows += _append(connection, "person", [block.names], _pack_people(block))
            names = sorted(clips)
            for at in range(0, len(names), MAX_BLOCK_PEOPLE):
                some = names[at : at + MAX_BLOCK_PEOPLE]
                packed = _pack_clips([clips[name] for name in some])
                owners = [clips[name].identity or STRANGER for name in some]
                rows += _append(connection, "clip", [some, owners], packed)
            entries += len(names) + sum(len(block.names) for block in blocks)
            state = state._replace(rows=rows % (1 << 256), entries=entries)
            text = _facts(state)
            sha256 = hashlib.sha256(text.encode()).digest()
            connection.execute("DELETE FROM gallery")
            connection.execute("INSERT INTO gallery VALUES (?, ?)", (text, sha256))
            connection.execute("COMMIT")
        return state._replace(sha256=sha256)


@contextlib.contextmanager
def _pause_collection() -> Iterator[None]:
    # The garbage collector would double the time of reading, and free nothing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def damaged(path: Path, problem: str) -> UnreadableError:
    """Returns the error for a damaged file. `problem` is what is wrong with the file `path`."""
    return UnreadableError(f"'{path}' is damaged: {problem}\n{REMEDY}")


@contextlib.contextmanager
def _translate_errors(path: Path, *, write: bool = False) -> Iterator[None]:
    """Turns errors of SQLite into OSError or UserError with a message for the user.

    A UserError of the `with` block means that the content is wrong. It becomes an UnreadableError.
    `write` is True if the block changes the file.
    """
    try:
        yield
    except UserError as error:
        raise damaged(path, str(error)) from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_BUSY") and _has_locks(path.parent):
            raise InUseError(
                f"gallery '{path.parent}' is in use by another program, such as `vidjax serve`, or "
                "by an open 'with gallery.change()' of this program\n"
                "try again when that program or block has ended"
            ) from error
        if re.match("SQLITE_(BUSY|PERM|IOERR.*LOCK$)", name):
            kind = UnwritableError if write else UnreadableError
            raise kind(
                f"gallery '{path.parent}' is on a drive without locks, like some network and cloud "
                "drives\nput it on another disk; or give `vidjax who` another --out=FOLDER"
            ) from error
        if name.startswith("SQLITE_READONLY") and write:
            raise UnwritableError(
                f"gallery '{path.parent}' cannot be changed: {error}\n"
                "copy the gallery to a folder that you can write to"
            ) from error
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
            number = errno.ENOSPC if name == "SQLITE_FULL" else errno.EIO
            if name == "SQLITE_IOERR_DIR_FSYNC":  # the journal is deleted, which ends the change
                raise UncertainWriteError(
                    number, f"'{path}' was changed, but a power cut may undo the change: {error}"
                ) from error
            if write:
                raise OSError(number, f"cannot write '{path}': {error}") from error
            raise UnreadableError(
                f"cannot read '{path}': {error}\n"
                "check the disk, and the permissions of this file and its folder"
            ) from error
        raise damaged(path, show(str(error))) from error


def _begin_change(connection: sqlite3.Connection, end: float) -> None:
    """Begins a transaction. Waits until other changes have ended, at most to the time `end`.

    `end` is a time of `time.monotonic()`. After this time, the error of SQLite is raised.
    """
    # The waiting of SQLite gets slower, so that later programs overtake the earliest.
    connection.execute("PRAGMA busy_timeout=0")
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
            time.sleep(RETRY_SECONDS)
    connection.execute(f"PRAGMA busy_timeout={1000 * WAIT_SECONDS:.0f}")


def _has_locks(folder: Path) -> bool:
    """Returns whether files on the disk of a folder can be locked.

    SQLite reports the same error, busy, if another process has locked the file, and if the disk has
    no locks. This function distinguishes the two cases.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return not os.access(folder, os.W_OK)


def _connect(path: Path) -> sqlite3.Connection:
    """Opens an existing database. SQL code in a forged database, such as a view, is not trusted."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=WAIT_SECONDS, isolation_level=None
    )
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    for setting in ("trusted_schema=OFF", "cell_size_check=ON", "secure_delete=ON",
                    "temp_store=MEMORY", f"page_size={PAGE_BYTES}"):  # fmt: skip
        connection.execute(f"PRAGMA {setting}")
    return connection


def _version(connection: sqlite3.Connection) -> tuple[int, set[str]]:
    """Returns the version of the format, and the SQL code of all tables, indexes and views."""
    # The pages of a forged file may refer to each other without end, so the time is limited.
    end = time.monotonic() + SCHEMA_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > end, 1000)
    ((version,),) = connection.execute("PRAGMA user_version").fetchall()
    tables = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master LIMIT 9")}
    ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
    connection.set_progress_handler(None, 0)
    if mode != "delete":
        raise UserError(f"the setting journal_mode of SQLite is '{mode}', but must be 'delete'")
    return version, tables


# ---- rows


def _digest(row: Sequence[Any]) -> int:
    *words, numbers = row
    digest = hashlib.sha256("".join(f"{word}\n" for word in words).encode())
    digest.update(numbers)
    return int.from_bytes(digest.digest())


def _append(
    connection: sqlite3.Connection, table: str, words: Sequence[Sequence[str]], numbers: np.ndarray
) -> int:
    """Adds N entries at the end of the table `backend`, `person` or `clip`.

    Args:
      words: 0, 1 or 2 lists of N names: none for `backend`, the people for `person`, and the clips
        and their people for `clip`.
      numbers: [N], the vectors and other numbers, with the dtype of the table.

    Returns the number that must be added to the checksum `State.rows`.
    """
    place, total = 0, 0
    step = max(1, min(MAX_BLOCK_PEOPLE, ROW_BYTES // numbers.dtype.itemsize))
    query = f"SELECT * FROM {table} ORDER BY place DESC LIMIT 1"
    for row in connection.execute(query).fetchall():
        place, last = row[0] + 1, np.frombuffer(row[2], numbers.dtype)
        if len(last) < step:
            place, total = row[0], -_digest(row)
            connection.execute(f"DELETE FROM {table} WHERE place = ?", (place,))
            lines, numbers = row[1].split("\n"), np.concatenate([last, numbers])
            words = [
                [*lines[n * len(last) : (n + 1) * len(last)], *more] for n, more in enumerate(words)
            ]
    for at in range(0, len(numbers), step):
        lines = itertools.chain.from_iterable(column[at : at + step] for column in words)
        row = (place, "\n".join(lines), numbers[at : at + step].tobytes())
        connection.execute(f"INSERT INTO {table} VALUES (?, ?, ?)", row)
        place, total = place + 1, total + _digest(row)
    return total


def _clip_layout(width: int) -> np.dtype:
    return np.dtype([("vector", "<f4", (width,)), ("fitted", "<u4")])


def _pack_clips(clips: Sequence[StoredClip]) -> np.ndarray:
    numbers = np.zeros(len(clips), _clip_layout(len(clips[0].vector)))
    numbers["vector"] = [clip.vector for clip in clips]
    numbers["fitted"] = [clip.fitted for clip in clips]
    return numbers


def _person_layout(widths: Iterable[int]) -> np.dtype:
    linear = [(f"linear_{part}", "<f4", (width,)) for part, width in enumerate(widths)]
    parts = (len(linear),)
    return np.dtype([("constant", "<f8", parts), ("num_clips", "<i4", parts), *linear])


def _pack_people(people: People) -> np.ndarray:
    _, linear, constant, count = people
    numbers = np.zeros(len(people.names), _person_layout(x.shape[1] for x in linear))
    for field, x in zip(numbers.dtype.names or (), (constant.T, count.T, *linear), strict=True):
        numbers[field] = x
    return numbers


def _facts(state: State) -> str:
    backend = state.index.backend
    parts = [
        Kind(x.name, len(x.centre), x.distances is not None, x.mean is not None)
        for x in backend.parts
    ]
    settings = {name: float(x) for name, x in backend.settings._asdict().items()}
    facts = _Facts(
        state.version, state.origin, parts, settings,
        clips=len(state.clips), people=len(state.index.names), rows=f"{state.rows:064x}",
        command=state.command,
    )  # fmt: skip
    return json.dumps(msgspec.to_builtins(facts))


def _read_facts_row(connection: sqlite3.Connection) -> tuple[str, bytes]:
    rows = connection.execute("SELECT facts, sha256 FROM gallery LIMIT 2").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], str):
        raise UserError("the table 'gallery' does not consist of a single row of text")
    return rows[0]


def _read(connection: sqlite3.Connection) -> State:
    text, sha256 = _read_facts_row(connection)
    if hashlib.sha256(text.encode()).digest() != sha256:
        raise UserError("the text in the table 'gallery' does not match the stored sha256")
    facts = json_files.parse(Path(GALLERY_FILE), files.parse_json(text), _Facts, REMEDY)
    if missing := set(Settings._fields) - facts.settings.keys():
        raise UserError(f"the table 'gallery' lacks the setting '{min(missing)}'")
    width = sum(part.width for part in facts.parts)
    if width > MAX_VECTOR_WIDTH or len({part.name for part in facts.parts}) < len(facts.parts):
        raise UserError(f"'gallery' lists a modality twice, or too long vectors: {width:,} numbers")
    _, numbers, rows = _read_table(connection, "backend", BACKEND_LAYOUT, 0)
    backend = _make_backend(numbers["number"], facts)
    (names, people), numbers, more = _read_table(connection, "clip", _clip_layout(width), 2)
    if (numbers["fitted"] > 1).any():
        raise UserError("a value of 'fitted' in the table 'clip' is not 0 or 1")
    owners, fitted = (person or None for person in people), map(bool, numbers["fitted"].tolist())
    clips = dict(zip(names, map(StoredClip, owners, numbers["vector"], fitted), strict=True))
    entries = len(names)
    layout = _person_layout(backend.widths.values())
    (names,), numbers, others = _read_table(connection, "person", layout, 1)
    index = Index(backend, _make_blocks(names, numbers))
    rows, entries = (rows + more + others) % (1 << 256), entries + len(names)
    if (f"{rows:064x}", len(clips), len(index.names)) != (facts.rows, facts.clips, facts.people):
        raise UserError("rows are missing, or do not match the checksum in the table 'gallery'")
    clips_of = list_clips_of(clips)
    sizes = np.array([len(clips_of.get(name, ())) for name in index.names], np.int32)
    known = (len(clips_of) - (STRANGER in clips_of) == len(sizes)) and sizes.all()
    if not known or (index.counts > sizes).any():
        raise UserError("the tables 'clip' and 'person' contradict each other")
    return State(
        facts.version, facts.origin, index, clips, clips_of, facts.command, rows, entries, sha256
    )


def _read_table(
    connection: sqlite3.Connection, table: str, layout: np.dtype, num_words: int
) -> tuple[list[list[str]], np.ndarray, int]:
    """Reads and checks the table `backend`, `person` or `clip`, with N entries.

    Returns `num_words` (0, 1 or 2) lists of N names; the numbers [N], with the dtype `layout`; and
    the checksum of the table.
    """
    (size,) = connection.execute(f"SELECT total(length(numbers)) FROM {table}").fetchone()
    numbers, at, total = np.empty(int(size) // layout.itemsize, layout), 0, 0
    words: list[list[str]] = [[] for _ in range(num_words)]
    for row in connection.execute(f"SELECT * FROM {table} ORDER BY place"):
        count = len(row[2]) // layout.itemsize if tuple(map(type, row)) == ROW_KINDS else 0
        lines = row[1].split("\n") if count and num_words else []
        if not count or len(row[2]) % layout.itemsize or len(lines) != num_words * count:
            raise UserError(f"a row of the table '{table}' has the wrong types or length")
        _check_names(lines, lines[:count])
        for n, column in enumerate(words):
            column += lines[n * count : (n + 1) * count]
        copied = numbers[at : at + count] = np.frombuffer(row[2], layout)
        if not all(np.isfinite(copied[field]).all() for field in layout.names or ()):
            raise UserError(f"a row of the table '{table}' contains NaN or infinity")
        at, total = at + count, total + _digest(row)
    numbers.flags.writeable = False
    return words, numbers, total


def _check_names(names: Sequence[str], clips: Sequence[str]) -> None:
    """Raises UserError if one of `names` is invalid, or if `clips`, its beginning, contains ""."""
    text = "".join(names)  # checking all names together is faster
    filled = "" not in clips and "" not in map(str.strip, filter(None, names))
    if filled and text.isprintable() and unicodedata.is_normalized("NFC", text):
        return
    with contextlib.suppress(UserError):  # its message contains the name, which must not be logged
        people = {*names[len(clips) :]} - {STRANGER}
        if all(map(check_name, clips)) and all(normal_form(check_name(x)) == x for x in people):
            return
    raise UserError("the name of a clip or person is empty, too long, or has invalid letters")


def _make_backend(numbers: np.ndarray, facts: _Facts) -> Backend:
    if len(numbers) != sum(sum(kind.sizes) for kind in facts.parts):
        raise UserError("the table 'backend' has another length than the table 'gallery' states")
    settings = Settings(**{name: facts.settings[name] for name in Settings._fields})
    backend = from_numbers(facts.parts, settings, numbers)
    if any(part.space is not None and np.any(part.space.ratio < 0) for part in backend.parts):
        raise UserError("the table 'backend' contains a variance below 0")
    if any(part.distances is not None and min(part.distances) <= 0 for part in backend.parts):
        raise UserError("the table 'backend' contains a variance or a gamma shape of 0 or less")
    return backend


def _make_blocks(names: Sequence[str], numbers: np.ndarray) -> Iterator[People]:
    """Yields the people in the N entries of the table `person`, MAX_BLOCK_PEOPLE at a time.

    `numbers` [N] are the coefficients in `People`. The last of several entries of a name counts.
    """
    if (numbers["num_clips"] < 0).any():
        raise UserError("the table 'person' contains a negative number of clips")
    last = {name: place for place, name in enumerate(names)}
    kept = sorted(last.values())
    for at in range(0, len(kept), MAX_BLOCK_PEOPLE):
        places = kept[at : at + MAX_BLOCK_PEOPLE]
        gaps = places[-1] - places[0] >= len(places)
        block = numbers[places if gaps else slice(places[0], places[-1] + 1)]
        constant, count, *linear = (block[field] for field in block.dtype.names or ())
        yield People(tuple(names[n] for n in places), tuple(linear), constant.T, count.T)
