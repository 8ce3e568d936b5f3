"""Checks names of clips and people, and escapes text of untrusted files for messages."""

import re
import sys
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterable

from vidjax.utils.errors import UserError, prefix_errors

# Unicode categories that would break the lines of a file: controls, line and paragraph separators.
_BREAKS = ("Cc", "Zl", "Zp")
# The characters that `escape` replaces. White space and the byte order mark may be dropped by
# programs that read text. A % before two hexadecimal digits would be changed by `unescape`.
_UNSAFE = re.compile(r"[\s\ufeff]|%(?=[0-9A-Fa-f]{2})")
_JOINERS = "\u200c\u200d"  # ZWNJ and ZWJ are in Persian and Indic names and in emoji
# Invisible letters that are not in the Unicode category Cf: fillers and variation selectors.
_SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)

# The parts of names that Windows, or drives with the format exFAT or NTFS, do not allow for files:
# some letters, a dot or a blank at the end, and names of devices. A leading dot hides a file.
_DEVICE = r"^(?:con|prn|aux|nul|com\d|lpt\d)(?=\.|$)"
_NOT_PORTABLE = re.compile(rf'[/\\:*?"<>|]|^\.|[. ]$|{_DEVICE}', re.IGNORECASE)

ENDING = ".mp4"  # is left out of the names of clips
IGNORED = "ignored"  # shown for a clip that the user ignores, or that has no usable face
MAX_FOLDER_BYTES = 255
MAX_STEM_BYTES = 200  # a file name has at most 255 bytes, including suffixes of temporary files


def show(text: str | bytes) -> str:
    """Returns a text from a file, shortened and escaped so that it fits into a message."""
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "backslashreplace")
    text = text if len(text) <= 100 else text[:100] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def check_name(name: str, kind: str = "clip name") -> str:
    """Returns a name unchanged, if it can be written to text files and HTML pages.

    If the name is blank, has control characters, or is not valid Unicode, raises UserError. `kind`
    says in the message what the name is, such as "identity".
    """
    if not name.strip():
        raise UserError(f"{kind} '{show(name)}' is empty: give it a name")
    if name.isprintable():  # fast, and sufficient for most names
        return name
    broken = [letter for letter in name if unicodedata.category(letter) in _BREAKS]
    if broken:
        raise UserError(
            f"{kind} '{show(name)}' contains the control character {broken[0]!a}: rename it"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        remedy = "rename it"
        if sys.getfilesystemencoding() != "utf-8":  # the name may be valid
            remedy = "set PYTHONUTF8=1, because the locale allows only ASCII in file names"
        raise UserError(f"{kind} '{show(name)}' is not valid Unicode: {remedy}") from None
    return name


def clean_identity(name: str) -> str:
    """Returns the name of a person in the Unicode form NFC, if the name is valid.

    A name is valid if `check_name` accepts it, and if it has no leading or trailing blanks and no
    invisible letters. An invisible joiner (ZWJ or ZWNJ) between two letters or symbols is allowed.
    Raises UserError for other names.
    """
    if name != name.strip() and name.strip():
        raise UserError(
            f"identity '{show(name)}' has leading or trailing blanks: remove these blanks"
        )
    name = normal_form(check_name(name, "identity"))
    if name.isprintable():  # then no letter is invisible
        return name
    for place, letter in enumerate(name):
        neighbours = [unicodedata.category(other)[0] for other in name[place - 1 : place + 2 : 2]]
        joins = letter in _JOINERS and place and len(neighbours) == 2 and {*neighbours} <= {*"LMS"}
        if unicodedata.category(letter) == "Cf" and not joins:
            raise UserError(
                f"identity '{show(name)}' contains the invisible letter {letter!a}: "
                "remove this letter"
            )
    return name


def normal_form(name: str) -> str:
    """Returns a name in the Unicode form NFC, where `e` with an accent is a single letter.

    Names of people are compared in this form, because file systems and keyboards use various forms.
    """
    return unicodedata.normalize("NFC", name)


def is_unknown(name: str) -> bool:
    """Returns True if a name is a name that vidjax gives to strangers, such as `unknown 3`."""
    return re.fullmatch("unknown( face)?( [0-9]+)?", name.casefold()) is not None


def is_reserved(name: str) -> bool:
    """Returns True if users must not give this name to a person, such as `ignored`, `unknown 3`."""
    return is_unknown(name) or name.casefold() == IGNORED


def strip_accents(text: str) -> str:
    """Simplifies a text as `fold` does (case, blanks), and removes accents and combining marks."""
    letters = unicodedata.normalize("NFKD", fold(text))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def fold(name: str) -> str:
    """Returns a simplified name, to find names that differ only in details.

    Names have the same simplified name if they differ only in case, ligatures, invisible letters
    or repeated blanks. Letters of two alphabets stay different, such as Latin and Cyrillic `a`.

    Source: NFKC_Casefold of the Unicode standard.
    """
    if name.isascii():
        return " ".join(name.casefold().split())
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", _SHAPELESS.sub("", text)).split())


def find_similar_names(new: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Finds names that differ only in details, such as upper and lower case. See `fold`.

    Returns a dict, name of `new` -> the similar name of `known` or `new`. Names without a similar
    name are left out.
    """
    new, known = [*new], [*known] if new else []
    folded, known_folded = _fold_all(new), _fold_all(known)
    words = set(folded)
    if len(words) == len(new) and words.isdisjoint(known_folded):  # usual, and fast
        return {}
    seen, similar = dict[str, str](), dict[str, str]()
    for word, name in zip(known_folded + folded, known + new, strict=True):
        if (other := seen.setdefault(word, name)) != name:
            similar[name] = other
    return {name: similar[name] for name in new if name in similar}


def _fold_all(names: list[str]) -> list[str]:
    """Returns `fold(name)` for each name. The names are results of `clean_identity`."""
    # Names in ASCII are folded together, because a million calls of `fold` take half a second.
    text = "\n".join(names)
    folded = re.sub("  +", " ", text).casefold().split("\n") if names else []
    if text.isascii():
        return folded
    pairs = zip(folded, names, strict=True)
    return [word if name.isascii() else fold(name) for word, name in pairs]


def make_file_stems(labels: Iterable[str]) -> list[str]:
    """Returns a file name without suffix for each label, of at most 200 bytes.

    All file systems allow the names. No two names differ only in case. The labels `ada`, `Ada` and
    `Who?` get the names `ada`, `Ada (2)` and `Who_`.
    """
    stems, taken = list[str](), Counter[str]()
    for label in labels:
        label = _NOT_PORTABLE.sub(lambda x: x[0] + "_" if len(x[0]) > 1 else "_", label)
        stem = _cut(label, MAX_STEM_BYTES)
        word, number = fold(stem), 1
        while fold(stem) in taken:
            number = max(number, taken[word]) + 1
            stem = f"{_cut(label, MAX_STEM_BYTES - 10)} ({number})"
        taken[word] = number
        taken[fold(stem)] = max(1, taken[fold(stem)])
        stems.append(stem)
    return stems


def make_folder_name(name: str, taken: Collection[str]) -> str:
    """Returns a name for the folder of a person: `Who?` becomes `Who%3F`.

    `read_folder_name` computes the person's name again. `taken` are the names of other folders,
    in lower case (`str.casefold`). If the new name is taken, as `ADA` by the folder `Ada`, all
    letters become numbers such as `%41`. If the new name is too long, returns `name` unchanged.
    """
    code = re.sub(rf"{_NOT_PORTABLE.pattern}|%(?=[0-9a-f]{{2}})", _to_numbers, name, flags=re.I)
    if code.casefold() in taken:
        code = re.sub(".+", _to_numbers, name)
    return code if len(code.encode()) <= MAX_FOLDER_BYTES else name


def read_folder_name(text: str) -> str:
    """Returns the name of a person, given a name of a folder from `make_folder_name`."""
    return normal_form(urllib.parse.unquote(text))


def _to_numbers(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode())


def _cut(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def has_ending(name: str) -> bool:
    """Returns True if the name of a clip ends in `.mp4` or `.MP4`."""
    return name[-len(ENDING) :].lower() == ENDING


def cut_film_name(clip: str) -> str:
    """Returns the name of the film of a clip: `film` for `film.s003.t01` (shot 3, face track 1)."""
    return re.sub(r"\.s\d{3,}(\.t\d{2,})?$", "", clip)


def strip_ending(name: str) -> str:
    """Returns the name of a clip without any `.mp4` or `.MP4` at its end: `a.mp4.mp4` is `a`."""
    end = len(name)
    # Without copies of the name, because it may be `.mp4` * 10**6.
    while end >= len(ENDING) and name[end - len(ENDING) : end].lower() == ENDING:
        end -= len(ENDING)
    return name[:end]


def clean_name(name: str) -> str:
    """Returns the name of a clip without `.mp4` at its end. If it is invalid, raises UserError."""
    bare = strip_ending(name)
    if not bare.strip():
        raise UserError(f"clip name '{show(name)}' is empty: give the clip a name")
    return check_name(bare)


def clean_name_at(place: str, name: object) -> str:
    """Returns `clean_name(name)`. Raises UserError, which begins with `place`, for a wrong name.

    `place` is where the name comes from, such as a file and a line.
    """
    with prefix_errors(place):
        if not isinstance(name, str):
            kind = type(name).__name__
            raise UserError(f"clip name {name!r:.40} is of type {kind}: convert it with str()")
        return clean_name(name)


def escape(name: str) -> str:
    """Returns a name in which white space is written as in a URL, such as `First%20Last`."""
    return _UNSAFE.sub(lambda match: urllib.parse.quote(match[0], safe=""), name)


def unescape(text: str) -> str:
    """Returns the name for a result of `escape`, such as `First Last` for `First%20Last`.

    A text that `escape` cannot return stays unchanged.
    """
    if "%" not in text:
        return text
    name = urllib.parse.unquote(text)
    try:
        return check_name(name) if escape(name) == text else text
    except ValueError:
        return text
