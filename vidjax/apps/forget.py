"""Finds all places that contain people or clips: the search of `vidjax forget`.

Clips are deleted from galleries and from converted datasets in the cache. Runs, folders of
`vidjax who` and all other files are only listed.
"""

import contextlib
import html
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vidjax.data import cache
from vidjax.data.clip_files import has_several_clips
from vidjax.data.untrusted.names import (
    check_name,
    clean_name,
    escape,
    fold,
    normal_form,
    unescape,
)
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError, closest

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery

INDEX_BYTES = 512 * files.MB  # limit for a converted dataset's list of clips, and a file of a run
SEVERAL_CLIPS = b"clips.npy"  # is in an .npz of several clips, see `clip_files.has_several_clips`
MAX_NAMES_IN_INDEX = 10_000_000
MAX_COMPARED_NAMES = 20_000  # a search for similar spellings among so many names takes a second
MAX_GREP_FILES = 1000  # per process of grep
WIDE_BYTES = 64 * files.MB  # in larger files, names are searched only in UTF-8
# grep keeps a line in memory. If a file is a single long line, the limit ends grep with an error.
GREP = 'ulimit -v 1048576; exec grep "$@"'
PRINT_PARQUET = (
    "import sys, pyarrow.parquet as p; t = p.read_table(sys.argv[1]); "
    "[print(x) for c in t.columns if 'string' in str(c.type) for x in c.to_pylist()]"
)
# Endings of compressed files -> a command that prints the content of such a file.
UNPACK = {
    (".gz", ".tgz"): "gzip -dc",
    (".bz2", ".tbz", ".tbz2"): "bzip2 -dc",
    (".xz", ".txz", ".lzma"): "xz -dc",
    (".zst", ".tzst"): "zstd -dcq",
    (".zip", ".docx", ".xlsx", ".pptx", ".odt", ".ods", ".epub", ".jar"): "unzip -p",
    (".7z", ".rar"): "7z e -so",
    (".parquet",): shlex.join([sys.executable, "-c", PRINT_PARQUET]),
}


# Kind of folder -> the names of the files that vidjax writes there. grep does not search these
# files. Instead, READERS read the names in them, and whole names are compared.
OWN = {
    "run": re.compile(
        r"(ranking|analysis|report|metrics)(_\w+)?\.(txt|npz|html|json)|checkpoints|members\.npz|"
        r"(identities|config|data_report)\.json|(metrics|timing)\.jsonl"
    ),
    "who": re.compile(r"names\.(tsv|jsonl|html)|unknown\.(tsv|json)|subtitles|cuts|people"),
}
# A folder of the cache that a killed process has left. The list of its clips is written last.
UNFINISHED = re.compile(r"[0-9a-f]{20}\.[0-9a-f]{8}\.partial")


class Place(NamedTuple):
    """A folder or a file that contains a searched name, or could not be searched."""

    # `gallery`, `records` (a converted dataset), `run`, `who` (results of `vidjax who`), `file`, or
    # `unread` if the place could not be searched.
    kind: str
    path: Path  # the folder or file
    about: str  # a description of the content
    # How the user can delete the name; `--delete` if vidjax can. It starts with `deleted` if vidjax
    # has deleted the name.
    remedy: str

    @property
    def left(self) -> bool:
        """True if the place still contains a searched name."""
        return self.kind != "unread" and not self.remedy.startswith("deleted")


class Forgotten(NamedTuple):
    """The result of a search."""

    found: list[Place]  # the places that contain a name or could not be searched
    names: set[str]  # all searched names, including the names of people's clips, in form NFC
    similar: dict[str, str]  # searched name -> a stored name that looks similar


class SimilarNames:
    """Finds stored names that look like searched names, which may be misspelled.

    All names are in Unicode form NFC.
    """

    def __init__(self, wanted: Collection[str]):
        self._wanted, self._looks = wanted, {fold(name): name for name in wanted}
        self._near, self._few = dict[str, str](), set[str]()

    def add(self, names: set[str]) -> None:
        """Adds names that a searched folder contains."""
        for name in names.difference(self._wanted):
            if (own := self._looks.get(fold(name))) is not None:
                self._near[own] = min(name, self._near.get(own, name))
        if len(self._few) + len(names) <= MAX_COMPARED_NAMES:
            self._few |= names

    def similar(self, *, closely: bool) -> dict[str, str]:
        """Returns searched name -> a stored name that looks the same, such as in other letter case.

        If `closely` is True, and no stored name looks the same, a name with a similar spelling is
        returned.
        """
        near = {name: closest(name, self._few) for name in self._wanted} if closely else {}
        return {name: other for name, other in near.items() if other} | self._near


def forget(
    identities: Collection[str],
    clips: Collection[str],
    places: Iterable[Path],
    *,
    delete: bool = False,
) -> Forgotten:
    """Searches the folders `places` for galleries, runs and files that contain people or clips.

    `identities` are the names of people, whose clips are also searched. `clips` are the names of
    other clips. If `delete` is True, the clips are deleted from galleries, and converted datasets
    that contain any of the clips are deleted. Raises UserError if a folder does not exist, or a
    name is empty or invalid.
    """
    from vidjax.apps.gallery.gallery import Gallery

    people = {normal_form(check_name(name, "identity")) for name in identities}
    bare = {normal_form(clean_name(name)) for name in clips}
    asked = bare | {f"{name}.mp4" for name in bare}
    found: list[Place] = []
    folders: dict[Path, str] = {}
    others: dict[Path, bool] = {}
    for root in (place.expanduser().absolute() for place in places):
        if not root.is_dir():
            raise UserError(f"'{root}' is not a folder: name an existing folder as PLACE")
        _survey(root, folders, others, found)
    of_kind = lambda kind: [path for path in sorted(folders) if folders[path] == kind]  # noqa: E731
    wanted = people | bare
    names, known = people | asked, SimilarNames(wanted)
    runs_of_galleries: dict[Path, Path] = {}
    for folder in of_kind("gallery"):
        try:
            gallery = Gallery(folder)
            known.add({*gallery.identities, *map(normal_form, gallery.clips)})
        except (UserError, OSError) as error:
            found.append(_list_unread(folder, error))
            continue
        runs_of_galleries[folder] = Path(gallery.origin.workdir)
        stored = gallery.clips.items()
        shown = {n for n, clip in stored if clip.identity in people or normal_form(n) in asked}
        if shown:
            found.append(_report_gallery(gallery, shown, delete=delete))
            names.update(map(normal_form, shown))
    for folder in of_kind("records"):
        found += _search_records(folder, names, delete=delete)
    for folder in of_kind("unfinished"):
        found.append(_report_unfinished(folder, delete=delete))
    for kind, (names_of, remedy) in READERS.items():
        for folder in of_kind(kind):
            try:
                there = {*map(normal_form, itertools.islice(names_of(folder), MAX_NAMES_IN_INDEX))}
            except (UserError, OSError) as error:
                found.append(_list_unread(folder, error))
                continue
            known.add(there)
            if held := names & there:
                found.append(Place(kind, folder, f"{len(held):,} of the names", remedy))
    listed = {place.path for place in found if place.kind != "gallery"}
    for path in [path for path in others if listed.intersection(path.parents)]:
        del others[path]
    found += _search_files(others, names, wanted)
    runs = {place.path for place in found if place.kind == "run"}
    for folder, run in runs_of_galleries.items():
        if run in runs:
            about = f"its vectors were computed by '{run}', which was trained on the clips"
            found.append(Place("gallery", folder, about, "make the gallery again with a new run"))
    return Forgotten(found, names, known.similar(closely=not found))


def _survey(
    root: Path, folders: dict[Path, str], others: dict[Path, bool], found: list[Place]
) -> None:
    """Lists the files and folders below `root` that must be searched. Links are not followed.

    Adds path -> kind to `folders` for each gallery, run, converted dataset, unfinished conversion,
    and folder of results of `vidjax who`. Adds path -> True to `others` for each other file, and
    path -> False for each other folder. Adds unreadable folders to `found`.
    """
    from vidjax.apps.gallery.store import GALLERY_FILE, JOURNAL_FILE

    tell = lambda error: found.append(_list_unread(error.filename or root, error))  # noqa: E731
    for place, inner, names in os.walk(root, onerror=tell):
        folder, there = Path(place), {*names, *inner}
        if UNFINISHED.fullmatch(folder.name):
            folders[folder] = "unfinished"
            inner.clear()
            continue
        if GALLERY_FILE in there:
            folders[folder] = "gallery"
        elif {"index.npz", "manifest.json"} <= there:
            folders[folder] = "records"
            inner.clear()
            continue
        elif there & {"identities.json", "members.npz"}:
            folders[folder] = "run"
        elif {"names.tsv", "gallery"} <= there:
            folders[folder] = "who"
        own = OWN.get(folders.get(folder, ""), re.compile(f"({GALLERY_FILE}|{JOURNAL_FILE})"))
        inner[:] = [name for name in inner if not own.fullmatch(name)]
        others |= {folder / name: False for name in inner}
        others |= {folder / name: True for name in names if not own.fullmatch(name)}


def _list_unread(path: str | Path, error: Exception) -> Place:
    about = next(iter(str(error).splitlines()), type(error).__name__)
    return Place("unread", Path(path), about, "search it yourself")


def _report_gallery(gallery: "Gallery", clips: set[str], *, delete: bool) -> Place:
    """Returns the place of a gallery that contains `clips`. If `delete` is True, deletes them."""
    about, remedy = f"{len(clips):,} of its clips", "--delete"
    if delete:
        try:
            gallery.remove(clip=clips)
            remedy = "deleted"
        except (UserError, OSError) as error:
            about += f", not deleted: {str(error).splitlines()[0]}"
    return Place("gallery", gallery.folder, about, remedy)


def _search_records(folder: Path, clips: Collection[str], *, delete: bool) -> Iterator[Place]:
    """Yields the place of a converted dataset that contains any of `clips` or cannot be read.

    If `delete` is True, a dataset with any of the clips is deleted.
    """
    path = folder / "index.npz"
    try:
        limit = min(INDEX_BYTES, files.max_unpacked_bytes(os.lstat(path).st_size))
        index = files.read_npz(path, limit)
        lists = [_lines(array.tobytes()) for key, array in index.items() if key.endswith("/clips")]
        held = set(clips).intersection(map(normal_form, itertools.chain(*lists)))
    except (UserError, OSError) as error:
        yield _list_unread(folder, error)
        return
    if not held:
        return
    about, remedy = f"features of {messages.count(len(held), 'clip')}", "--delete"
    if delete:
        from vidjax.data.records.manifest import remove

        with cache.exclusive(folder):
            remedy = "deleted: the next run converts your files again"
            if not remove(folder):
                remedy = "some files are left in this folder: run the command again to search them"
    yield Place("records", folder, about, remedy)


def _report_unfinished(folder: Path, *, delete: bool) -> Place:
    """Returns the place of an unfinished conversion. If `delete` is True, deletes the folder."""
    remedy = "--delete"
    if delete:
        whole = folder.with_name(folder.name[:20])
        with cache.exclusive(whole):  # waits for a living conversion
            files.remove_partials(whole)
            remedy = "delete the files that are left" if folder.exists() else "deleted"
    about = "a killed conversion, which may contain features of the clips"
    return Place("records", folder, about, remedy)


def _lines(content: bytes) -> Iterator[str]:
    """Yields the lines of a text. If the text has too many lines, raises UserError."""
    if content.count(b"\n") > MAX_NAMES_IN_INDEX:
        raise UserError(f"it contains more than {MAX_NAMES_IN_INDEX:,} names")
    for line in io.BytesIO(content):
        yield line.rstrip(b"\n").decode("utf-8", "replace")


def _read_names_of_run(folder: Path) -> Iterator[str]:
    """Yields the names of people and clips in the files of a run or of an exported run."""
    if files.exists(folder / "identities.json"):
        yield from map(str, files.read_json(folder / "identities.json", list, INDEX_BYTES))
    if files.exists(folder / "members.npz"):
        arrays = files.read_npz(folder / "members.npz", INDEX_BYTES)
        yield from _lines(arrays["clips"].tobytes() if "clips" in arrays else b"")
    for path in folder.glob("analysis*.npz"):
        if (facts := files.read_npz(path, INDEX_BYTES).get("facts")) is not None:
            if facts.nbytes > files.JSON_BYTES:
                raise UserError(f"'{path}' contains more than {files.JSON_BYTES:,} bytes of text")
            yield from _walk_texts(files.parse_json(facts.tobytes()))
    for path in folder.glob("ranking*.txt"):
        for word in re.finditer(rb"\S+", files.read_bytes(path, INDEX_BYTES)):
            yield unescape(word[0].decode(errors="replace").removesuffix(".mp4"))


def _walk_texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _walk_texts(child)


def _read_names_of_who(folder: Path) -> Iterator[str]:
    """Yields all names in results of `vidjax who`.

    They are cells of tables, names that a user denied, names of folders, and tags of photos.
    """
    from vidjax.apps.video.features_folder import NUMBERS, read_films

    for table in ("names.tsv", "unknown.tsv"):
        if files.exists(folder / table):
            for _, cells in tables.read_tsv(folder / table):
                yield from cells
    if files.exists(folder / NUMBERS):
        yield from _walk_texts(files.read_json(folder / NUMBERS, limit=INDEX_BYTES))
    if not (people := folder / "people").is_symlink():
        for path in people.glob("*"):
            yield path.name
            for film in read_films(path):
                yield from film.tags


# Kind of folder -> the function that yields its names, and the remedy in `Place`.
READERS: dict[str, tuple[Callable[[Path], Iterator[str]], str]] = {
    "run": (_read_names_of_run, "its weights depend on the clips: delete it; train without them"),
    "who": (
        _read_names_of_who,
        "remove these people's photos and tags, and run `vidjax who` again: it replaces all files",
    ),
}


# ---- all other files


def _read_names_of_clips(path: Path) -> Iterator[str]:
    """Yields the names of clips in an `.npz` of several clips. They are UTF-32 or compressed."""
    arrays = files.read_npz(path, INDEX_BYTES)
    for name in arrays["clips"].ravel().tolist() if has_several_clips(arrays) else ():
        yield normal_form(name.removesuffix(".mp4"))


def _search_files(
    paths: Mapping[Path, bool], names: set[str], given: Collection[str]
) -> list[Place]:
    """Searches the paths and contents of files for names. Links are not followed.

    `paths` are path -> True for a file, False for a folder. All `names` are searched in UTF-8. The
    names `given`, which the user typed, are also searched in other encodings. Returns the places
    that contain a name, cannot be read, or are compressed.
    """
    patterns = _make_patterns(names)
    text, order = b"\0".join(os.fsencode(path.name) for path in paths), [*paths]
    try:
        rows = [_run_grep(f"-znia{flags}", some, text=text) for flags, some in patterns.items()]
    except OSError as error:
        about = f"other files are not searched: {str(error).splitlines()[0]}"
        return [Place("unread", Path(), about, "install GNU grep")]
    named = {order[int(row.partition(b":")[0]) - 1] for row in itertools.chain(*rows)}
    named = {path for path in named if not named.intersection(path.parents)}
    about, remedy = "its path contains one of the names", "it is your file: delete it, or rename it"
    places, read = [Place("file", path, about, remedy) for path in sorted(named)], list[Path]()
    for path, is_file in paths.items():
        if not is_file or path.is_symlink() or path in named or named.intersection(path.parents):
            continue
        if os.access(path, os.R_OK):
            read.append(path)
        else:
            about = "you have no permission to read the file"
            places.append(Place("unread", path, about, "search it yourself"))
    held, unread = _search_contents(read, patterns, names, _list_wide_spellings(given))
    remedy = "it is your file: delete it, or remove the name from it"
    places += [Place("file", path, "it contains one of the names", remedy) for path in sorted(held)]
    about, remedy = "it is compressed", "search it with the command below"
    packed = [path for path in read if path not in held and _unpack(path)]
    return [*places, *unread, *(Place("unread", path, about, remedy) for path in packed)]


def _search_contents(
    paths: Sequence[Path], patterns: Mapping[str, bytes], names: set[str], wide: Collection[bytes]
) -> tuple[set[Path], list[Place]]:
    """Returns the files with a name, and the files that cannot be read.

    `patterns` are from `_make_patterns(names)`. `wide` are spellings in other encodings.
    """
    held, archives, unread = set[bytes](), set[bytes](), list[Place]()
    # grep searches lines, so it misses spellings such as U+4E0A in UTF-16.
    broken = [spelling for spelling in wide if b"\n" in spelling]
    left = [paths[at : at + MAX_GREP_FILES] for at in range(0, len(paths), MAX_GREP_FILES)]
    while left:
        some = left.pop()
        try:
            for flags, spellings in patterns.items():
                held.update(_run_grep(f"-liZ{flags}", spellings, some))
            small = [x for x in some if x.is_file() and x.stat().st_size <= WIDE_BYTES]
            held.update(_run_grep("-liaZF", b"\n".join({*wide} - {*broken}), small, locale="C"))
            held.update(os.fsencode(path) for path in small if _contains_any(path, broken))
            npz = [path for path in some if path.suffix == ".npz"]
            archives.update(_run_grep("-laZF", SEVERAL_CLIPS, npz))
        except OSError as error:
            if len(some) == 1:
                unread.append(_list_unread(some[0], error))
            else:  # a file that grep cannot read must not hide the others
                left += [some[: len(some) // 2], some[len(some) // 2 :]]
    for archive in sorted(archives - held):
        path = Path(os.fsdecode(archive))
        try:
            if names.intersection(_read_names_of_clips(path)):
                held.add(archive)
        except (UserError, OSError) as error:
            unread.append(_list_unread(path, error))
    return {Path(os.fsdecode(path)) for path in held}, unread


def _run_grep(
    flags: str,
    patterns: bytes,
    paths: Sequence[Path] = (),
    *,
    text: bytes = b"",
    locale: str = "C.UTF-8",
) -> list[bytes]:
    """Runs grep on files, or on `text` if `paths` is empty; returns the output, split at NUL bytes.

    grep reads the patterns from memory. So no searched name is written to the disk or appears in
    the list of processes. Raises OSError if grep fails.
    """
    memory = os.memfd_create("names")
    try:
        os.write(memory, patterns)
        words = ["sh", "-c", GREP, "grep", flags, "-D", "skip", "-f"]
        words += [f"/proc/self/fd/{memory}", "--", *map(str, paths), *([] if paths else ["-"])]
        done = subprocess.run(  # noqa: S603
            words, input=text, capture_output=True, pass_fds=[memory],
            env=os.environ | {"LC_ALL": locale},
        )  # fmt: skip
    finally:
        os.close(memory)
    if done.returncode > 1:
        raise OSError(done.stderr.decode(errors="replace") or "grep failed")
    return [row for row in done.stdout.split(b"\0") if row]


def _list_spellings(names: Iterable[str]) -> list[str]:
    """Returns the spellings of names in text, JSON, HTML, URLs and rankings, in NFC and NFD.

    In HTML, Jinja and Python write different codes for quotation marks. In tables, quotation marks
    are doubled.
    """
    forms = {unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")}
    ways: tuple[Callable[[str], str], ...] = (
        str, escape, html.escape, urllib.parse.quote,
        lambda form: html.escape(form, quote=False),
        lambda form: html.escape(form).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
        lambda form: json.dumps(form)[1:-1],
        lambda form: form.replace('"', '""'),
    )  # fmt: skip
    return sorted({way(form) for form in forms for way in ways})


def _make_patterns(names: set[str]) -> dict[str, bytes]:
    """Returns flags of grep -> the spellings of names that grep searches with these flags."""
    inside = {name for name in names if _is_inside_words(name)}
    groups = {"wF": names - inside, "F": inside}
    return {
        flags: "\n".join(_list_spellings(some)).encode() for flags, some in groups.items() if some
    }


def _is_inside_words(name: str) -> bool:
    """Returns whether a name may touch other letters: many scripts have no blanks between words.

    Such scripts, and scripts whose particles touch a name, have letters of the category Lo.
    """
    return any(unicodedata.category(letter) == "Lo" for letter in name)


def _list_wide_spellings(names: Iterable[str]) -> list[bytes]:
    """Returns names in UTF-16, UTF-32 and Windows-1252, in NFC and NFD, in small letters a to z."""
    forms = {unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")}
    wide = ("utf-16-le", "utf-16-be", "utf-32-le")
    spellings = {form.encode(encoding) for form in forms for encoding in wide}
    for form in (form for form in forms if not form.isascii()):
        with contextlib.suppress(UnicodeEncodeError):
            spellings.add(form.encode("cp1252"))
    return [spelling.lower() for spelling in spellings]


def _contains_any(path: Path, spellings: Collection[bytes]) -> bool:
    """Returns whether a file contains one of `spellings`, in any case of the letters a to z."""
    content = path.read_bytes().lower() if spellings else b""
    return any(spelling in content for spelling in spellings)


def _unpack(path: Path) -> str | None:
    """Returns the command that prints the content of a compressed file, or None for other files."""
    endings = (words for ends, words in UNPACK.items() if path.name.lower().endswith(ends))
    return next(endings, None)


def commands(names: Iterable[str], unread: Iterable[Place], places: Iterable[Path]) -> list[str]:
    """Returns shell commands that search compressed files below the folders `places` for `names`.

    There is a command for each type of compressed file in `unread`.
    """
    kinds = {_unpack(place.path) for place in unread if place.kind == "unread"}
    names = [*names]
    spelled = f"N=$(printf '%s\\n' {shlex.join(_list_spellings(names))})"
    flags = "-qiF" if any(map(_is_inside_words, names)) else "-qiwF"
    lines = []
    for ends, unpack in UNPACK.items():
        if unpack in kinds:
            alike = [word for end in ends for word in ("-o", "-iname", f"*{end}")][1:]
            search = f'{unpack} "$0" | grep {flags} -e "$N" && echo "$0"'
            words = ["find", *map(str, places), "-type", "f", "(", *alike, ")"]
            words += ["-exec", "sh", "-c", search, "{}", ";"]
            lines.append(f"{spelled} {shlex.join(words)}")
    return lines
