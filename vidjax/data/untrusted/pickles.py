"""Official files into memory: feature pickles, read in the cage, and both forms of ground truth."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vidjax.data.untrusted import sandbox
from vidjax.data.untrusted.unpickle import show

SPLITS = ("train", "val", "test")
MAX_UNKNOWN_RATE = 0.01  # of the clips that a text file names, those in no feature file
# A slow disk may need its time, a hung one must not hold the caller for ever.
_WALL_SECONDS = 60
_WALL_BYTES_PER_SECOND = 1 << 20


@dataclass(frozen=True, eq=False)
class PackedClips:
    """One modality of one split, flat: N clips, F frames of width D.

    Attributes:
      names: the N clip names without `.mp4`, in the order of the file.
      lengths: [N] int32, the frames of each clip; 0 where it has none.
      features: [F, D] in the stored dtype (float16, float32, float64 or int8, native byte order);
        D is 0 where no clip of the file has a frame.
      quality: [F] float32, the quality score; 0 where the modality has none.
      detection: [F] float32, the detection score; 1 where the modality has none.
      number: [F] int32, the frame number; where the modality has none, the place in the clip.
      box: [F, 4] float32, x1, y1, x2, y2 in pixels; 0 where the modality has none.
      seen: the frames of the file; seen == F + sum(skipped.values()).
      skipped: frames left out, by reason: `non_finite`.
      skipped_clips: clips of length 0, by reason: `empty` in the file, or `non_finite` throughout.
      warnings: frames with a score or box that was not finite and is now 0, as
        `non_finite_quality`, `non_finite_detection` and `non_finite_box`.
    """

    names: tuple[str, ...]
    lengths: np.ndarray
    features: np.ndarray
    quality: np.ndarray
    detection: np.ndarray
    number: np.ndarray
    box: np.ndarray
    seen: int
    skipped: dict[str, int]
    skipped_clips: dict[str, int]
    warnings: dict[str, int]


def unpack(
    path: str | os.PathLike[str],
    modality: str,
    out_dir: str | os.PathLike[str],
    *,
    non_finite: Literal["drop", "error"] = "drop",
) -> PackedClips:
    """Returns the clips of one feature pickle, memory-mapped from flat files under out_dir.

    The pickle is read by a child process that can run no code of the file's choosing and is held
    to an address space of 512 MB + 4 x file size (see `cage`).

    Args:
      path: the pickle: clip name -> list of entries, or -> array [D] or [T, D].
      modality: `face`, `head`, `body`, `audio` and `scene` have the entries of the official files;
        of any other name, the entries of most clips decide which fields all must have.
      out_dir: a folder for this call alone, made where it is missing. Its files must outlive the
        arrays.
      non_finite: what becomes of a frame whose feature holds a NaN or an Inf.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is refused, damaged, truncated or not as its modality should be; names
        file, clip and field.
      OSError: it cannot be read, or out_dir cannot be written.
    """
    path, out_dir = Path(path), Path(out_dir)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    out_dir.mkdir(parents=True, exist_ok=True)
    with _cleared(out_dir):
        return take(path, out_dir, _run_cage(path, modality, out_dir, non_finite))


@contextlib.contextmanager
def _cleared(out_dir: Path) -> Iterator[None]:
    """Takes the flat files away where what stands under it fails."""
    try:
        yield
    except BaseException:
        for key in ("features", *sandbox.COLUMNS):
            with contextlib.suppress(OSError):
                (out_dir / f"{key}.bin").unlink()
        raise


def take(path: Path, out_dir: Path, child: subprocess.CompletedProcess[bytes]) -> PackedClips:
    """Returns what a reader that has ended left in out_dir, or raises what it found, as `unpack`.

    Args:
      path: the pickle that it read.
      out_dir: its folder.
      child: its exit status, stdout and stderr.
    """
    summary = _answer(path, out_dir, child)
    lengths = np.array(summary["lengths"], np.int32)
    frames = int(lengths.sum())

    def column(key: str, dtype: str, *shape: int) -> np.ndarray:
        if not all(shape):
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(out_dir / f"{key}.bin", dtype, "r", shape=shape))

    return PackedClips(
        names=tuple(summary["names"]),
        lengths=lengths,
        features=column("features", summary["dtype"], frames, summary["width"]),
        quality=column("quality", sandbox.COLUMNS["quality"], frames),
        detection=column("detection", sandbox.COLUMNS["detection"], frames),
        number=column("number", sandbox.COLUMNS["number"], frames),
        box=column("box", sandbox.COLUMNS["box"], frames, 4),
        seen=summary["seen"],
        skipped=summary["skipped"],
        skipped_clips=summary["skipped_clips"],
        warnings=summary["warnings"],
    )


def _run_cage(
    path: Path, modality: str, out_dir: Path, non_finite: str
) -> subprocess.CompletedProcess[bytes]:
    """Returns the reader of a pickle when it has ended, however it ended."""
    size = path.stat().st_size
    # The child must find what this process finds, and nothing in a folder it happens to stand in.
    # Every BLAS thread would reserve address space of its own.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    arguments = [str(path.absolute()), modality, str(out_dir.absolute()), non_finite]
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", sandbox.__name__, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=_WALL_SECONDS + size / _WALL_BYTES_PER_SECOND,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path}: reading took over {error.timeout:.0f} s: given up") from None


def _answer(path: Path, out_dir: Path, child: subprocess.CompletedProcess[bytes]) -> dict:
    """Returns the child's summary, or raises what it found as an error that names the file."""
    if child.returncode == -signal.SIGXCPU:
        seconds = sandbox.cpu_limit(path.stat().st_size)
        raise ValueError(f"{path}: takes over {seconds} s of CPU to read: refused")
    if child.returncode == -signal.SIGKILL:
        raise ValueError(f"{path}: its reader was killed from outside: is memory short?")
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise ValueError(f"{path}: damaged or hostile: its reader ended with {name}")
    if child.returncode not in (0, sandbox.EXIT_REFUSED):
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ValueError(f"{path}: its reader failed: {show(last)}")
    answer = json.loads(child.stdout)
    if "os_error" in answer:
        raise OSError(f"{path}: cannot be read, or not written to {out_dir}: {answer['os_error']}")
    if "error" in answer:
        raise ValueError(f"{path}: {answer['error']}")
    return answer


def find_pickles(directory: str | os.PathLike[str]) -> dict[tuple[str, str], Path]:
    """Returns (modality, split) -> feature pickle of a directory, sorted.

    Files are named `{modality}_{split}.pickle` or `{modality}_{split}_v2.pickle`; where both exist
    the `_v2` is taken. A modality is any name of letters, digits, '-' and '_'.

    Raises:
      ValueError: a pickle of a split has a modality of other characters.
      OSError: there is no such directory.
    """
    found: dict[tuple[str, str], Path] = {}
    # `_v2` files come last, so they take the place of the first version.
    for path in sorted(_files(directory), key=lambda path: (path.stem.endswith("_v2"), path.name)):
        match = re.fullmatch(rf"(.*?)_({'|'.join(SPLITS)})(_v2)?\.pickle", path.name, re.DOTALL)
        if not match:
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]+", match[1]):
            raise ValueError(f"{path}: a modality is named by letters, digits, '-' and '_'")
        found[match[1], match[2]] = path
    return dict(sorted(found.items()))


def find_ground_truth(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns split -> `{split}_gt.txt` of a directory, in the order train, val, test.

    Raises:
      OSError: there is no such directory.
    """
    names = {path.name: path for path in _files(directory)}
    return {split: names[f"{split}_gt.txt"] for split in SPLITS if f"{split}_gt.txt" in names}


def _files(directory: str | os.PathLike[str]) -> list[Path]:
    directory = Path(directory)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such directory; is config.data.dir right?")
    if not directory.is_dir():
        raise NotADirectoryError(
            f"{directory}: not a directory; name the folder that holds the files"
        )
    return [path for path in directory.iterdir() if path.is_file() and path.name[0] != "."]


def load_ground_truth(
    path: str | os.PathLike[str], *, known_clips: Collection[str] | None = None
) -> dict[str, str]:
    """Returns clip name (without `.mp4`) -> identity (as written), in the order of the file.

    Both official forms are read: `NAME.mp4 ID`, one clip a line, and the inverted
    `ID NAME.mp4 NAME.mp4 ...`, one identity a line. The suffix `.mp4` tells them apart; where no
    name bears it, known_clips does, then the file name (train_gt is direct, val_gt and test_gt are
    inverted), then which column is whole numbers. A byte order mark, CRLF, tabs, blank lines and
    stray spaces change nothing.

    Args:
      path: the text file.
      known_clips: names of clips without `.mp4`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: with line number: not UTF-8, form not to be told, a line of another form, a clip
        twice, an identity twice or without clips (inverted), a label that is not a whole number
        from 1 up where most are.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path}: holds no labels")
    inverted = _is_inverted(path, lines, known_clips)
    rows: list[tuple[int, str, str]] = []  # line, clip, identity
    first_lines: dict[str, int] = {}
    for number, fields in lines:
        if inverted:
            identity, *names = fields
            if not names:
                raise ValueError(f"{path}: line {number}: identity {show(identity)} has no clips")
            if identity in first_lines:
                raise ValueError(
                    f"{path}: line {number}: identity {show(identity)} again, "
                    f"after line {first_lines[identity]}"
                )
            first_lines[identity] = number
        else:
            if len(fields) != 2:
                raise ValueError(
                    f"{path}: line {number}: {len(fields)} fields, wanted a clip and its identity"
                )
            names, identity = fields[:1], fields[1]
        for name in names:
            try:
                rows.append((number, sandbox.clean_name(name), identity))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    _check_identities(path, rows)
    return _by_clip(path, rows)


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Returns line number and fields of every line that is not blank."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: not UTF-8 text (byte {error.start})") from None
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    return [(number, line.split()) for number, line in numbered if line.strip()]


def _is_inverted(
    path: Path, lines: list[tuple[int, list[str]]], known_clips: Collection[str] | None
) -> bool:
    """Returns whether identities come first, by the first sign that tells."""
    direct = [number for number, fields in lines if fields[0].endswith(".mp4")]
    inverted = [
        number for number, fields in lines if any(name.endswith(".mp4") for name in fields[1:])
    ]
    if direct and inverted:
        number = max(direct[0], inverted[0])
        raise ValueError(f"{path}: line {number}: here the clip is in another column than before")
    if direct or inverted:
        return bool(inverted)
    known = frozenset(known_clips or ())
    first = sum(fields[0] in known for _, fields in lines)
    later = sum(fields[1] in known for _, fields in lines if len(fields) > 1)
    if first != later:
        return later > first
    if path.name in [f"{split}_gt.txt" for split in SPLITS]:
        return path.name != "train_gt.txt"
    first = sum(_is_integer(fields[0]) for _, fields in lines)
    later = sum(_is_integer(fields[1]) for _, fields in lines if len(fields) > 1)
    if first != later and max(first, later) == len(lines):
        return first > later
    raise ValueError(
        f"{path}: 'CLIP ID' or 'ID CLIP CLIP ...'? No name ends in .mp4 and none is known;\n"
        "name the file train_gt.txt (the first form) or val_gt.txt (the second)"
    )


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def _check_identities(path: Path, rows: list[tuple[int, str, str]]) -> None:
    whole = sum(_is_integer(identity) for _, _, identity in rows)
    if 2 * whole <= len(rows):
        return
    spellings: dict[int, str] = {}
    for number, _, identity in rows:
        where = f"{path}: line {number}: label {show(identity)}"
        if not _is_integer(identity):
            raise ValueError(f"{where} is not a whole number, as others are")
        if int(identity) < 1:
            raise ValueError(f"{where} is out of range: identities count from 1")
        other = spellings.setdefault(int(identity), identity)
        if other != identity:
            raise ValueError(f"{where} is elsewhere written {show(other)}")


def _by_clip(path: Path, rows: list[tuple[int, str, str]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    at: dict[str, int] = {}
    repeated = []
    for number, name, identity in rows:
        if labels.get(name, identity) != identity:
            raise ValueError(
                f"{path}: line {number}: clip {show(name)} has label {show(identity)}, "
                f"but {show(labels[name])} in line {at[name]}"
            )
        if name in labels:
            repeated.append(f"{show(name)} (lines {at[name]} and {number})")
        labels[name] = identity
        at.setdefault(name, number)
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise ValueError(f"{path}: duplicate clips: {', '.join(repeated[:5])}{more}")
    return labels


def load_clip_weights(path: str | os.PathLike[str], clips: Sequence[str]) -> np.ndarray:
    """Returns the weight of every clip from a text file of `NAME.mp4 WEIGHT` lines.

    As in the ground truth, a byte order mark, CRLF, tabs, blank lines, stray spaces and a missing
    `.mp4` change nothing.

    Args:
      path: the text file.
      clips: names without `.mp4`, in the order of the weights.

    Returns:
      [N] float32, not negative; 1 for a clip that the file does not name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: with line number: not UTF-8, not two fields, a weight that is no number, negative
        or not finite, a clip twice. Without: no line at all, or more than 1 % of the clips named
        unknown; fewer are a warning.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path}: holds no weights")
    given: dict[str, float] = {}
    at: dict[str, int] = {}
    for number, fields in lines:
        where = f"{path}: line {number}:"
        if len(fields) != 2:
            raise ValueError(f"{where} {len(fields)} fields, wanted a clip and its weight")
        try:
            name = sandbox.clean_name(fields[0])
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
        if name in at:
            raise ValueError(f"{where} clip {show(name)} again, after line {at[name]}")
        at[name] = number
        given[name] = _weight(fields[1], where)
    check_known(path, given, clips)
    return np.array([given.get(name, 1.0) for name in clips], np.float32)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"{where} weight {show(text)} is not a number") from None
    if not 0 <= weight <= float(np.finfo(np.float32).max):
        raise ValueError(f"{where} weight {show(text)} is negative or not finite")
    return weight


def check_known(path: Path, named: Collection[str], clips: Collection[str]) -> None:
    """Warns of clips that a text file names and no record holds; raises when they are no slip.

    Args:
      path: the text file.
      named: the clips it names.
      clips: those there are.

    Raises:
      ValueError: more than 1 % of the named ones are not there, or none is.
    """
    known = frozenset(clips)
    unknown = [name for name in named if name not in known]
    if not unknown:
        return
    message = f"{path}: {len(unknown)} of {len(named)} clips are in no feature file, {unknown[0]}"
    if len(unknown) == len(named):
        raise ValueError(f"{message},\nnor any other: suffix? The files name {min(known)}")
    if len(unknown) > MAX_UNKNOWN_RATE * len(named):
        raise ValueError(f"{message} for one: more than {MAX_UNKNOWN_RATE:.0%}")
    warnings.warn(f"{message} for one", stacklevel=3)


def sort_identities(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct identities by whole number where all are such, else by name.

    Raises:
      ValueError: one number is written in two ways, as 7 and 007.
    """
    distinct = sorted(set(names))
    if not all(map(_is_integer, distinct)):
        return tuple(distinct)
    value, count = Counter(map(int, distinct)).most_common(1)[0] if distinct else (0, 1)
    if count > 1:
        raise ValueError(f"identity {value} is written in {count} ways")
    return tuple(sorted(distinct, key=int))
